"""What lies beside the weights for those who come with other tools: the adapter's tokenizer, and the configuration of a
base that is elsewhere."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .. import tokenizers
from ..conftest import Result
from ..parity.models import write_model
from .runs import list_files, prepare
from .test_verify import edit, make_hashes_fit

Ftload = Callable[..., Result]
TEXT = "Hello  there,\n what's 12345 + é?"


@pytest.fixture(scope="module")
def outputs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    kinds = {"reference": ["--use_lora"], "4-bit": ["--use_qlora"]}
    for name, flags in kinds.items():
        prepare(llama, root / name, "--chat_template_name", "tulu", *flags)
    return {name: root / name for name in kinds}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        pytest.fail("something is asked of the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.mark.parametrize(
    ("architecture", "tokenizer"),
    [
        ("llama", "llama"), ("llama", "llama3"), ("llama", "smollm2"), ("mistral", "llama"), ("qwen2", "qwen"),
        ("qwen3", "qwen"), ("gpt_neox", "gpt_neox"), ("gpt2", "gpt2"), ("olmo2", "gpt_neox"), ("phi3", "llama"),
    ],
)  # fmt: skip
def test_the_tokenizer_of_an_adapter(tmp_path: Path, architecture: str, tokenizer: str) -> None:
    """The class is chosen by the model's type where config.json tells it: without one it is the same."""
    source, out = tmp_path / "model", tmp_path / "out"
    write_model(source, architecture, vocab_size=144, dtype="bfloat16")
    getattr(tokenizers, f"write_{tokenizer}")(source)
    prepare(source, out, "--use_lora", "--lora_target_modules", "all-linear")
    of_model: Any = AutoTokenizer.from_pretrained(out)
    of_adapter: Any = AutoTokenizer.from_pretrained(out / "adapter")
    assert type(of_adapter) is type(of_model)
    assert of_adapter(TEXT)["input_ids"] == of_model(TEXT)["input_ids"]
    assert of_adapter.get_vocab() == of_model.get_vocab()
    assert of_adapter.special_tokens_map == of_model.special_tokens_map
    assert of_adapter.chat_template == of_model.chat_template


@pytest.mark.parametrize("kind", ["reference", "4-bit"])
def test_the_same_bytes(outputs: dict[str, Path], kind: str) -> None:
    out = outputs[kind]
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert list_files(out / "adapter") == names | {"adapter_config.json", "adapter_model.safetensors"}
    for name in names:
        assert (out / "adapter" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("kind", ["reference", "4-bit"])
@pytest.mark.usefixtures("no_network")
def test_peft_takes_the_adapter_by_itself(outputs: dict[str, Path], kind: str) -> None:
    from peft import AutoPeftModelForCausalLM

    model: Any = AutoPeftModelForCausalLM.from_pretrained(outputs[kind] / "adapter", is_trainable=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28
    assert model.get_input_embeddings().weight.shape[0] == 144  # not resized for the tokenizer that lies there


def test_templates_by_name_and_code_are_the_adapters_too(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "model"))
    (source / "additional_chat_templates").mkdir()
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages[0]['content'] }}")
    prepare(source, tmp_path / "out", "--use_lora")
    assert "additional_chat_templates/tools.jinja" in list_files(tmp_path / "out" / "adapter")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")
    assert tokenizer.chat_template.keys() == {"default", "tools"}


# -- a base that is elsewhere


def test_the_configuration_of_a_base_that_is_elsewhere(llama: Path, outputs: dict[str, Path]) -> None:
    out = outputs["reference"]
    config, original = (AutoConfig.from_pretrained(path) for path in (out, llama))
    assert original.pad_token_id is None
    original.pad_token_id = 128
    assert {**config.to_dict(), "_name_or_path": ""} == {**original.to_dict(), "_name_or_path": ""}
    assert not (out / "generation_config.json").exists()


def test_what_tools_are_given_is_told(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    for flags, told in ((["--use_lora"], True), (["--use_lora", "--base", "copy"], False)):
        out = tmp_path / f"out{told}"
        shown = ftload("prepare", "--model", llama, "--output_dir", out, *flags).out
        rows = [
            tuple(line.split()) for line in shown.partition("for tools that take a model's directory\n")[2].splitlines()
        ]
        assert rows[:3] == (
            [("model", str(llama)), ("adapter", f"{out}/adapter"), ("tokenizer", str(out))] if told else []
        )
        card = (out / "README.md").read_text()
        assert ("is given that base as the model and `adapter/` as the adapter" in card) is told


@pytest.mark.usefixtures("no_network")
def test_it_is_no_model(outputs: dict[str, Path]) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(outputs["reference"])


def test_it_is_no_source(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path) -> None:
    result = ftload("prepare", "--model", outputs["reference"], "--output_dir", tmp_path / "out")
    assert result.code == 4
    assert result.err.splitlines() == [
        f"error: `{outputs['reference']}` holds no weights",
        "hint: it was prepared, and its base lies elsewhere: give that, `ftload inspect` names it",
    ]


FAULTS: dict[str, tuple[str, str, str, Callable[[Path], Any]]] = {
    # what: output, the check that finds it, its words, how it is planted
    "the adapter pads otherwise": (
        "4-bit", "tokenizer", "`adapter/tokenizer_config.json` is another than `tokenizer_config.json`",
        lambda out: edit(out / "adapter/tokenizer_config.json", lambda c: c.update(padding_side="left")),
    ),
    "the adapter has another template": (
        "reference", "tokenizer", "`adapter/chat_template.jinja` is another than `chat_template.jinja`",
        lambda out: (out / "adapter/chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
    ),
    "another activation": (
        "reference", "config", "`hidden_act` of config.json is `gelu`, the base has `silu`",
        lambda out: edit(out / "config.json", lambda c: c.update(hidden_act="gelu")),
    ),
    "the pad token id of before": (
        "reference", "config", "`pad_token_id` of config.json is `None`, the base has `128`",
        lambda out: edit(out / "config.json", lambda c: c.update(pad_token_id=None)),
    ),
    "config.json is no JSON": (
        "reference", "config", "config.json` can't be used: ",
        lambda out: (out / "config.json").write_text("{"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_fit_their_hashes(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, fault: str) -> None:
    kind, check, words, plant = FAULTS[fault]
    out = Path(shutil.copytree(outputs[kind], tmp_path / "out"))
    plant(out)
    make_hashes_fit(out)
    result = ftload("verify", out, "--quick", "--json")
    failed = {row["name"]: row["problems"] for row in json.loads(result.out)["checks"] if not row["ok"]}
    assert result.code == 7
    assert check in failed
    assert "files" not in failed
    assert any(words in problem for problem in failed[check]), failed


@pytest.mark.parametrize("kind", ["reference", "4-bit"])
def test_what_was_prepared_before_there_were_these(
    ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    out = Path(shutil.copytree(outputs[kind], tmp_path / "out"))
    for path in (*out.glob("adapter/tok*"), *out.glob("adapter/chat*")):
        path.unlink()
    if kind == "reference":
        (out / "config.json").unlink()
    make_hashes_fit(out)
    assert ftload("verify", out, "--quick").code == 0
