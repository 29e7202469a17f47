"""The dtypes of 4-bit weights, as `BitsAndBytesConfig` names them: what ftload writes against what the libraries write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.tensors import TORCH_NAMES

from ..cli.spoilt import edit_json
from ..conftest import Result
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


def source_of(directory: Path, architecture: str = "llama") -> Path:
    write_model(directory, architecture, vocab_size=128, dtype="float32", shards=True)
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
