# ruff: noqa: E501 -- a fault a line
"""Faults that no size, hash or count gives away, and honest outputs that look odd: what `ftload verify` says of each."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..hub import LoopbackHub
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import prepare
from .test_verify import (
    ADAPTER,
    BF16_NAN,
    CHAT,
    FAULTS,
    SHARDS,
    Ftload,
    edit,
    edit_report,
    make_hashes_fit,
    rename_tensor,
    report,
    shards,
    tensor_place,
)


def write(directory: Path, architecture: str = "llama", vocab_size: int = 136) -> Path:
    write_model(directory, architecture, vocab_size=vocab_size, dtype="bfloat16")
    write_llama(directory, vocab_size=128)
    return directory


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deeper")
    model, small = write(root / "model"), write(root / "small", vocab_size=128)
    kinds = {
        "standard": (model, SHARDS),
        "grown": (small, []),
        "lora": (model, ["--use_lora"]),
        "copied": (model, ["--use_lora", "--base", "copy"]),
        "qlora": (model, ["--use_qlora"]),
        "rank 4": (model, ["--use_qlora", "--lora_rank", "4"]),
    }
    for name, (source, flags) in kinds.items():
        prepare(source, root / name, *CHAT, *flags)
    return {name: root / name for name in kinds}


def fill_row(out: Path, tensor: str, row: int, content: bytes) -> None:
    """Overwrite one row of 64 bfloat16 numbers."""
    path = next(path for path in sorted(out.glob("*.safetensors")) if tensor.encode() in path.read_bytes())
    begin, _ = tensor_place(path, tensor)
    data = bytearray(path.read_bytes())
    data[begin + 128 * row : begin + 128 * (row + 1)] = (content * 128)[:128]
    path.write_bytes(data)


def rename_layer(out: Path, old: bytes, new: bytes) -> None:
    rename_tensor(out, ADAPTER, old + b".lora_A", new + b".lora_A")
    rename_tensor(out, ADAPTER, old + b".lora_B", new + b".lora_B")


def set_template(out: Path, text: str) -> None:
    """Another template, and a report that agrees with it."""
    (out / "chat_template.jinja").write_text(text)
    edit_report(out, "tokenizer", "chat_template_sha256", value=hashlib.sha256(text.encode()).hexdigest())


def make_pad_eos(out: Path) -> None:
    edit(out / "tokenizer_config.json", lambda c: c.update(pad_token="</s>"))
    edit_report(out, "tokenizer", "pad_token", value="</s>")
    edit_report(out, "tokenizer", "pad_token_id", value=report(out)["tokenizer"]["eos_token_id"])


def remove_pad(out: Path) -> None:
    edit(out / "tokenizer_config.json", lambda c: c.pop("pad_token"))
    edit_report(out, "tokenizer", "pad_token", value=None)
    edit_report(out, "tokenizer", "pad_token_id", value=None)


def add_tokens(out: Path) -> None:
    """Eight tokens: 129 ids become 137, one more than there are rows."""

    def add(document: Any) -> None:
        last = document["added_tokens"][-1]
        document["added_tokens"] += [{**last, "id": 129 + n, "content": f"<more {n}>"} for n in range(8)]

    edit(out / "tokenizer.json", add)
    edit_report(out, "tokenizer", "size", value=137)


def shift_parameters(document: Any) -> None:
    by_dtype = document["parameters"]["by_dtype"]
    by_dtype["bfloat16"]["parameters"] -= 8
    by_dtype["float32"]["parameters"] += 8


def add_to_totals(document: Any) -> None:
    """One parameter more, wherever the report counts them."""
    parameters = document["parameters"]
    for row in (
        parameters,
        parameters["by_dtype"]["bfloat16"],
        parameters["in_training"]["bfloat16"],
        parameters["by_component"]["norm"],
    ):
        row["total" if row is parameters else "parameters"] += 1
    parameters["trainable"] += 1


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda out: edit(out / "config.json", lambda c: c.update(changes))


def adapter(**changes: Any) -> Callable[[Path], None]:
    return lambda out: edit(out / "adapter/adapter_config.json", lambda c: c.update(changes))


Q0, Q7 = b"layers.0.self_attn.q_proj", b"layers.7.self_attn.q_proj"

DEEPER: dict[str, tuple[str, str, str, Callable[[Path], Any]]] = {
    # what: output, the check that finds it, what it says of it, how it is planted; all hashes fit
    "both halves of a layer's adapter renamed": ("qlora", "adapter", "self_attn.q_proj.lora_A.weight` is missing", lambda o: rename_layer(o, Q0, b"layers.0.self_attn.x_proj")),
    "an adapter for a layer that is not there": ("lora", "adapter", "layers.7.self_attn.q_proj.lora_A.weight` belongs to no layer", lambda o: rename_layer(o, Q0, Q7)),
    "the same, seen when it is loaded": ("copied", "training step", "q_proj.lora_A.weight` is random", lambda o: rename_layer(o, Q0, Q7)),
    "adapters of two shapes exchanged": (
        "copied", "adapter", "k_proj.lora_B.weight` has the shape [64, 8], its layer takes [32, 8]",
        lambda o: (rename_layer(o, Q0, b"layers.0.self_attn.x_proj"), rename_layer(o, b"layers.0.self_attn.k_proj", Q0), rename_layer(o, b"layers.0.self_attn.x_proj", b"layers.0.self_attn.k_proj")),
    ),
    "rank-stabilised scaling": ("lora", "adapter", "`use_rslora` is `True`, not `False`", adapter(use_rslora=True)),
    "an adapter that saves the head": ("qlora", "adapter", "`modules_to_save` is `['lm_head']`, not `None`", adapter(modules_to_save=["lm_head"])),
    "an adapter of another task": ("lora", "adapter", "`task_type` is `SEQ_CLS`", adapter(task_type="SEQ_CLS")),
    "a setting that was not written": ("lora", "adapter", "`rank_pattern` is there, and was not written", adapter(rank_pattern={"q_proj": 4})),
    "hits edited": ("lora", "adapter", "`q_proj` hits 2 layers, the report says 3", lambda o: edit_report(o, "adapter", "targets", "q_proj", value=3)),
    "NaN in one row of the embedding": ("standard", "training step", "`model.embed_tokens.weight` is not finite", lambda o: fill_row(o, "embed_tokens.weight", 77, BF16_NAN)),
    "infinity in one row of a frozen embedding": ("qlora", "training step", "embed_tokens.weight` is not finite", lambda o: fill_row(o, "embed_tokens.weight", 77, b"\x80\x7f")),
    "an added row of the embedding zeroed": ("grown", "training step", "row 130 of the embeddings, which was added, is zero", lambda o: fill_row(o, "embed_tokens.weight", 130, bytes(1))),
    "an added row of the head zeroed": ("grown", "training step", "row 135 of the head, which was added, is zero", lambda o: fill_row(o, "lm_head.weight", 135, bytes(1))),
    "fewer layers": ("standard", "config", "unexpected tensor `model.layers.1.input_layernorm.weight`", config(num_hidden_layers=1)),
    "other heads": ("qlora", "config", "o_proj.weight` has shape [64, 64]", config(num_attention_heads=8)),
    "tied": ("standard", "config", "`config.json` has other settings than when this was prepared", config(tie_word_embeddings=True)),
    "another dtype": ("standard", "config", "`dtype` is torch.float16", config(dtype="float16")),
    "a tensor renamed": ("standard", "config", "lacks tensor `model.norm.weight`", lambda o: rename_tensor(o, next(p.name for p in shards(o) if b"model.norm.weight" in p.read_bytes()), b"model.norm.weight", b"model.nork.weight") or edit(o / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.nork.weight": i["weight_map"].pop("model.norm.weight")}))),
    "parameters counted for another dtype": ("qlora", "config", "parameters of bfloat16, the report says", lambda o: edit(o / "ftload_report.json", shift_parameters)),
    "a parameter too many, everywhere": ("standard", "config", "parameters of bfloat16, the report says", lambda o: edit(o / "ftload_report.json", add_to_totals)),
    "the same, in memory": ("standard", "training step", "parameters are trainable, the report says", lambda o: edit(o / "ftload_report.json", add_to_totals)),
    "a field of the report dropped": ("lora", "report", "`tokenizer.size` is missing", lambda o: edit(o / "ftload_report.json", lambda r: r["tokenizer"].pop("size"))),
    "a section of the report dropped": ("lora", "report", "`warnings` is missing", lambda o: edit(o / "ftload_report.json", lambda r: r.pop("warnings"))),
    "pad set to eos in the report too": ("lora", "tokenizer", "pad and eos are the same token, `</s>`", make_pad_eos),
    "pad removed from the report too": ("lora", "tokenizer", "there is no pad token", remove_pad),
    "more tokens than rows, as reported": ("qlora", "tokenizer", "token id 136 does not fit 136 embedding rows", add_tokens),
    "turns without an end": ("lora", "chat template", "ends with '.', which has none of the tokens", lambda o: set_template(o, "{% for m in messages %}{{ m['role'] + m['content'] + '.' }}{% endfor %}")),
    "turns that end with a token that is not eos": ("standard", "chat template", "ends with '<s>', which has none of the tokens", lambda o: set_template(o, "{% for m in messages %}{{ m['role'] + m['content'] + bos_token }}{% endfor %}")),
    "the answer forgotten": ("lora", "chat template", "it leaves out what the assistant says", lambda o: set_template(o, "{{ messages[0]['content'] + eos_token }}")),
    "a template that refuses": ("lora", "chat template", "it does not render a question and its answer", lambda o: set_template(o, "{{ raise_exception('no') }}")),
    "a template that is none": ("lora", "chat template", "it is not valid, line 1", lambda o: set_template(o, "{% for")),
    "a template that never ends": ("lora", "chat template", "does not end within", lambda o: set_template(o, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")),
}  # fmt: skip


def problems(result: Any) -> dict[str, str]:
    return {row["name"]: "\n".join(row["problems"]) for row in json.loads(result.out)["checks"] if not row["ok"]}


@pytest.mark.parametrize("fault", DEEPER)
def test_a_fault_behind_fitting_hashes_is_found(
    ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    kind, check, words, plant = DEEPER[fault]
    out = tmp_path / "out"
    shutil.copytree(outputs[kind], out)
    plant(out)
    make_hashes_fit(out)
    result = ftload("verify", out, "--json", *([] if check == "training step" else ["--quick"]))
    failed = problems(result)
    assert result.code == 7
    assert "files" not in failed
    assert words in failed.get(check, ""), failed


def test_an_adapter_of_another_rank(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(outputs["qlora"], tmp_path / "out")
    shutil.copy(outputs["rank 4"] / ADAPTER, tmp_path / "out" / ADAPTER)
    make_hashes_fit(tmp_path / "out")
    failed = problems(ftload("verify", tmp_path / "out", "--json", "--quick"))
    assert "q_proj.lora_A.weight` has the shape [4, 64], its layer takes [8, 64]" in failed["adapter"]


@pytest.mark.parametrize(
    ("plant", "hint"),
    [
        (make_pad_eos, "prepare it with another --tokenizer_name_or_path, or mend the model's own tokenizer first"),
        (lambda out: (make_pad_eos(out), config(hidden_act="gelu")(out)), "prepare it again with --overwrite"),
    ],
)
def test_the_hint_of_several_problems(
    ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, plant: Callable[[Path], Any], hint: str
) -> None:
    """What was written wrong would be written again; what is not what was written would not."""
    shutil.copytree(outputs["copied"], tmp_path / "out")
    plant(tmp_path / "out")
    make_hashes_fit(tmp_path / "out")
    result = ftload("verify", tmp_path / "out", "--quick")
    assert result.code == 7
    assert result.err.splitlines()[-1] == f"hint: {hint}"


@pytest.mark.parametrize("fault", ["a shard truncated", "the adapter missing", "a byte of tokenizer.json flipped"])
def test_what_can_not_be_loaded_is_no_bug(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, fault: str) -> None:
    kind, _, fit, plant = FAULTS[fault]
    shutil.copytree(outputs[kind], tmp_path / "out")
    plant(tmp_path / "out")
    if fit:
        make_hashes_fit(tmp_path / "out")
    result = ftload("verify", tmp_path / "out", "--json")
    assert result.code == 7
    assert problems(result)["training step"].startswith("it does not load: ")


def end_turns_with_another_token(model: Path) -> None:
    """As Llama 3 does: eos ends a text, and what ends a turn is named by generation_config.json alone."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}<|eot|>{% endfor %}"
    tokenizer.save_pretrained(model)
    stop = tokenizer.convert_tokens_to_ids("<|eot|>")
    edit(model / "generation_config.json", lambda c: c.update(eos_token_id=[c["eos_token_id"], stop]))


