"""4-bit experts, decoded: in the layout in which transformers saves the model, whatever they were prepared from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from ftload.loaders.checkpoint.checkpoint import open_checkpoint
from ftload.loaders.checkpoint.tensors import TensorMeta
from ftload.loaders.model.experts.single import single_experts
from ftload.loaders.source.resolve import resolve_source
from safetensors.torch import save_file

from ..cli.runs import prepare
from ..formats.memory import decoding_peak
from ..merge.adapters import decode
from ..parity.compare import assert_same_tensors
from ..tokenizers import write_llama
from .checkpoints import FILE, MODELS, reference, write_checkpoint

SIMPLE = ("--get_tokenizer_fn", "get_tokenizer_simple_v1")


@pytest.mark.parametrize("name", MODELS)
def test_four_bits_are_decoded_into_the_layout_of_transformers(tmp_path: Path, name: str) -> None:
    base = write_checkpoint(tmp_path / "base", name, vocab_size=144)
    write_llama(base)
    plain = reference(base)
    decode(plain)
    plain.save_pretrained(tmp_path / "reference")
    prepare(base, tmp_path / "output", "--dequantize", *SIMPLE)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")


def halves(stack: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers divides gate and up of each expert."""
    (values,) = stack.values()
    return {
        f"{expert}.{name}": half
        for expert, matrix in enumerate(values)
        for name, half in zip(("gate", "up"), matrix.chunk(2), strict=True)
    }


@pytest.mark.parametrize("columns", [512, 43], ids=["whole blocks", "blocks that cross"])
def test_an_expert_is_read_in_the_memory_that_it_tells(tmp_path: Path, columns: int) -> None:
    shape = (6, 2 * 150, columns)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = {f"W.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"W": codes, **parts}, tmp_path / FILE)
    checkpoint = open_checkpoint(resolve_source(str(tmp_path), None), allow_pickle=False, dequantize=True)
    found = single_experts(checkpoint.tensors["W"], shape, "W", halves)
    assert found is not None
    state.shape = torch.Size((1, values.numel()))
    expected = halves({"W": dequantize_4bit(codes, state).reshape(shape)})
    assert [one.name for one in found] == list(expected)
    for one in found:
        assert one.shape == (150, columns)
        for begin, end in ((0, one.parameters), (64, one.parameters // 2)):
            got = one.values(begin, end, checkpoint.values)
            assert got.equal(expected[one.name].reshape(-1)[begin:end])
            peak = decoding_peak(lambda one=one, begin=begin, end=end: one.values(begin, end, checkpoint.values))
            told = 2 * (end - begin) + one.reading_bytes(end - begin)
            assert 0.5 * told < peak <= told + 512, (peak, told)  # two views more


def test_what_is_cut_otherwise_than_between_rows_is_not_followed() -> None:
    stack = TensorMeta(name="W", shape=(4, 6, 5), dtype="BF16", file=FILE, begin=0, end=240)

    def turned(stack: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.T.contiguous() for name, value in halves(stack).items()}

    def lost(stack: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(list(halves(stack).items())[1:])

    def uneven(stack: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            f"{expert}.{index}": part
            for expert, matrix in enumerate(stack["W"])
            for index, part in enumerate(matrix.split((1, len(matrix) - 1)))
        }

    for divide in (turned, lost, uneven):
        assert single_experts(stack, stack.shape, "W", divide) is None
    found = single_experts(stack, stack.shape, "W", halves)
    assert found is not None
    assert [one.first for one in found] == [0, 15, 30, 45, 60, 75, 90, 105]
