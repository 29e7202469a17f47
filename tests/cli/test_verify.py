# ruff: noqa: E501 -- a fault a line
"""`ftload verify` passes every honest output and finds every planted fault, each by the check that is there for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Result
from ..parity.models import write_model
from ..tokenizers import write_llama
from .runs import prepare

Ftload = Callable[..., Result]
SHARDS = ["--max_shard_size", "60KB"]
CHAT = ["--chat_template_name", "tulu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bfloat16, a token short: embeddings don't grow."""
    directory = tmp_path_factory.mktemp("source") / "model"
    write_model(directory, "llama", vocab_size=136, dtype="bfloat16")
    write_llama(directory, vocab_size=128)
    return directory


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    kinds = {
        "standard": SHARDS,
        "lora": ["--use_lora"],
        "qlora": ["--use_qlora"],
    }
    for name, flags in kinds.items():
        prepare(model, root / name, *CHAT, *flags)
    return {name: root / name for name in kinds}


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "mixtral", "qwen3", "gemma2", "phi3", "olmoe"])
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="standard"),
        pytest.param(["--use_liger_kernel", *SHARDS], id="liger"),
        pytest.param(["--use_lora", "--gradient_checkpointing"], id="lora"),
        pytest.param(["--use_qlora", "--min_quantized", "0", *SHARDS], id="qlora"),
    ],
)
@pytest.mark.parametrize("rows", [128, 136])
def test_honest_outputs_pass(ftload: Ftload, tmp_path: Path, architecture: str, flags: list[str], rows: int) -> None:
    write_model(tmp_path / "model", architecture, vocab_size=rows, dtype="bfloat16")
    write_llama(tmp_path / "model", vocab_size=128)  # and a pad token: 128 rows have to grow
    # where the template's turns end; the tiny GPT-2 would stop at a token that its tokenizer takes for unknown
    edit(tmp_path / "model/generation_config.json", lambda c: c.update(eos_token_id=2))
    prepare(tmp_path / "model", tmp_path / "out", *CHAT, *flags)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    result = ftload("verify", tmp_path / "moved", "--json")
    assert result.code == 0, result.out
    document = json.loads(result.out)
    assert document["ok"]
    assert [check["name"] for check in document["checks"]] == [
        "report", "files", "tensors", "config", "tokenizer", "chat template", "adapter", "training step",
    ]  # fmt: skip


def test_what_it_prints(ftload: Ftload, outputs: dict[str, Path]) -> None:
    result = ftload("verify", outputs["qlora"])
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("ok     report        qlora, ")
    assert lines[-2].startswith("ok     training step loss ")
    assert lines[-1] == f"{outputs['qlora']} verifies"


def test_quick_does_not_load(ftload: Ftload, outputs: dict[str, Path]) -> None:
    result = ftload("verify", outputs["lora"], "--quick", "--json")
    assert result.code == 0
    assert "training step" not in [check["name"] for check in json.loads(result.out)["checks"]]


# the faults: each is planted in a copy, and where the report's sizes and hashes would give it away they are made to
# fit, so that the check behind them has to find it


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "ftload_report.json").read_text())


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_report(out: Path, *keys: str, value: Any) -> None:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    edit(out / "ftload_report.json", change)


def make_hashes_fit(out: Path) -> None:
    def change(document: Any) -> None:
        document["files"] = [
            {
                "path": path.relative_to(out).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != "ftload_report.json"
        ]

    edit(out / "ftload_report.json", change)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def tensor_place(path: Path, ending: str) -> tuple[int, int]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    begin, end = next(entry["data_offsets"] for name, entry in header.items() if name.endswith(ending))
    return 8 + length + begin, 8 + length + end


def overwrite(out: Path, file: str, ending: str, content: bytes) -> None:
    """Fill a tensor with repetitions of some bytes."""
    path = next(path for path in sorted(out.glob(file)) if ending.encode() in path.read_bytes())
    begin, end = tensor_place(path, ending)
    data = bytearray(path.read_bytes())
    data[begin:end] = (content * (end - begin))[: end - begin]
    path.write_bytes(data)


def rename_tensor(out: Path, file: str, old: bytes, new: bytes) -> None:
    path = out / file
    data = path.read_bytes()
    assert len(old) == len(new)
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def swap(first: Path, second: Path) -> None:
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("model-*.safetensors"))


ADAPTER = "adapter/adapter_model.safetensors"
BF16_NAN = b"\xc0\x7f"

