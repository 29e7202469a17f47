"""The real SmolLM2-135M-Instruct, quantised to FP8 by the tests, through QLoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from ..conftest import Result
from ..formats.fp8_models import Stored, pack

FILE = "model.safetensors"
LINEAR = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
"""Parameters of the linear layers of 30 blocks."""
WEIGHTS = ("model.layers.0.self_attn.k_proj.weight", "model.layers.29.mlp.down_proj.weight")


def test_fp8_to_qlora(ftload: Callable[..., Result], smollm2: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(smollm2, source)
    pack(source, Stored(block=(64, 64)))
    result = ftload("prepare", "--model", source, "--use_qlora", "--output_dir", out)
    assert result.code == 0, result.err
    report = json.loads((out / "ftload_report.json").read_text())
    assert report["parameters"]["by_dtype"]["nf4"]["parameters"] == LINEAR
    stored, written = load_file(source / FILE), load_file(out / FILE)
    for name in WEIGHTS:
        assert stored[name].dtype == torch.float8_e4m3fn
        decoded = Fp8Dequantize(None)._dequantize_one(stored[name], stored[f"{name}_scale_inv"], torch.bfloat16)
        codes, _ = quantize_4bit(decoded, quant_type="nf4", compress_statistics=True)
        assert torch.equal(written[name], codes)
    result = ftload("verify", out)
    assert result.code == 0, result.err
