"""The encoder against bitsandbytes' own `quantize_4bit`, whole weights at a time."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from ftload.loaders.nf4 import encode as nf4

from ..conftest import Result


def _encode(weight: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    pieces = []
    for chunk in weight.split(rows):
        codes, absmax = nf4.encode(chunk)
        pieces.append((codes.clone(), absmax))
    codes = torch.cat([codes for codes, _ in pieces]).reshape(-1, 1)
    absmax = torch.cat([absmax for _, absmax in pieces])
    return {"": codes, **nf4.statistics(absmax, tuple(weight.shape), str(weight.dtype).removeprefix("torch."))}


@pytest.mark.parametrize("shape", [(8, 64), (5, 64), (3, 7), (1, 1), (130, 192), (257, 96), (2, 8192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_equal_the_whole(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    data, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = {"": data} | {f".{name}": value for name, value in state.as_dict(packed=True).items()}
    whole_rows = 64 if shape[1] % 64 else 1
    for rows in (shape[0], whole_rows):
        found = _encode(weight, rows)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            assert torch.equal(found[name], value), name


def test_stored_shapes_are_those_of_the_tensors() -> None:
    weight = torch.randn(70, 65).to(torch.bfloat16)
    shapes = nf4.stored_shapes((70, 65), "bfloat16")
    codes = {"U8": torch.uint8, "F32": torch.float32}
    for name, value in _encode(weight, 70).items():
        shape, dtype = shapes[name]
        assert value.dtype == codes[dtype]
        if name == nf4.FourBits().state_suffix:
            assert value.numel() <= shape[0]
        else:
            assert tuple(value.shape) == shape


def test_the_longest_state_fits_what_is_reserved_for_it() -> None:
    longest = max((float.fromhex(f"0x1.fffffep-{exponent}") for exponent in range(140)), key=lambda x: len(repr(x)))
    state = nf4.statistics(torch.full((64,), longest), (4096, 4096), "bfloat16")[nf4.FourBits().state_suffix]
    assert json.loads(bytes(state.tolist()))["nested_offset"] == pytest.approx(longest)
    assert state.numel() <= nf4.stored_shapes((4096, 4096), "bfloat16")[nf4.FourBits().state_suffix][0][0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    weight[63, 63] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        nf4.encode(weight)


def test_what_was_encoded_decodes() -> None:
    weight = (torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 0.02).to(torch.bfloat16)
    _, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    decoded = dequantize_4bit(_encode(weight, 64)[""], state)
    assert (decoded - weight).abs().max() < 0.15 * weight.abs().max()


def test_a_c_function_that_computes_otherwise_is_not_called() -> None:
    """Such as another release of bitsandbytes might have under the same name."""
    right = nf4._library_function()
    assert right is not None
    assert nf4.library_problem() is None
    assert nf4._gives_every_code(right)
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, ctypes.c_longlong, ctypes.c_longlong)
    counts = ctypes.c_ubyte * 256

    def one_code_off(code: int, values: int, maxima: int, codes: int, block: int, n: int) -> None:
        right(*map(ctypes.c_void_p, (code, values, maxima, codes)), ctypes.c_longlong(block), ctypes.c_longlong(n))
        counts.from_address(codes)[100] += 1

    def wrong_maximum(code: int, values: int, maxima: int, codes: int, block: int, n: int) -> None:
        right(*map(ctypes.c_void_p, (code, values, maxima, codes)), ctypes.c_longlong(block), ctypes.c_longlong(n))
        ctypes.c_float.from_address(maxima).value = 1.0

    def nothing(*_: int) -> None:
        pass

    for wrong in (one_code_off, wrong_maximum, nothing):
        assert not nf4._gives_every_code(kind(wrong))


@pytest.mark.parametrize("missing", ["symbol", "answer"])
def test_without_the_c_function_the_package_is_called_and_that_is_a_decision(
    ftload: Callable[..., Result], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    words = ["prepare", "--model", llama, "--use_qlora", "--lora_rank", "4"]
    assert ftload(*words, "--output_dir", tmp_path / "one").code == 0
    if missing == "symbol":
        monkeypatch.setattr(nf4, "_SYMBOL", "cquantize_no_more")
    else:
        monkeypatch.setattr(nf4, "_gives_every_code", lambda function: False)
    nf4._library_function.cache_clear()
    try:
        assert ftload(*words, "--output_dir", tmp_path / "two").code == 0
        strict = ftload(*words, "--output_dir", tmp_path / "three", "--use_flash_attn", "false", "--strict")
    finally:
        monkeypatch.undo()
        nf4._library_function.cache_clear()
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    report = json.loads((tmp_path / "two" / "ftload_report.json").read_text())
    (decision,) = [decision for decision in report["decisions"] if decision["what"] == "4-bit statistics"]
    assert (decision["requested"], decision["effective"]) == ("bitsandbytes' C function", "bitsandbytes' package")
    assert strict.code == 5
    assert "4-bit statistics" in strict.err