def add_tensor(name: str, source: str | None) -> Callable[[Path], None]:
    """One more tensor in the checkpoint: a copy of another, or eight ones."""

    def change(model: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        tensors[name] = torch.ones(8) if source is None else tensors[source].clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return change


HONEST: dict[str, tuple[str, Callable[[Path], None]]] = {
    "turns end as generation_config says": ("llama", end_turns_with_another_token),
    "rotary frequencies in the file": ("llama", add_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", None)),
    "the head of a tied model in the file": ("llama_tied", add_tensor("lm_head.weight", "model.embed_tokens.weight")),
    "a row that is zero": ("llama", lambda model: fill_row(model, "embed_tokens.weight", 3, bytes(1))),
}


@pytest.mark.parametrize("base", ["reference", "copy"])
@pytest.mark.parametrize("oddity", HONEST)
def test_an_honest_oddity_passes(ftload: Ftload, tmp_path: Path, oddity: str, base: str) -> None:
    architecture, change = HONEST[oddity]
    change(write(tmp_path / "model", architecture))
    done = prepare(tmp_path / "model", tmp_path / "out", "--use_lora", "--base", base)
    assert done["base"] == base
    result = ftload("verify", tmp_path / "out", "--json")
    assert result.code == 0, result.out


def test_a_place_that_is_no_directory_is_not_looked_for_on_a_hub(
    ftload: Ftload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text("{}")
    for place, words in (
        ("prepared", "does not exist"),
        ("org/model", "does not exist"),
        ("file.json", "is not a directory"),
    ):
        result = ftload("verify", place)
        assert (result.code, result.out) == (3, "")
        assert result.err.startswith(f"error: `{place}` {words}\nhint: give a directory")


def test_a_base_on_the_hub(tmp_path: Path) -> None:
    repository = write(tmp_path / "model")
    with LoopbackHub() as hub:
        hub.add("org/model", repository)

        def run(*words: str) -> tuple[int, str]:
            # in a process of its own: huggingface_hub reads its environment when it is imported
            done = subprocess.run(
                [sys.executable, "-m", "ftload.cli", *words],
                env=hub.env(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True,
            )  # fmt: skip
            return done.returncode, done.stdout

        assert run("prepare", "--model", "org/model", "--use_lora", *CHAT, "--output_dir", "out")[0] == 0
        hub.forget()
        assert run("verify", "out", "--quick")[0] == 0
        assert hub.sent("*.safetensors") <= 65536  # the header alone
        for key, value, words in (
            ("bytes", 1, "`model.safetensors` of the base has"),
            ("sha256", "0" * 64, "`model.safetensors` of the base has another sha256"),
        ):
            before = (tmp_path / "out/ftload_report.json").read_text()
            edit(
                tmp_path / "out/ftload_report.json",
                lambda r, k=key, v=value: next(
                    f for f in r["source"]["files"] if f["path"] == "model.safetensors"
                ).update({k: v}),
            )
            code, out = run("verify", "out", "--quick")
            assert code == 7
            assert words in out
            (tmp_path / "out/ftload_report.json").write_text(before)
        # a commit that the hub does not have
        for file, keys in (
            ("ftload_report.json", ("adapter", "revision")),
            ("adapter/adapter_config.json", ("revision",)),
        ):
            edit(
                tmp_path / "out" / file,
                lambda d, k=keys: (d["adapter"] if len(k) == 2 else d).update(revision="0" * 40),
            )
        make_hashes_fit(tmp_path / "out")
        code, out = run("verify", "out", "--quick", "--json")
        assert code == 7
        failed = {row["name"] for row in json.loads(out)["checks"] if not row["ok"]}
        assert "adapter" in failed
        assert "files" not in failed


def test_quick_reads_headers_alone(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path) -> None:
    """NaN behind fitting hashes is for the loaded model to find: the quick way says nothing of values."""
    shutil.copytree(outputs["standard"], tmp_path / "out")
    fill_row(tmp_path / "out", "embed_tokens.weight", 77, BF16_NAN)
    make_hashes_fit(tmp_path / "out")
    assert ftload("verify", tmp_path / "out", "--quick").code == 0
