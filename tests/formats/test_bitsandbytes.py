"""bitsandbytes checkpoints, as they are saved by transformers: decoded with `--dequantize`, or taken over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ftload.loaders.source.resolve import resolve_source
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ..cli.spoilt import edit_json
from ..conftest import Result
from ..parity.compare import read_tensors
from ..parity.models import write_model
from ..parity.reference import run_reference
from ..tokenizers import write_llama

Ftload = Callable[..., Result]
FILE = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
STATE = ".quant_state.bitsandbytes"
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 as bfloat16": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "nf4 as float32": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def write_quantised(directory: Path, kind: str, architecture: str = "llama", **settings: Any) -> None:
    """A tiny model that transformers quantised and saved."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = directory.with_name(f"{directory.name} in bfloat16")
    write_model(source, architecture, vocab_size=128, dtype="bfloat16")
    config = BitsAndBytesConfig(**KINDS[kind], **settings)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(directory)
    write_llama(directory)


def dequantised(directory: Path) -> dict[str, torch.Tensor]:
    """As transformers' `dequantize` gives it, in bfloat16."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # one row: where a block does not end with a row, its kernel for CPUs (0.50) takes another block's absmax
            state: Any = module.weight.quant_state
            state.shape, module.rows = torch.Size((1, math.prod(state.shape))), tuple(state.shape)
    shapes = {name: module.rows for name, module in model.named_modules() if hasattr(module, "rows")}
    values = model.dequantize().state_dict()
    for name, shape in shapes.items():
        values[f"{name}.weight"] = values[f"{name}.weight"].reshape(shape)
    return {name: value.bfloat16() for name, value in values.items()}


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(directory), None), allow_pickle=False, dequantize=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_decoded_is_what_transformers_dequantises(
    ftload: Ftload, tmp_path: Path, kind: str, architecture: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    write_quantised(model, kind, architecture)
    result = ftload("prepare", "--model", model, "--output_dir", out, "--dequantize")
    assert result.code == 0, result.err
    found, expected = read_tensors(out), dequantised(model)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    stored = json.loads((out / "ftload_report.json").read_text())["source"]["stored"]
    names = {"int8": ("bitsandbytes LLM.int8", "int8"), "fp4": ("bitsandbytes 4-bit", "fp4")}
    packed = {(row["format"], row["dtype"]) for row in stored if row["component"] in ("attention", "mlp")}
    assert {row for row in packed if row[0]} == {names.get(kind, ("bitsandbytes 4-bit", "nf4"))}
    assert {row["dtype"] for row in stored if row["format"] is None} == {"bfloat16"}
    assert sum(row["parameters"] for row in stored) == sum(meta.parameters for meta in opened(model).tensors.values())
    assert f"parameters stored as {names.get(kind, ('bitsandbytes 4-bit',))[0]}" in result.out
    layers = {name for name, meta in opened(model).tensors.items() if hasattr(meta, "parts")}
    assert len(layers) == (14 if architecture == "llama" else 8)
    for name, value in found.items():
        # a Conv1D holds (in, out); transformers' `dequantize` leaves a linear layer in its place
        turned = architecture == "gpt2" and name in layers
        reference = expected[name].T if turned else expected[name]
        if value.shape[0] > reference.shape[0]:  # the embeddings have grown
            value = value[: reference.shape[0]]
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, reference), name
    assert ftload("verify", out).code == 0


@pytest.mark.parametrize("kind", ["nf4 as bfloat16", "fp4", "int8"])
def test_what_was_decoded_is_quantised_anew(ftload: Ftload, tmp_path: Path, kind: str) -> None:
    model, plain, out, reference = (tmp_path / name for name in ("model", "plain", "out", "reference"))
    write_quantised(model, kind)
    assert ftload("prepare", "--model", model, "--output_dir", plain, "--dequantize").code == 0
    (plain / "adapter").mkdir(exist_ok=True)
    run_reference(plain, reference, strategy="qlora", tokenizer_size=0)
    result = ftload("prepare", "--model", model, "--output_dir", out, "--dequantize", "--use_qlora", "--json")
    assert result.code == 0, result.err
    found, expected = read_tensors(out), read_tensors(reference)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "embed" not in name and "head" not in name:
            assert torch.equal(found[name], value), name
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_quant_storage"]) == ("nf4", "uint8")
    assert json.loads(result.out)["quantization"]["coverage_percent"] == 100.0


def test_layers_that_config_json_excepts_stay_as_they_are(ftload: Ftload, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    skipped = ["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn"]
    write_quantised(model, "nf4", llm_int8_skip_modules=skipped)
    words = ["--model", model, "--use_qlora", "--output_dir", out]
    refused = ftload("prepare", *words)
    assert refused.code == 5
    assert refused.err == (
        "error: 50.0 % of the weight matrices would be 4-bit, `--min_quantized` asks for 90 %: bitsandbytes leaves "
        "attention (4 tensors, 24,576 bytes), mlp (3 tensors, 36,864 bytes)\n"
        "hint: pass --min_quantized 50 to take that, or --dequantize to quantise all anew\n"
    )
    result = ftload("prepare", *words, "--min_quantized", "50", "--json")
    assert result.code == 0, result.err
    found, stored = read_tensors(out), load_file(model / FILE)
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        if "embed" not in name and "head" not in name:
            assert torch.equal(found[name], value), name
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == skipped
    assert json.loads(result.out)["parameters"]["by_dtype"]["nf4"]["tensors"] == 7
    assert ftload("verify", out).code == 0

    result = ftload("prepare", *words, "--dequantize", "--overwrite", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["quantization"]["coverage_percent"] == 100.0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] is None


@pytest.mark.parametrize("names", ["lm_head", [1], ["("], {"lm_head": 1}])
def test_exceptions_that_name_no_modules(ftload: Ftload, tmp_path: Path, names: object) -> None:
    model = tmp_path / "model"
    write_quantised(model, "nf4")
    section = json.loads((model / "config.json").read_text())["quantization_config"]
    edit_json(model / "config.json", quantization_config={**section, "llm_int8_skip_modules": names})
    result = ftload("plan", "--model", model, "--use_qlora")
    assert (result.code, result.err) == (
        4,
        f"error: `llm_int8_skip_modules` of config.json is {names!r}, not a list of modules\n"
        "hint: config.json and the weights must belong together\n",
    )


@pytest.mark.parametrize("kind", ["nf4 as bfloat16", "nf4 as float32"])
def test_codes_under_any_dtype_are_taken_over(ftload: Ftload, tmp_path: Path, kind: str) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    write_quantised(model, kind)
    result = ftload("prepare", "--model", model, "--output_dir", out, "--use_qlora", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["quantization"]["storage_dtype"] == kind.removeprefix("nf4 as ")
    found, stored = read_tensors(out), load_file(model / FILE)
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        if "embed" not in name and "head" not in name:
            same = found[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))
            assert found[name].dtype == value.dtype, name
            assert same, name
    counted = report["parameters"]["by_dtype"]["nf4"]
    assert (counted["tensors"], counted["parameters"]) == (14, 61_440)
    done = ftload("verify", out)
    assert done.code == 0, done.err
    (inspected,) = (json.loads(ftload("inspect", directory, "--json").out) for directory in (model,))
    assert inspected["by_dtype"]["nf4"]["parameters"] == 61_440


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 80))
def test_8_bits_are_decoded_as_bitsandbytes_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, columns: int
) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    generator = torch.Generator().manual_seed(rows * 100 + columns)
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, generator=generator) * 10 ** data.draw(st.integers(-6, 4))
    directory = tmp_path_factory.mktemp("int8")
    save_file({"W.weight": codes, "W.SCB": scales}, directory / FILE)
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"load_in_8bit": True}}))
    expected = int8_vectorwise_dequant(codes, scales).bfloat16()
    checkpoint = opened(directory)
    (tensor,) = checkpoint.tensors.values()
    assert torch.equal(checkpoint.read(tensor), expected)
    begin = data.draw(st.integers(0, rows * columns))
    end = data.draw(st.integers(begin, rows * columns))
    assert torch.equal(checkpoint.values(tensor, begin, end), expected.flatten()[begin:end])
    elements = data.draw(st.integers(1, 200))
    assert torch.equal(torch.cat(list(checkpoint.chunks(tensor, elements))), expected.flatten())


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / FILE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FILE)

    return apply


def set_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.SCB"][3] = math.nan


SPOILT: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "8 bits without a weight": ("int8", lambda t: t.pop(f"{Q}.weight"), f"tensor `{Q}.SCB` of `{FILE}` has no 8-bit w"),
    "scales of another size": (
        "int8", lambda t: t.update({f"{Q}.SCB": torch.ones(63)}),
        f"tensor `{Q}.SCB` of `{FILE}` is F32 [63], where `{Q}.weight` needs F32 [64]",
    ),
    "scales of another dtype": (
        "int8", lambda t: t.update({f"{Q}.SCB": torch.ones(64, dtype=torch.float16)}), "is F16 [64], where",
    ),
    "NaN in scales": ("int8", set_scale, f"tensor `{Q}.SCB` of `{FILE}` holds NaN or infinity"),
    "another order": (
        "int8", lambda t: t.update({f"{Q}.weight_format": torch.tensor(1, dtype=torch.uint8)}),
        f"tensor `{Q}.weight_format` of `{FILE}` tells of another order",
    ),
    "missing scales": (
        "int8", lambda t: t.pop(f"{Q}.SCB"), f"tensor `{Q}.SCB` of an 8-bit weight is missing",
    ),
    "codes cut short": (
        "nf4 as bfloat16", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1]}),
        f"tensor `{Q}.weight` does not have the size that its 4-bit state tells",
    ),
    "FP4 without its absmax": ("fp4", lambda t: t.pop(f"{Q}.weight.absmax"), f"`{Q}.weight.absmax` of a 4-bit weight"),
    "a type of its own": (
        "fp4",
        lambda t: t.update({f"{Q}.weight{STATE}__af4": t.pop(f"{Q}.weight{STATE}__fp4")}),
        "is not a bitsandbytes state",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files_are_told(ftload: Ftload, tmp_path: Path, case: str) -> None:
    kind, change, words = SPOILT[case]
    write_quantised(tmp_path / "model", kind)
    edit(change)(tmp_path / "model")
    result = ftload("prepare", "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--dequantize")
    assert result.code == 4, result.err
    assert words in result.err
    assert not (tmp_path / "out").exists()


def test_what_must_be_decoded_says_so(ftload: Ftload, tmp_path: Path) -> None:
    write_quantised(tmp_path / "model", "int8")
    result = ftload("prepare", "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--use_qlora")
    assert result.code == 4
    assert "is stored in 8 bits (LLM.int8)" in result.err
    assert "hint: decode it with --dequantize" in result.err
    found = json.loads(ftload("inspect", tmp_path / "model", "--json").out)["by_dtype"]
    assert found["int8"]["parameters"] == 61_440


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_what_trains_as_it_is_is_taken_over(ftload: Ftload, tmp_path: Path, kind: str) -> None:
    write_quantised(tmp_path / "model", kind)
    result = ftload(
        "prepare", "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--use_qlora", "--lora_rank", "4"
    )
    assert result.code == 0, result.err
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "model")
    quantised = [name for name in expected if ".layers." in name and "norm" not in name]
    assert len(quantised) == 14 * (6 if kind == "nf4" else 4)
    assert all(torch.equal(found[name], expected[name]) for name in quantised)
    assert json.loads((tmp_path / "out/ftload_report.json").read_text())["quantization"]["quant_type"] == kind
    assert ftload("verify", tmp_path / "out").code == 0
