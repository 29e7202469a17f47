"""What operations do with single tensors; whole outputs are compared in tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from ftload.loaders.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ftload.loaders.checkpoint.finite import all_finite
from ftload.loaders.checkpoint.tensors import TensorMeta
from ftload.loaders.errors import CheckpointError
from ftload.loaders.model.tensor_map import Conversion
from ftload.loaders.source.resolve import resolve_source
from ftload.loaders.steps.plain import Cast, Convert
from ftload.loaders.steps.step import Inputs
from safetensors.torch import save_file


class Written(dict[str, torch.Tensor]):
    """A sink."""

    def write(self, name: str, values: torch.Tensor) -> None:
        self[name] = values.clone()


class Identity:
    """A conversion that changes nothing."""

    def run(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return values


def open_one(directory: Path, values: torch.Tensor) -> tuple[Inputs, TensorMeta]:
    save_file({"one": values}, directory / "model.safetensors")
    checkpoint: Checkpoint = open_checkpoint(resolve_source(str(directory), None), allow_pickle=False)
    return Inputs(checkpoint=checkpoint, chunk_bytes=64), checkpoint.tensors["one"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_conversion_is_given_nothing_that_is_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    inputs, meta = open_one(tmp_path, torch.tensor([1.0] * 99 + [value], dtype=dtype))
    convert = Convert(conversion=cast("Conversion", Identity()), sources=(meta,), dtype="BF16")
    with pytest.raises(CheckpointError, match=r"^tensor `one` of `model\.safetensors` holds NaN or infinity$"):
        convert.run(inputs, Written())


def test_4_bit_codes_may_be_anything(tmp_path: Path) -> None:
    codes = torch.full((128,), -1, dtype=torch.int16).view(torch.bfloat16)  # every byte is 0xff: NaN
    inputs, meta = open_one(tmp_path, codes)
    with pytest.raises(CheckpointError):
        Cast(source=meta, name="one", dtype="BF16").run(inputs, Written())
    written = Written()
    Cast(source=meta, name="one", dtype="BF16", codes=True).run(inputs, written)
    assert written["one"].view(torch.int16).unique().tolist() == [-1]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_sums_that_overflow_are_looked_at_again(dtype: torch.dtype) -> None:
    values = torch.full((1000,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert all_finite(values)
    spoilers = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), float("-inf")]
    for value in spoilers:  # that FP8 has no infinity
        values[999] = torch.tensor(value).to(dtype)
        assert not all_finite(values)
    assert all_finite(torch.tensor([255, 255], dtype=torch.uint8))
