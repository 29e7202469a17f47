"""Tokenizers: what each function makes of each kind, what is saved, and what is said when it can't be done."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.decision import Decision
from ftload.loaders.errors import CheckpointError, FtloadError, MissingRequirementError, UsageError
from ftload.loaders.tokenizer.chat_templates import TEMPLATES
from ftload.loaders.tokenizer.tokenizer import (
    PreparedTokenizer,
    prepare_tokenizer,
    resolve_tokenizer_source,
    save_tokenizer,
)

from ..tokenizers import (
    CHATML_TEMPLATE,
    LLAMA3_TEMPLATE,
    write_gpt2,
    write_gpt_neox,
    write_llama,
    write_llama3,
    write_qwen,
    write_smollm2,
)

SIMPLE, V1, V2_1, V2_2 = (f"get_tokenizer_{name}" for name in ("simple_v1", "tulu_v1", "tulu_v2_1", "tulu_v2_2"))
FUNCTIONS = (SIMPLE, V1, V2_1, V2_2)

WRITERS: dict[str, Callable[..., None]] = {
    "llama": write_llama,
    "llama3": write_llama3,
    "smollm2": write_smollm2,
    "qwen": write_qwen,
    "neox": write_gpt_neox,
    "gpt2": write_gpt2,
}

END = "<|endoftext|>"
NEW = ("pad token", "none", "<pad> (id 128)", "batches need one")
WAS_EOS = (
    "pad token", "<|im_end|>", "<pad> (id 128)",
    "it was the eos token: training that masks padding ignores where texts end",
)  # fmt: skip

# family, functions, bos, eos, unk, pad, size, the decision
EXPECTED: list[tuple[str, tuple[str, ...], str | None, str, str | None, str | None, int, Any]] = [
    ("llama", (SIMPLE,), "<s>", "</s>", "<unk>", None, 128, None),
    ("llama", (V1, V2_1, V2_2), "<s>", "</s>", "<unk>", "<pad>", 129, NEW),
    ("llama3", (SIMPLE,), "<|begin_of_text|>", "<|eot_id|>", None, None, 128, None),
    ("llama3", (V1, V2_1, V2_2), "<|begin_of_text|>", "<|eot_id|>", None, "<pad>", 129, NEW),
    ("smollm2", (SIMPLE, V1), "<|im_start|>", "<|im_end|>", END, "<|im_end|>", 128, None),
    ("smollm2", (V2_1, V2_2), "<|im_start|>", "<|im_end|>", END, "<pad>", 129, WAS_EOS),
    ("qwen", (SIMPLE, V1, V2_1, V2_2), None, "<|im_end|>", None, END, 128, None),
    ("neox", (SIMPLE,), END, END, END, None, 128, None),
    ("neox", (V1, V2_1, V2_2), END, END, END, "<pad>", 129, NEW),
    ("gpt2", (SIMPLE,), END, END, END, None, 128, None),
    ("gpt2", (V1, V2_1, V2_2), END, END, END, "<pad>", 129, NEW),
]
CASES = [(family, function, *rest) for family, functions, *rest in EXPECTED for function in functions]


def prepare(root: Path, **options: Any) -> PreparedTokenizer:
    defaults: dict[str, Any] = {
        "get_tokenizer_fn": V2_2,
        "use_fast": True,
        "trust_remote_code": False,
        "chat_template_name": None,
        "add_bos": False,
        "name": "org/model",
    }
    return prepare_tokenizer(root, **{**defaults, **options})


def failure(root: Path, kind: type[FtloadError], **options: Any) -> FtloadError:
    with pytest.raises(FtloadError) as caught:
        prepare(root, **options)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")
    return caught.value


def told(prepared: PreparedTokenizer) -> list[tuple[str, str, str, str]]:
    return [(d.what, d.requested, d.effective, d.reason) for d in prepared.decisions]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# what each function makes of each kind


def test_every_function_is_tried_on_every_kind() -> None:
    assert {case[:2] for case in CASES} == {(family, function) for family in WRITERS for function in FUNCTIONS}


@pytest.mark.parametrize(
    ("family", "function", "bos", "eos", "unk", "pad", "size", "decision"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_special_tokens(
    tmp_path: Path, family: str, function: str, bos: Any, eos: str, unk: Any, pad: Any, size: int, decision: Any
) -> None:
    WRITERS[family](tmp_path)
    prepared = prepare(tmp_path, get_tokenizer_fn=function)
    tokenizer = prepared.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (bos, eos, unk)
    assert (tokenizer.pad_token, len(tokenizer)) == (pad, size)
    assert told(prepared) == ([] if decision is None else [decision])
    own = {"llama3": LLAMA3_TEMPLATE, "smollm2": CHATML_TEMPLATE, "qwen": CHATML_TEMPLATE}.get(family)
    assert tokenizer.chat_template == own
    if pad == "<pad>":
        assert tokenizer.pad_token_id == 128
        assert tokenizer("<pad>", add_special_tokens=False)["input_ids"] == [128]


def test_the_warnings_say_what_training_will_miss(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    no_pad = "the tokenizer has no pad token: texts of different lengths can't share a batch"
    no_template = "the tokenizer has no chat template: training on conversations needs one"
    assert prepare(tmp_path / "llama", get_tokenizer_fn=SIMPLE).warnings == (no_pad, no_template)
    assert prepare(tmp_path / "llama").warnings == (no_template,)
    assert prepare(tmp_path / "llama", chat_template_name="tulu").warnings == ()
    write_smollm2(tmp_path / "smollm2")
    same = "pad and eos are the same token, `<|im_end|>`: training that masks padding ignores where texts end"
    assert prepare(tmp_path / "smollm2", get_tokenizer_fn=V1).warnings == (same,)
    assert prepare(tmp_path / "smollm2").warnings == ()
    (tmp_path / "llama" / "tokenizer_config.json").unlink()
    no_eos = "the tokenizer has no eos token: a model can't learn from it where a text ends"
    assert prepare(tmp_path / "llama", chat_template_name="tulu").warnings == (no_eos,)


def test_facts_are_what_the_report_says(tmp_path: Path) -> None:
    write_llama3(tmp_path)
    assert prepare(tmp_path).facts() == {
        "class": "TokenizersBackend",
        "size": 129,
        "pad_token": "<pad>",
        "pad_token_id": 128,
        "eos_token": "<|eot_id|>",
        "eos_token_id": 127,
        "bos_token": "<|begin_of_text|>",
        "padding_side": "right",
        "model_max_length": int(1e30),
        "chat_template_sha256": hashlib.sha256(LLAMA3_TEMPLATE.encode()).hexdigest(),
        "chat_template_name": None,
    }
    named = prepare(tmp_path, chat_template_name="zephyr").facts()
    assert named["chat_template_name"] == "zephyr"
    assert named["chat_template_sha256"] == hashlib.sha256(TEMPLATES["zephyr"].encode()).hexdigest()
    write_gpt2(tmp_path / "gpt2")
    assert prepare(tmp_path / "gpt2").facts()["chat_template_sha256"] is None


def test_a_pad_token_in_the_vocabulary_is_used(tmp_path: Path) -> None:
    write_llama(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["<pad>"] = vocab.pop("!")
    file.write_text(json.dumps(content))
    for function in (V1, V2_1, V2_2):
        prepared = prepare(tmp_path, get_tokenizer_fn=function)
        assert (prepared.tokenizer.pad_token_id, len(prepared.tokenizer)) == (vocab["<pad>"], 128)
        assert told(prepared) == [
            ("pad token", "none", "<pad> (id 66)", "batches need one; the vocabulary had `<pad>` already")
        ]


@pytest.mark.parametrize("declared_in", ["tokenizer_config.json", "config.json"])
def test_the_declared_class_counts_where_transformers_loads_the_generic_one(tmp_path: Path, declared_in: str) -> None:
    # what transformers 5 does with Llama's class on a byte-level vocabulary
    write_llama3(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    file = tmp_path / declared_in
    declared = json.loads(file.read_text()) if file.exists() else {"model_type": "llama"}
    file.write_text(json.dumps({**declared, "tokenizer_class": "LlamaTokenizerFast"}))
    prepared = prepare(tmp_path)
    assert prepared.facts()["class"] == "TokenizersBackend"
    kind = f"Llama tokenizer (`tokenizer_class` in {declared_in} `LlamaTokenizerFast`)"
    assert told(prepared) == [NEW]

    error = failure(tmp_path, UsageError, get_tokenizer_fn=V1)
    assert error.message == (
        f"`{V1}` does not fit the tokenizer of `org/model`: it is a {kind} whose vocabulary lacks "
        "`</s>`, `<pad>`, `<s>`, `<unk>`"
    )
    assert error.hint == f"leave out --get_tokenizer_fn, which is `{V2_2}` then"


@pytest.mark.parametrize("function", [V1, V2_1, V2_2])
def test_gpt_neox_without_bos_takes_eos_for_it(tmp_path: Path, function: str) -> None:
    write_gpt_neox(tmp_path, bos=False)
    prepared = prepare(tmp_path, get_tokenizer_fn=function, add_bos=True, chat_template_name="tulu")
    tokenizer = prepared.tokenizer
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.pad_token, len(tokenizer)) == (END, 0, None, 128)
    assert told(prepared) == [("bos token", "none", f"{END} (id 0)", "there was none, and the eos token becomes it")]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == f"{END}<|user|>\nHi\n"

    error = failure(tmp_path, UsageError, get_tokenizer_fn=function)
    assert error.message == f"`{function}` needs `--add_bos` for `org/model`, a GPT-NeoX tokenizer without a bos token"
    assert error.hint == "pass --add_bos"


def test_gpt_neox_without_bos_needs_no_add_bos_for_an_olmo_template(tmp_path: Path) -> None:
    write_gpt_neox(tmp_path, bos=False)
    template = tmp_path / "OLMo.jinja"
    template.write_text("{{ eos_token }}{{ messages[0].content }}")
    assert prepare(tmp_path, chat_template_name=str(template)).tokenizer.bos_token == END
    failure(tmp_path, UsageError, chat_template_name=str(template), get_tokenizer_fn=V2_1)
    elsewhere = tmp_path / "olmo" / "other.jinja"
    elsewhere.parent.mkdir()
    elsewhere.write_text(template.read_text())
    failure(tmp_path, UsageError, chat_template_name=str(elsewhere))


def test_gpt_neox_v1_sets_pad_over_another_and_v2_keeps_it(tmp_path: Path) -> None:
    write_gpt_neox(tmp_path, pad="<|padding|>")
    prepared = prepare(tmp_path, get_tokenizer_fn=V1)
    assert prepared.tokenizer.pad_token == "<pad>"
    assert told(prepared) == [("pad token", "<|padding|>", "<pad> (id 128)", f"`{V1}` sets it")]
    for function in (V2_1, V2_2):
        prepared = prepare(tmp_path, get_tokenizer_fn=function)
        assert (prepared.tokenizer.pad_token, len(prepared.tokenizer)) == ("<|padding|>", 128)
        assert told(prepared) == []


@pytest.mark.parametrize("function", [V2_1, V2_2])
def test_pad_that_stays_eos_is_an_error(tmp_path: Path, function: str) -> None:
    write_gpt_neox(tmp_path, bos=False, pad=END, chat_template=CHATML_TEMPLATE)
    error = failure(tmp_path, UsageError, get_tokenizer_fn=function, add_bos=True)
    assert error.code == 2
    assert error.message == (
        f"`{function}` leaves pad and eos of `org/model` the same token, `{END}`: "
        "training that masks padding ignores where texts end"
    )


# chat templates


@pytest.mark.parametrize("function", [V1, V2_1, V2_2])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_named_template_replaces_the_tokenizers_own(tmp_path: Path, function: str, name: str) -> None:
    write_qwen(tmp_path)
    prepared = prepare(tmp_path, get_tokenizer_fn=function, chat_template_name=name)
    assert prepared.tokenizer.chat_template == TEMPLATES[name]
    assert told(prepared) == []


@pytest.mark.parametrize("function", [V1, V2_1, V2_2])
def test_a_jinja_file_is_read_as_template(tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_qwen(tmp_path)
    template = "{% generation %}é {{ messages[0]['content'] }}{% endgeneration %}{{ eos_token }}\n"
    (tmp_path / "mine.jinja").write_text(template, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    prepared = prepare(tmp_path, get_tokenizer_fn=function, chat_template_name="mine.jinja")
    assert prepared.tokenizer.chat_template == template
    assert prepared.facts()["chat_template_name"] == "mine.jinja"
    text = prepared.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "é Hi<|im_end|>"


def test_a_template_may_refuse_conversations(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    path = tmp_path / "strict.jinja"
    path.write_text("{{ raise_exception('a system message must come first') }}")
    assert prepare(tmp_path, chat_template_name=str(path)).tokenizer.chat_template == path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't read the chat template `{path}`: No such file or directory"),
        (b"\xff\xfe{", "the chat template `{path}` is not UTF-8 text: invalid start byte"),
        (
            b"{{ bos_token }}\n{% if x %}",
            "the chat template `{path}` is not valid, line 2: Unexpected end of template. Jinja was looking for the "
            "following tags: 'elif' or 'else' or 'endif'. The innermost block that needs to be closed is 'if'",
        ),
    ],
)
def test_a_jinja_file_that_is_no_template(tmp_path: Path, content: bytes | None, message: str) -> None:
    write_qwen(tmp_path)
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    error = failure(tmp_path, UsageError, chat_template_name=str(path))
    assert (error.code, error.message) == (2, message.format(path=path))


@pytest.mark.parametrize("function", [V2_1, V2_2])
def test_an_unknown_template_is_an_error_that_lists_them(tmp_path: Path, function: str) -> None:
    write_qwen(tmp_path)
    error = failure(tmp_path, UsageError, get_tokenizer_fn=function, chat_template_name="tülü")
    assert error.message == (
        "there is no chat template `tülü`; there are `simple_concat_with_space`, `simple_concat_with_new_line`, "
        "`simple_chat`, `assistant_message_only`, `zephyr`, `tulu`"
    )
    assert error.hint == (
        "pass one of them or a .jinja file, or leave out --chat_template_name to keep the tokenizer's own"
    )


def test_v1_keeps_the_tokenizers_own_for_an_unknown_name(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    prepared = prepare(tmp_path, get_tokenizer_fn=V1, chat_template_name="nonesuch")
    assert prepared.tokenizer.chat_template == CHATML_TEMPLATE
    assert prepared.facts()["chat_template_name"] is None
    (decision,) = prepared.decisions
    assert (decision.what, decision.requested) == ("chat_template_name", "nonesuch")
    assert decision.effective == "the tokenizer's own"


def test_simple_v1_leaves_the_template_alone_and_says_so(tmp_path: Path) -> None:
    write_smollm2(tmp_path)
    prepared = prepare(tmp_path, get_tokenizer_fn=SIMPLE, chat_template_name="tulu", add_bos=True)
    assert prepared.tokenizer.chat_template == CHATML_TEMPLATE
    assert [(d.what, d.requested, d.effective) for d in prepared.decisions] == [
        ("chat_template_name", "tulu", "the tokenizer's own"),
        ("add_bos", "true", "false"),
    ]


def test_several_templates_are_kept_and_each_is_prefixed(tmp_path: Path) -> None:
    write_llama(tmp_path / "in", chat_template="{{ messages[0].content }}")
    folder = tmp_path / "in" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("tool {{ messages[0].content }}")
    (tmp_path / "in" / "chat_template.jinja").write_text("own {{ messages[0].content }}")
    templates = {"default": "own {{ messages[0].content }}", "tool_use": "tool {{ messages[0].content }}"}
    kept = prepare(tmp_path / "in")
    assert kept.tokenizer.chat_template == templates
    digest = hashlib.sha256(json.dumps(templates).encode()).hexdigest()
    assert kept.facts()["chat_template_sha256"] == digest
    assert save_tokenizer(kept, tmp_path / "out") == (
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    prefixed = prepare(tmp_path / "out", add_bos=True).tokenizer.chat_template
    assert prefixed == {name: "{{ bos_token }}" + text for name, text in templates.items()}


# add_bos


@pytest.mark.parametrize("function", [V1, V2_1, V2_2])
def test_add_bos_prefixes_the_template(tmp_path: Path, function: str) -> None:
    write_smollm2(tmp_path)
    prepared = prepare(tmp_path, get_tokenizer_fn=function, add_bos=True)
    assert prepared.tokenizer.chat_template == "{{ bos_token }}" + CHATML_TEMPLATE
    ids = prepared.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert ids[:2] == [1, 1]  # <|im_start|> is this tokenizer's bos, and ChatML's first token as well
    named = prepare(tmp_path, get_tokenizer_fn=function, add_bos=True, chat_template_name="zephyr").tokenizer
    text = named.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|><|user|>\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages }}",
        "{{bos_token}}{{ messages }}",
        "{{- bos_token -}}\n{{ messages }}",
        "\n  {{-  bos_token}}",
        "{# Llama #}\n{#- two -#}{{ bos_token + messages[0].content }}",
        "<s>{{ messages }}",
        "\n<s>{{ messages }}",
    ],
)
@pytest.mark.parametrize("function", [V1, V2_2])
def test_add_bos_on_a_template_that_begins_with_bos(tmp_path: Path, function: str, template: str) -> None:
    write_llama(tmp_path, chat_template=template)
    error = failure(tmp_path, UsageError, get_tokenizer_fn=function, add_bos=True)
    assert error.message == "`--add_bos`: the chat template begins with the bos token, `<s>`, already"
    assert error.hint == "leave out --add_bos"
    assert prepare(tmp_path, get_tokenizer_fn=function).tokenizer.chat_template == template


@pytest.mark.parametrize("template", ["{{ bos_token_of_mine }}", "{{ eos_token }}", "{{ '<bos>' }}"])
def test_add_bos_on_a_template_that_begins_with_something_like_bos(tmp_path: Path, template: str) -> None:
    write_llama(tmp_path, chat_template=template)
    prepared = prepare(tmp_path, add_bos=True)
    assert prepared.tokenizer.chat_template == "{{ bos_token }}" + template
    assert prepared.warnings == ()


def test_add_bos_warns_when_bos_is_rendered_twice(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ bos_token + message.content }}{% endfor %}"
    write_llama(tmp_path, chat_template=template)
    prepared = prepare(tmp_path, add_bos=True)
    assert prepared.tokenizer.chat_template == "{{ bos_token }}" + template
    assert prepared.warnings == (
        "`--add_bos`: what the chat template renders begins with `<s>` already, and now does so twice",
    )


@pytest.mark.parametrize("function", [V1, V2_1, V2_2])
def test_add_bos_without_template_or_bos(tmp_path: Path, function: str) -> None:
    write_llama(tmp_path / "llama")
    no_template = failure(tmp_path / "llama", UsageError, get_tokenizer_fn=function, add_bos=True)
    assert no_template.message == "`--add_bos` prefixes the chat template, and the tokenizer has none"
    assert no_template.hint == "pass --chat_template_name"
    write_qwen(tmp_path / "qwen")
    no_bos = failure(tmp_path / "qwen", UsageError, get_tokenizer_fn=function, add_bos=True)
    assert no_bos.message == "`--add_bos` needs a bos token, and the tokenizer has none"
    assert no_bos.hint == "leave out --add_bos"


def test_add_bos_on_gpt_neox_with_pad_and_without_bos_names_the_way_out(tmp_path: Path) -> None:
    write_gpt_neox(tmp_path, bos=False, pad="<|padding|>")
    options = {"add_bos": True, "chat_template_name": "tulu", "name": "allenai/OLMo-1B"}
    error = failure(tmp_path, UsageError, **options)
    assert error.hint == (
        f"leave out --add_bos, or pass --get_tokenizer_fn {V1}, which makes the eos token the bos token"
    )
    assert prepare(tmp_path, get_tokenizer_fn=V1, **options).tokenizer.bos_token == END


# olmo


def test_olmo_rules_of_v2_2(tmp_path: Path) -> None:
    write_smollm2(tmp_path)
    olmo, other = tmp_path / "olmo_2.jinja", tmp_path / "other.jinja"
    for path in (olmo, other):
        path.write_text("{{ messages[0].content }}")
    name = "allenai/OLMo-2-1124-7B"

    assert prepare(tmp_path, name=name).tokenizer.chat_template == CHATML_TEMPLATE
    assert prepare(tmp_path, name=name, add_bos=True).tokenizer.chat_template == "{{ bos_token }}" + CHATML_TEMPLATE
    assert prepare(tmp_path, name=name, chat_template_name=str(olmo)).tokenizer.chat_template == olmo.read_text()
    for template in ("tulu", str(other)):
        error = failure(tmp_path, UsageError, name=name, chat_template_name=template)
        assert error.message == (
            f"the tokenizer's name, `{name}`, contains `olmo`: the chat template `{template}` needs `--add_bos`"
        )
        assert prepare(tmp_path, name=name, chat_template_name=template, add_bos=True).warnings == ()
    error = failure(tmp_path, UsageError, name=name, chat_template_name=str(olmo), add_bos=True)
    assert error.hint == "leave out --add_bos"
    error = failure(tmp_path, UsageError, name=name, use_fast=False)
    assert error.message == f"the tokenizer's name, `{name}`, contains `olmo`: it needs the fast tokenizer"
    for function in (V1, V2_1):
        assert prepare(tmp_path, name=name, chat_template_name="tulu", get_tokenizer_fn=function)


# flags


def test_an_unknown_function_lists_the_four(tmp_path: Path) -> None:
    error = failure(tmp_path, UsageError, get_tokenizer_fn="get_tokenizer_v9")
    assert error.message == "`get_tokenizer_fn` is `get_tokenizer_v9`, which is not known"
    assert error.hint == f"choose one of {', '.join(FUNCTIONS)}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_use_fast_makes_no_difference_and_that_is_said(tmp_path: Path, function: str) -> None:
    write_qwen(tmp_path)
    prepared = prepare(tmp_path, get_tokenizer_fn=function, use_fast=False)
    assert prepared.decisions == (
        Decision(
            what="use_fast",
            requested="false",
            effective="true",
            reason="transformers 5 loads the same tokenizer, the fast one, either way",
        ),
    )


OTHER = {"model": "m", "model_revision": None}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("m", None, 0)),
        ({"model_revision": "r"}, ("m", "r", 0)),
        ({"tokenizer_name_or_path": "t"}, ("t", None, 0)),
        ({"tokenizer_name_or_path": "t", "model_revision": "r"}, ("t", "r", 0)),
        ({"tokenizer_revision": "s", "model_revision": "r"}, ("m", "s", 0)),
        ({"tokenizer_name_or_path": "m", "tokenizer_revision": "s"}, ("m", "s", 0)),
        ({"tokenizer_name_or_path": "t", "tokenizer_revision": "s"}, ("t", "s", 1)),
        ({"tokenizer_name": "t"}, ("t", None, 1)),
        ({"tokenizer_name": "t", "tokenizer_name_or_path": "t"}, ("t", None, 1)),
        ({"tokenizer_name": "t", "tokenizer_revision": "s", "model_revision": "r"}, ("t", "s", 2)),
    ],
)
def test_the_tokenizers_source_defaults_to_the_models(given: dict[str, str], expected: tuple[Any, ...]) -> None:
    flags: dict[str, Any] = {"tokenizer_name_or_path": None, "tokenizer_revision": None, "tokenizer_name": None}
    name, revision, warnings = resolve_tokenizer_source(**{**flags, **OTHER, **given})
    assert (name, revision, len(warnings)) == expected


def test_what_is_said_of_the_tokenizers_source() -> None:
    flags: dict[str, Any] = {"tokenizer_name_or_path": "t", "tokenizer_revision": "s", "tokenizer_name": "t"}
    *_, warnings = resolve_tokenizer_source(**flags, **OTHER)
    assert warnings == (
        "`tokenizer_name` is deprecated: use `tokenizer_name_or_path`",
        "the tokenizer, `t` at `s`, differs from the model, `m` at `its default revision`, in name and revision",
    )
    with pytest.raises(UsageError) as caught:
        resolve_tokenizer_source(**{**flags, **OTHER, "tokenizer_name": "u"})
    assert caught.value.message == "`tokenizer_name` is `u`, but `tokenizer_name_or_path` is `t`"


# saving


@pytest.mark.parametrize("family", [*WRITERS, "neox without bos"])
def test_what_is_saved_loads_as_the_same_tokenizer(tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    if family in WRITERS:
        WRITERS[family](tmp_path / "in")
    else:
        write_gpt_neox(tmp_path / "in", bos=False)
    prepared = prepare(tmp_path / "in", chat_template_name="zephyr", add_bos=family == "neox without bos")
    names = save_tokenizer(prepared, tmp_path / "out")
    assert names == ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert set(names) == set(contents(tmp_path / "out"))
    tokenizer, loaded = prepared.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"Hello <pad> abba{END} <s>x</s><|im_end|> 1,2"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.chat_template, len(loaded)) == (tokenizer.chat_template, len(tokenizer))
    assert type(loaded) is type(tokenizer)


@pytest.mark.parametrize("family", WRITERS)
def test_saving_is_deterministic(tmp_path: Path, family: str) -> None:
    for place in ("a", "elsewhere/b"):
        WRITERS[family](tmp_path / place)
        save_tokenizer(prepare(tmp_path / place, name=place), tmp_path / place / "out")
    first, second = (contents(tmp_path / place / "out") for place in ("a", "elsewhere/b"))
    assert first == second
    config = json.loads(first["tokenizer_config.json"])
    assert not config.keys() & {"is_local", "local_files_only", "name_or_path"}
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_preparing_a_prepared_tokenizer_changes_nothing(tmp_path: Path) -> None:
    write_smollm2(tmp_path / "in")
    save_tokenizer(prepare(tmp_path / "in"), tmp_path / "once")
    save_tokenizer(prepare(tmp_path / "once"), tmp_path / "twice")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_nothing_is_printed_or_fetched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr("socket.socket.connect", connect)
    # Llama's class on a byte-level vocabulary, and a model type that nobody knows: transformers logs about both
    write_llama3(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    prepared = prepare(tmp_path, use_fast=False, chat_template_name="tulu", add_bos=True)
    save_tokenizer(prepared, tmp_path / "out")
    prepared.facts()
    assert capfd.readouterr() == ("", "")


# what can't be loaded


BAD: dict[str, tuple[dict[str, str | None], str]] = {
    "empty": ({"tokenizer.json": None, "tokenizer_config.json": None}, "`{root}` holds no tokenizer"),
    # of these two transformers makes a tokenizer with nothing but special tokens
    "no vocabulary": ({"tokenizer.json": None}, "`{root}` holds no tokenizer"),
    "model only": (
        {"tokenizer.json": None, "tokenizer_config.json": None, "config.json": '{"model_type": "qwen2"}'},
        "`{root}` holds no tokenizer",
    ),
    "truncated": (
        {"tokenizer.json": '{"version": "1.0",'},
        "`{root}/tokenizer.json` can't be used: Expecting property name enclosed in double quotes: line 1 column 19 "
        "(char 18)",
    ),
    "pointer": (
        {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"},
        "`{root}/tokenizer.json` is a Git LFS pointer, not the file itself",
    ),
    "broken config": (
        {"tokenizer_config.json": "{"},
        "`{root}/tokenizer_config.json` can't be used: Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)",
    ),
    "no object": (
        {"tokenizer_config.json": "[]"},
        "`{root}/tokenizer_config.json` can't be used: it is no JSON object",
    ),
    "other json": ({"tokenizer.json": "{}"}, "no tokenizer can be loaded from `{root}`: KeyError: 'added_tokens'"),
}


@pytest.mark.parametrize(("files", "message"), BAD.values(), ids=BAD)
def test_files_that_hold_no_tokenizer(
    tmp_path: Path, files: dict[str, str | None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_llama(tmp_path)
    for name, text in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if text is not None:
            (tmp_path / name).write_text(text)
    error = failure(tmp_path, CheckpointError)
    assert (error.code, error.message) == (4, message.format(root=tmp_path))
    assert error.hint
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_that_another_library_must_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf")
    monkeypatch.setattr("ftload.loaders.tokenizer.loading.installed_version", lambda _: None)
    error = failure(tmp_path, MissingRequirementError)
    assert error.code == 5
    assert error.message == f"reading `{tmp_path / 'tokenizer.model'}` needs `sentencepiece` and `protobuf`"
    assert error.hint == "pip install sentencepiece protobuf"
    monkeypatch.setattr("ftload.loaders.tokenizer.loading.installed_version", lambda _: "1.0")
    assert failure(tmp_path, CheckpointError).message.startswith(f"no tokenizer can be loaded from `{tmp_path}`: ")


REMOTE = """
import {package}
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def write_remote(directory: Path, package: str = "json") -> None:
    write_llama(directory, chat_template="{{ messages[0].content }}")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(REMOTE.format(package=package))


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from transformers import dynamic_module_utils

    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return cache


