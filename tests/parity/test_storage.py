"""The dtypes of 4-bit weights, by the names of `BitsAndBytesConfig`: what ftload writes, and what the libraries do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..cli.spoilt import edit_json
from ..conftest import Result
from ..experts.checkpoints import random_model
from ..tokenizers import write_llama
from .compare import assert_same_adapter_config, assert_same_json, assert_same_tensors, read_tensors
from .models import write_model
from .reference import REFERENCE_TARGETS, run_reference
from .test_parity import TARGETS

Ftload = Callable[..., Result]
QLORA = ("--use_qlora", "--lora_rank", "8", "--embedding_init", "reference", "--min_quantized", "0", "--quiet")
SETTINGS = [
    ("bfloat16", None), ("float16", None), ("uint8", "float16"), (None, "float32"), ("bfloat16", "bfloat16"),
    ("float16", "float16"),
]  # fmt: skip


def flags(storage: str | None, compute: str | None) -> list[str]:
    given = {"--bnb_4bit_quant_storage": storage, "--bnb_4bit_compute_dtype": compute}
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def source_of(directory: Path, architecture: str = "llama", *, rows: int = 128) -> Path:
    write_model(directory, architecture, vocab_size=rows, dtype="float32", shards=True)
    write_llama(directory, vocab_size=128)
    return directory


def prepared(ftload: Ftload, source: Path, out: Path, *words: str) -> dict[str, Any]:
    result = ftload("prepare", "--model", source, "--output_dir", out, *QLORA, *words)
    assert result.code == 0, result.err
    return json.loads((out / "ftload_report.json").read_text())


@pytest.mark.parametrize(("storage", "compute"), SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_dtypes_are_the_libraries_own(
    ftload: Ftload, tmp_path: Path, architecture: str, storage: str | None, compute: str | None
) -> None:
    source, out, reference = source_of(tmp_path / "source", architecture), tmp_path / "out", tmp_path / "reference"
    report = prepared(ftload, source, out, *flags(storage, compute))
    given = {"bnb_4bit_quant_storage": storage, "bnb_4bit_compute_dtype": compute}
    run_reference(
        source, reference, strategy="qlora", tokenizer_size=129, targets=TARGETS.get(architecture, REFERENCE_TARGETS),
        four_bit={name: getattr(torch, value) for name, value in given.items() if value is not None},
    )  # fmt: skip
    assert_same_tensors(out, reference)
    for name in ("config.json", "generation_config.json"):
        assert_same_json(out / name, reference / name, pad_token_id=128)
    assert_same_tensors(out / "adapter", reference / "adapter")
    assert_same_adapter_config(out / "adapter", reference / "adapter")
    said = report["quantization"]
    assert (said["storage_dtype"], said["compute_dtype"]) == (storage or "uint8", compute or "bfloat16")
    codes = {tensor.dtype for name, tensor in read_tensors(out).items() if f"{name}.absmax" in read_tensors(out)}
    assert codes == {getattr(torch, said["storage_dtype"])}
    assert ftload("verify", out).code == 0


KINDS = [("fp4", True), ("fp4", False), ("nf4", False)]


def kind_flags(quant_type: str, double: bool) -> list[str]:
    return ["--bnb_4bit_quant_type", quant_type, "--bnb_4bit_use_double_quant", str(double).lower()]


@pytest.mark.parametrize(("quant_type", "double"), KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_types_and_statistics_are_the_libraries_own(
    ftload: Ftload, tmp_path: Path, architecture: str, quant_type: str, double: bool
) -> None:
    source, out, reference = source_of(tmp_path / "source", architecture), tmp_path / "out", tmp_path / "reference"
    report = prepared(ftload, source, out, *kind_flags(quant_type, double))
    run_reference(
        source, reference, strategy="qlora", tokenizer_size=129, targets=TARGETS.get(architecture, REFERENCE_TARGETS),
        four_bit={"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double},
    )  # fmt: skip
    assert_same_tensors(out, reference)
    for name in ("config.json", "generation_config.json"):
        assert_same_json(out / name, reference / name, pad_token_id=128)
    assert_same_tensors(out / "adapter", reference / "adapter")
    assert_same_adapter_config(out / "adapter", reference / "adapter")
    said = report["quantization"]
    assert (said["quant_type"], said["double_quant"]) == (quant_type, double)
    # of a float32 absmax a block, 8 bits and a float32 for 256 blocks are left
    quantised = report["parameters"]["by_dtype"][quant_type]
    if architecture == "llama":
        statistics = quantised["bytes"] - quantised["parameters"] // 2 - 14 * 64
        blocks = quantised["parameters"] // 64
        assert statistics == (blocks + 14 * (1024 + 4) if double else 4 * blocks)
    checked = ftload("verify", out)
    assert checked.code == 0, checked.out

    # taken over as it is; asked for otherwise, refused
    again = prepared(ftload, out, tmp_path / "again", "--tokenizer_name_or_path", str(source))
    assert_same_tensors(tmp_path / "again", out)
    assert again["quantization"] == said
    other = "nf4" if quant_type == "fp4" else "fp4"
    refused = ftload(
        "prepare", "--model", out, "--output_dir", tmp_path / "other", *QLORA, "--bnb_4bit_quant_type", other
    )
    assert (refused.code, refused.err) == (
        2,
        f"error: `--bnb_4bit_quant_type` is {other}, and the checkpoint's weights are quantised already, with "
        f"{quant_type}: they are taken over as they are\nhint: leave it out, or decode them with --dequantize\n",
    )
    refused = ftload(
        "prepare", "--model", out, "--output_dir", tmp_path / "other", *QLORA, "--bnb_4bit_use_double_quant",
        str(not double).lower(),
    )  # fmt: skip
    assert refused.code == 2
    assert refused.err.startswith(
        f"error: `--bnb_4bit_use_double_quant` is {str(not double).lower()}, and the checkpoint's weights are "
        f"quantised already, with {str(double).lower()}: they are taken over as they are\n"
    )
    decoded = ftload(
        "prepare", "--model", out, "--output_dir", tmp_path / "other", *QLORA, "--bnb_4bit_quant_type", other,
        "--dequantize",
    )  # fmt: skip
    assert decoded.code == 0, decoded.err


@pytest.mark.parametrize(
    ("change", "said"),
    [({"bnb_4bit_quant_type": "nf4"}, "nf4 with double"), ({"bnb_4bit_use_double_quant": False}, "fp4 with single")],
)
def test_settings_that_the_weights_do_not_have(
    ftload: Ftload, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    prepared(ftload, source_of(tmp_path / "source"), tmp_path / "out", *kind_flags("fp4", True))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "out/config.json", quantization_config={**config, **change})
    result = ftload("prepare", "--model", tmp_path / "out", "--output_dir", tmp_path / "again", *QLORA)
    assert result.code == 4
    assert result.err.startswith(
        "error: tensor `model.layers.0.self_attn.q_proj.weight` is stored in fp4 with double quantisation, config.json "
        f"says {said} quantisation\n"
    )


def test_a_checkpoint_in_4_bits_keeps_its_codes_and_gets_the_dtypes_that_are_asked_for(
    ftload: Ftload, tmp_path: Path
) -> None:
    """Nothing is quantised anew; without a flag all stays as it is."""
    source = source_of(tmp_path / "source", rows=144)
    made = {
        (storage, compute): tmp_path / f"{storage} {compute}"
        for storage, compute in (("uint8", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32"))
    }
    for (storage, compute), directory in made.items():
        prepared(ftload, source, directory, *flags(storage, compute))
    for (storage, compute), directory in made.items():
        for number, (asked, asked_compute) in enumerate([(None, None), ("float16", None), *made]):
            out = tmp_path / f"{directory.name} {number}"
            report = prepared(ftload, directory, out, *flags(asked, asked_compute))
            expected = (asked or storage, asked_compute or compute)
            assert (report["quantization"]["storage_dtype"], report["quantization"]["compute_dtype"]) == expected
            same = next((one for one in made if one == expected), None)
            if same is not None:
                assert_same_tensors(out, made[same])
                assert_same_json(out / "config.json", made[same] / "config.json")
                assert_same_tensors(out / "adapter", made[same] / "adapter")
    assert ftload("verify", out).code == 0


def test_pickled_codes_are_taken_over_under_another_dtype(ftload: Ftload, tmp_path: Path) -> None:
    source, first, out, pickled = (tmp_path / name for name in ("source", "first", "out", "pickled"))
    prepared(ftload, source_of(source, rows=144), first)
    shutil.copytree(first, pickled, ignore=shutil.ignore_patterns("*.safetensors", "adapter", "ftload_report.json"))
    torch.save(read_tensors(first), pickled / "pytorch_model.bin")
    prepared(ftload, pickled, out, "--allow_pickle", *flags("bfloat16", None))
    prepared(ftload, source, tmp_path / "expected", *flags("bfloat16", None))
    assert_same_tensors(out, tmp_path / "expected")


def test_codes_that_are_no_whole_elements_are_refused(ftload: Ftload, tmp_path: Path) -> None:
    """bitsandbytes fails as well, on a CPU."""
    from bitsandbytes.functional import quantize_4bit

    source, out = tmp_path / "source", tmp_path / "out"
    random_model("qwen3_moe_odd", vocab_size=144).save_pretrained(source)
    write_llama(source, vocab_size=128)
    with pytest.raises(RuntimeError, match="must be divisible by 2"):
        quantize_4bit(torch.ones(5, 26, 35), quant_type="nf4", quant_storage=torch.bfloat16)
    for command in ("plan", "prepare"):
        result = ftload(command, "--model", source, "--output_dir", out, *QLORA, *flags("bfloat16", None))
        assert (result.code, result.err) == (
            2,
            "error: tensor `model.layers.0.mlp.experts.gate_up_proj`: its 2,275 bytes of 4-bit codes are no whole "
            "number of bfloat16, under which bitsandbytes would store them\n"
            "hint: pass --bnb_4bit_quant_storage uint8\n",
        )
    assert prepared(ftload, source, out, *flags("uint8", None))["quantization"]["storage_dtype"] == "uint8"


@pytest.mark.parametrize("strategy", [[], ["--use_lora"], ["--use_liger_kernel"]])
@pytest.mark.parametrize("name", ["bnb_4bit_quant_storage", "bnb_4bit_compute_dtype"])
def test_they_are_for_4_bit_weights_alone(ftload: Ftload, tmp_path: Path, name: str, strategy: list[str]) -> None:
    result = ftload(
        "prepare", "--model", tmp_path, "--output_dir", tmp_path / "out", *strategy, f"--{name}", "bfloat16"
    )
    assert (result.code, result.err) == (
        2,
        f"error: `--{name}` is for 4-bit weights\nhint: pass --use_qlora as well\n",
    )


@pytest.mark.parametrize("name", ["bnb_4bit_quant_storage", "bnb_4bit_compute_dtype"])
def test_a_stored_setting_that_is_no_dtype(ftload: Ftload, tmp_path: Path, name: str) -> None:
    first, out, default = tmp_path / "first", tmp_path / "out", "uint8" if "storage" in name else "bfloat16"
    prepared(ftload, source_of(tmp_path / "source"), first)
    section = config_of(first)
    for value in ("float", 3, ["bfloat16"], {}):
        edit_json(first / "config.json", quantization_config={**section, name: value})
        result = ftload("plan", "--model", first, "--use_qlora")
        assert (result.code, result.err) == (
            4,
            f"error: `{name}` of config.json is {value!r}, which is no dtype\nhint: pass --{name} {default}\n",
        )
    assert ftload("plan", "--model", first, "--use_qlora", f"--{name}", default).code == 0
    # null is transformers' own default
    edit_json(first / "config.json", quantization_config={**section, name: None})
    prepared(ftload, first, out)
    assert config_of(out)[name] == ("uint8" if "storage" in name else "float32")


def test_another_dtype_is_another_output(ftload: Ftload, tmp_path: Path) -> None:
    source, out = source_of(tmp_path / "source"), tmp_path / "out"
    words = ["prepare", "--model", source, "--output_dir", out, *QLORA]
    assert ftload(*words, *flags("bfloat16", None)).code == 0
    assert "up to date" in ftload(*words[:-1], *flags("bfloat16", None)).out
    assert ftload(*words, *flags("float16", None)).code == 8
    assert ftload(*words, *flags("bfloat16", "float16")).code == 8


def test_what_is_stored_is_told(ftload: Ftload, tmp_path: Path) -> None:
    """`inspect`, and what `verify` finds where config.json or the codes are not as the report says."""
    out = tmp_path / "out"
    report = prepared(ftload, source_of(tmp_path / "source"), out, *flags("bfloat16", "float16"))
    inspected = json.loads(ftload("inspect", out, "--json").out)
    counted = report["parameters"]["by_dtype"]["nf4"]
    assert (counted["tensors"], counted["parameters"]) == (14, 61_440)
    assert inspected["by_dtype"]["nf4"] == counted
    edit_json(out / "config.json", quantization_config={**config_of(out), "bnb_4bit_quant_storage": "float16"})
    found = ftload("verify", out)
    assert found.code == 7
    assert "`bnb_4bit_quant_storage` is float16, the report says bfloat16" in found.err + found.out


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def test_an_adapter_is_merged_into_codes_under_any_dtype(ftload: Ftload, tmp_path: Path) -> None:
    source, outs = source_of(tmp_path / "source"), {}
    for storage in ("uint8", "bfloat16"):
        base, merged = tmp_path / storage, tmp_path / f"{storage} merged"
        prepared(ftload, source, base, *flags(storage, None))
        adapter = load_file(base / "adapter" / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(0)
        trained = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in sorted(adapter.items())}
        save_file(trained, base / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        result = ftload("merge", base / "adapter", "--dequantize", "--output_dir", merged)
        assert result.code == 0, result.err
        outs[storage] = merged
    assert_same_tensors(outs["bfloat16"], outs["uint8"])