FAULTS: dict[str, tuple[str, str, bool, Callable[[Path], Any]]] = {
    # what: output, the check that finds it, whether the hashes are made to fit, how it is planted
    "a byte of a weight flipped": ("standard", "files", False, lambda o: flip(shards(o)[0], -1)),
    "a byte of a 4-bit weight flipped": ("qlora", "files", False, lambda o: flip(o / "model.safetensors", -1)),
    "a byte of the adapter flipped": ("qlora", "files", False, lambda o: flip(o / ADAPTER, -1)),
    "a byte of tokenizer.json flipped": ("lora", "files", False, lambda o: flip(o / "tokenizer.json", -3)),
    "a row of the embedding zeroed": (
        "standard", "files", False, lambda o: overwrite(o, "model-*", "embed_tokens.weight", bytes(1)),
    ),
    "two shards swapped": ("standard", "files", False, lambda o: swap(*shards(o)[1:3])),
    "a shard truncated": ("standard", "files", False, lambda o: shards(o)[0].write_bytes(shards(o)[0].read_bytes()[:-9])),
    "a shard missing": ("standard", "files", False, lambda o: shards(o)[1].unlink()),
    "a stale shard added": ("standard", "files", False, lambda o: shutil.copy(shards(o)[0], o / "model-00099-of-00099.safetensors")),
    "a stale single file beside shards": ("standard", "files", False, lambda o: shutil.copy(shards(o)[0], o / "model.safetensors")),
    "a pickle added": ("lora", "files", False, lambda o: (o / "pytorch_model.bin").write_bytes(b"x")),
    "the adapter missing": ("qlora", "adapter", True, lambda o: (o / ADAPTER).unlink()),
    "the report's total edited": ("lora", "report", False, lambda o: edit_report(o, "parameters", "total", value=1)),
    "the report's trainable edited": ("qlora", "report", False, lambda o: edit_report(o, "parameters", "trainable", value=7)),
    "a shard missing, hashes fit": ("standard", "tensors", True, lambda o: shards(o)[1].unlink()),
    "two shards swapped, hashes fit": ("standard", "tensors", True, lambda o: swap(*shards(o)[1:3])),
    "an index that points elsewhere": (
        "standard", "tensors", True,
        lambda o: edit(o / "model.safetensors.index.json", lambda i: i["weight_map"].update({"lm_head.weight": shards(o)[0].name})),
    ),
    "a tensor renamed": ("qlora", "training step", True, lambda o: rename_tensor(o, "model.safetensors", b"model.norm.weight", b"model.nork.weight")),
    "vocab_size changed": ("standard", "config", True, lambda o: edit(o / "config.json", lambda c: c.update(vocab_size=128))),
    "quantization_config removed": ("qlora", "config", True, lambda o: edit(o / "config.json", lambda c: c.pop("quantization_config"))),
    "quantization_config of another type": (
        "qlora", "config", True, lambda o: edit(o / "config.json", lambda c: c["quantization_config"].update(bnb_4bit_quant_type="fp4")),
    ),
    "another architecture": ("standard", "config", True, lambda o: edit(o / "config.json", lambda c: c.update(model_type="mistral"))),
    "config.json is no JSON": ("standard", "config", True, lambda o: (o / "config.json").write_text("{")),
    "pad set to eos": ("lora", "tokenizer", True, lambda o: edit(o / "tokenizer_config.json", lambda c: c.update(pad_token="</s>"))),
    "pad removed": ("lora", "tokenizer", True, lambda o: edit(o / "tokenizer_config.json", lambda c: c.pop("pad_token"))),
    "eos changed": ("standard", "tokenizer", True, lambda o: edit(o / "tokenizer_config.json", lambda c: c.update(eos_token="<s>"))),
    "a token that the embedding has no row for": (
        "qlora", "tokenizer", True,
        lambda o: edit(o / "tokenizer.json", lambda t: t["added_tokens"].append({**t["added_tokens"][-1], "id": 136, "content": "<more>"})),
    ),
    "the tokenizer gone": ("standard", "tokenizer", True, lambda o: (o / "tokenizer.json").write_text("[]")),
    "the template emptied": ("lora", "chat template", True, lambda o: (o / "chat_template.jinja").write_text("")),
    "a template without an end": (
        "lora", "chat template", True,
        lambda o: (o / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] + m['content'] + '.' }}{% endfor %}"),
    ),
    "a template that forgets the answer": (
        "lora", "chat template", True, lambda o: (o / "chat_template.jinja").write_text("{{ messages[0]['content'] + eos_token }}"),
    ),
    "a template that raises": ("lora", "chat template", True, lambda o: (o / "chat_template.jinja").write_text("{{ raise_exception('no') }}")),
    "a template that is no template": ("lora", "chat template", True, lambda o: (o / "chat_template.jinja").write_text("{% for")),
    "the adapter's rank edited": ("lora", "adapter", True, lambda o: edit(o / "adapter/adapter_config.json", lambda c: c.update(r=4))),
    "the adapter's alpha edited": ("lora", "adapter", True, lambda o: edit(o / "adapter/adapter_config.json", lambda c: c.update(lora_alpha=1))),
    "the adapter's base edited": (
        "lora", "adapter", True, lambda o: edit(o / "adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path="gpt2")),
    ),
    "a target dropped": ("qlora", "adapter", True, lambda o: edit(o / "adapter/adapter_config.json", lambda c: c["target_modules"].pop())),
    "an adapter tensor renamed": (
        "qlora", "adapter", True, lambda o: rename_tensor(o, ADAPTER, b"layers.0.self_attn.q_proj.lora_A", b"layers.0.self_attn.x_proj.lora_A"),
    ),
    "NaN in a norm": ("standard", "training step", True, lambda o: overwrite(o, "model-*", "input_layernorm.weight", BF16_NAN)),
    "NaN in an embedding": ("qlora", "training step", True, lambda o: overwrite(o, "*.safetensors", "embed_tokens.weight", BF16_NAN)),
    "NaN in the adapter": ("qlora", "training step", True, lambda o: overwrite(o, ADAPTER, "q_proj.lora_A.weight", b"\x00\x00\xc0\x7f")),
    "LoRA B not zero": ("qlora", "training step", True, lambda o: overwrite(o, ADAPTER, "v_proj.lora_B.weight", b"\x00\x00\x80\x3c")),
    "LoRA A zero: B can't move": ("qlora", "training step", True, lambda o: overwrite(o, ADAPTER, "k_proj.lora_A.weight", bytes(1))),
    "in_training edited": (
        "qlora", "training step", False,
        lambda o: edit(o / "ftload_report.json", lambda r: r["parameters"]["in_training"].update(bfloat16=r["parameters"]["in_training"].pop("float32"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(ftload: Ftload, outputs: dict[str, Path], tmp_path: Path, fault: str) -> None:
    kind, check, fit, plant = FAULTS[fault]
    out = tmp_path / "out"
    shutil.copytree(outputs[kind], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    plant(out)
    assert before != {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if fit:
        make_hashes_fit(out)
    flags = [] if check == "training step" else ["--quick"]
    result = ftload("verify", out, "--json", *flags)
    document = json.loads(result.out)
    failed = [row["name"] for row in document["checks"] if not row["ok"]]
    assert result.code == 7
    assert check in failed, document
    if fit:
        assert "files" not in failed
    assert document["error"]["code"] == 7
    assert f"{check}: " in document["error"]["message"]
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 2  # the error and its hint


def test_a_referenced_base_that_changed(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    prepare(tmp_path / "model", tmp_path / "out", "--use_lora")
    assert ftload("verify", tmp_path / "out", "--quick").code == 0
    write_model(tmp_path / "other", "llama", vocab_size=144, dtype="bfloat16")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "model/model.safetensors")
    result = ftload("verify", tmp_path / "out", "--quick")
    assert result.code == 7
    assert "`model.safetensors` of the base has" in result.err
    shutil.rmtree(tmp_path / "model")
    result = ftload("verify", tmp_path / "out", "--quick")
    assert result.code == 7
    assert f"`{tmp_path / 'model'}` does not exist" in result.err
    assert "prepare it again" not in result.err.splitlines()[-1]  # there is nothing that it could be prepared from


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": "0"}', '{"schema_version": "1"}'])
def test_a_report_that_is_none(ftload: Ftload, tmp_path: Path, content: str) -> None:
    (tmp_path / "ftload_report.json").write_text(content)
    result = ftload("verify", tmp_path)
    assert result.code == (7 if content.endswith('"1"}') else 4)
    assert "Traceback" not in result.err


def test_not_a_prepared_directory(ftload: Ftload, model: Path, tmp_path: Path) -> None:
    missing = ftload("verify", tmp_path / "nothing")
    assert missing.code == 3
    assert missing.err.startswith(f"error: `{tmp_path / 'nothing'}` does not exist")
    other = ftload("verify", model, "--json")
    assert other.code == 4
    assert json.loads(other.out)["error"]["hint"] == "give a directory that `ftload prepare` wrote"
