"""The real SmolLM2, quantised to INT4 by the package `compressed-tensors`, prepared for QLoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ..conftest import Result
from ..formats.compressed import compress_checkpoint, scheme
from ..parity.compare import read_tensors
from ..parity.reference import run_reference

LINEAR = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
"""Parameters of the linear layers of 30 blocks."""


@pytest.mark.filterwarnings("ignore:attention is sdpa")
def test_int4_becomes_nf4(ftload: Callable[..., Result], smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source, plain, out, reference = (tmp_path / name for name in ("source", "plain", "out", "reference"))
    shutil.copytree(smollm2, source)
    compress_checkpoint(
        source,
        {"group_0": scheme("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False)},
        shards=3,
    )
    result = ftload("prepare", "--model", source, "--output_dir", out, "--use_qlora", "--max_memory", "256MB", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["parameters"]["by_dtype"]["nf4"]["parameters"] == LINEAR
    packed = [row for row in report["source"]["stored"] if row["dtype"] == "int4"]
    assert {row["component"] for row in packed} == {"attention", "mlp"}
    assert sum(row["parameters"] for row in packed) == LINEAR
    verified = ftload("verify", out)
    assert verified.code == 0, verified.err

    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(plain)
    run_reference(plain, reference, strategy="qlora", tokenizer_size=0, rank=64)
    found, expected = read_tensors(out), read_tensors(reference)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "embed_tokens" not in name:  # it has grown by a row for `<pad>`
            assert torch.equal(found[name], value), name