def test_remote_code_without_the_flag_is_refused_and_never_asked_for(
    tmp_path: Path, modules_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ask(prompt: str = "") -> str:
        raise AssertionError(prompt)

    monkeypatch.setattr("builtins.input", ask)
    write_remote(tmp_path / "model")
    error = failure(tmp_path / "model", CheckpointError)
    assert error.code == 4
    assert error.message == f"the tokenizer in `{tmp_path / 'model'}` needs code of its own"
    assert error.hint == "pass --trust_remote_code if you trust it"
    assert not modules_cache.exists()
    assert capfd.readouterr() == ("", "")


def test_remote_code_with_the_flag_is_run_and_saved(tmp_path: Path, modules_cache: Path) -> None:
    write_remote(tmp_path / "model")
    prepared = prepare(tmp_path / "model", trust_remote_code=True)
    assert prepared.facts()["class"] == "OwnTokenizer"
    assert prepared.tokenizer.pad_token == "<pad>"
    save_tokenizer(prepared, tmp_path / "out")
    assert (tmp_path / "out" / "own.py").read_text() == (tmp_path / "model" / "own.py").read_text()
    again = prepare(tmp_path / "out", trust_remote_code=True)
    assert again.tokenizer("ab ba")["input_ids"] == prepared.tokenizer("ab ba")["input_ids"]
    assert modules_cache.is_dir()


@pytest.mark.usefixtures("modules_cache")
def test_remote_code_that_needs_a_package(tmp_path: Path) -> None:
    write_remote(tmp_path / "model", package="no_such_package_at_all")
    error = failure(tmp_path / "model", MissingRequirementError, trust_remote_code=True)
    assert error.code == 5
    assert "no_such_package_at_all" in error.message


# GGUF


def write_gguf(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_smollm2(path.parent / "source")
    model = json.loads((path.parent / "source" / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * 125)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML_TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    prepared = prepare(tmp_path, gguf_file="m.gguf")
    tokenizer = prepared.tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token) == ("<pad>", 128, "<|im_end|>")
    assert tokenizer.chat_template == CHATML_TEMPLATE
    save_tokenizer(prepared, tmp_path / "out")
    again = prepare(tmp_path / "out").tokenizer
    original = prepare(tmp_path / "source").tokenizer
    text = "Hello ab<|im_end|>"
    assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == original(text)["input_ids"]


def test_a_gguf_file_is_read_alone(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    alone = prepare(tmp_path, gguf_file="m.gguf")
    write_llama(tmp_path)
    beside = prepare(tmp_path, gguf_file="m.gguf")
    assert beside.facts() == alone.facts()
    assert beside.tokenizer.get_vocab() == alone.tokenizer.get_vocab()


def test_a_gguf_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF1234")
    error = failure(tmp_path, CheckpointError, gguf_file="m.gguf")
    assert error.message.startswith(f"no tokenizer can be loaded from `{tmp_path / 'm.gguf'}`: ")
    monkeypatch.setattr("ftload.loaders.tokenizer.loading.installed_version", lambda _: None)
    error = failure(tmp_path, MissingRequirementError, gguf_file="m.gguf")
    assert error.hint == "pip install 'ftload[gguf]'"
