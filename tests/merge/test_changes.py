"""The arithmetic of a merge, piece by piece, against PEFT's own layers; and the memory that it takes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.checkpoint.plain import PlainReader
from ftload.loaders.checkpoint.safetensors_header import read_header
from ftload.loaders.checkpoint.tensors import TensorMeta
from ftload.loaders.merge.changes import LEAST_ROWS, ExpertLayers, Factors, LowRank
from ftload.loaders.merge.merged_tensor import MergedTensor, merged_tensor
from ftload.loaders.source.resolve import resolve_source
from safetensors.torch import save_file

from tests.loaders.test_activations import measured_peak

SIZES = [(1, 7, 2), (3, 130, 4), (63, 64, 8), (65, 64, 8), (130, 96, 16), (300, 1, 8), (1000, 257, 64), (513, 640, 3)]
"""Outputs, inputs and rank: fewer rows than are computed together, some more, whole multiples and remainders."""


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(directory: Path, **tensors: torch.Tensor) -> tuple[PlainReader, dict[str, TensorMeta]]:
    """Tensors in a file, and the reader that finds them there."""
    path = directory / "tensors.safetensors"
    save_file(tensors, path)
    data = path.read_bytes()
    header = read_header(path.name, len(data), lambda begin, end: data[begin:end])
    return PlainReader(source=resolve_source(str(directory), None)), {meta.name: meta for meta in header}


def linear(outs: int, ins: int, rank: int, *, dora: bool, transposed: bool, bias: bool = False) -> Any:
    """PEFT's layer around a bfloat16 one, all of whose tensors were drawn."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    base: Any = Conv1D(outs, ins) if transposed else torch.nn.Linear(ins, outs, bias=bias)
    base = base.to(torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=13, use_dora=dora, fan_in_fan_out=transposed)
    layer = Linear(base, "default", config=config, r=rank, lora_alpha=13)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number))
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.float()
            for number, parameter in enumerate(part.parameters()):
                parameter.data = random(*parameter.shape, seed=10 + number)
    return layer


def described(layer: Any, directory: Path, *, dora: bool, transposed: bool) -> tuple[MergedTensor, Any]:
    """The same as a tensor that is merged when it is read, and what reads."""
    parts = {"w": layer.base_layer.weight, "a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    if dora:
        parts["m"] = layer.lora_magnitude_vector["default"].weight
    reader, metas = written(directory, **{name: value.detach().clone() for name, value in parts.items()})
    change = LowRank(
        factors=Factors(reader=reader, tensors=tuple(metas[name] for name in ("a", "b", "m") if name in metas)),
        scaling=layer.scaling["default"], outs=layer.out_features, ins=layer.in_features, transposed=transposed,
    )  # fmt: skip
    return merged_tensor("w", metas["w"], "BF16", change), reader.values


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dora", "transposed"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_piece_is_a_piece_of_what_peft_merges(
    tmp_path: Path, size: tuple[int, int, int], dora: bool, transposed: bool, threads: int
) -> None:
    outs, ins, rank = size
    layer = linear(outs, ins, rank, dora=dora, transposed=transposed)
    tensor, read = described(layer, tmp_path, dora=dora, transposed=transposed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        layer.merge()
        expected = layer.base_layer.weight.detach().reshape(-1)
        torch.set_num_threads(1)  # as ftload writes
        for tiles in (1, 2, 5):
            step = tensor.tile * tiles
            pieces = [
                tensor.values(begin, min(begin + step, tensor.parameters), read)
                for begin in range(0, tensor.parameters, step)
            ]
            assert torch.cat(pieces).equal(expected)
        middle = tensor.parameters // 3, tensor.parameters // 2 + 1
        assert tensor.part(*middle, read).equal(expected[slice(*middle)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_is_an_expert_of_peft(tmp_path: Path, transposed: bool) -> None:
    """One after another, and all of them in tiles that cross from one to the next."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper

    experts, outs, ins, rank = 5, 100, 48, 6
    holder: Any = torch.nn.Module()
    shape = (experts, ins, outs) if transposed else (experts, outs, ins)
    holder.weight = torch.nn.Parameter(random(*shape, seed=0, dtype=torch.bfloat16))
    holder.is_transposed = transposed
    layer = ParamWrapper(holder, "default", parameter_name="weight", config=LoraConfig(), r=rank, lora_alpha=7)
    layer.lora_A.float()
    layer.lora_B.float()
    layer.lora_A["default"].weight.data = random(rank * experts, ins, seed=1)
    layer.lora_B["default"].weight.data = random(outs, rank * experts, seed=2)
    reader, metas = written(
        tmp_path, w=holder.weight.detach().clone(), a=layer.lora_A["default"].weight.detach(),
        b=layer.lora_B["default"].weight.detach(),
    )  # fmt: skip
    change = LowRank(
        factors=Factors(reader=reader, tensors=(metas["a"], metas["b"])), scaling=layer.scaling["default"], outs=outs,
        ins=ins, transposed=transposed, rounded=True, experts=experts,
    )  # fmt: skip
    tensor = merged_tensor("w", metas["w"], "BF16", change)
    assert change.apply(holder.weight.detach().reshape(-1, shape[2]), 0, experts * shape[1]).shape[0] % LEAST_ROWS
    layer.merge()
    expected = holder.weight.detach().reshape(-1)
    pieces = [
        tensor.values(begin, min(begin + tensor.tile, tensor.parameters), reader.values)
        for begin in range(0, tensor.parameters, tensor.tile)
    ]
    assert torch.cat(pieces).equal(expected)


def stacked(directory: Path, *, experts: int, adapted: list[int], transposed: bool, size: tuple[int, int, int]) -> Any:
    """A stack of experts, some of which have a layer of PEFT's; as a tensor that is merged when read, and merged."""
    outs, ins, rank = size
    layers = [linear(outs, ins, rank, dora=False, transposed=False) for _ in range(experts)]
    parts = {}
    for expert, layer in enumerate(layers):
        for number, parameter in enumerate((layer.base_layer.weight, layer.lora_A, layer.lora_B)):
            parameter = getattr(parameter, "default", parameter)
            parameter = getattr(parameter, "weight", parameter)
            parameter.data = random(*parameter.shape, seed=100 * expert + number).bfloat16().to(parameter.dtype)
        parts |= {f"a{expert}": layer.lora_A["default"].weight, f"b{expert}": layer.lora_B["default"].weight}
    matrices = [layer.base_layer.weight.detach() for layer in layers]
    parts["w"] = torch.stack([matrix.T if transposed else matrix for matrix in matrices])
    # as bfloat16, so that reading the factors takes memory
    reader, metas = written(directory, **{name: value.detach().bfloat16().clone() for name, value in parts.items()})
    change = ExpertLayers(
        layers={
            expert: LowRank(
                factors=Factors(reader=reader, tensors=(metas[f"a{expert}"], metas[f"b{expert}"])),
                scaling=layers[expert].scaling["default"], outs=outs, ins=ins, transposed=transposed,
            )
            for expert in adapted
        },
        rows=ins if transposed else outs, transposed=transposed,
    )  # fmt: skip
    for expert in adapted:
        layers[expert].merge()
    merged = torch.stack([matrix.T if transposed else matrix for matrix in matrices])
    return merged_tensor("w", metas["w"], "BF16", change), reader.values, merged.reshape(-1)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_with_a_layer_of_its_own_is_a_linear_layer_of_peft(tmp_path: Path, transposed: bool) -> None:
    """In tiles that cross from one expert to the next, some of which were not adapted."""
    tensor, read, expected = stacked(tmp_path, experts=5, adapted=[0, 1, 3], transposed=transposed, size=(100, 48, 6))
    for step in (tensor.tile, 3 * tensor.tile):
        pieces = [
            tensor.values(begin, min(begin + step, tensor.parameters), read)
            for begin in range(0, tensor.parameters, step)
        ]
        assert torch.cat(pieces).equal(expected)
    first, last = tensor.parameters // 3, tensor.parameters // 2 + 1
    assert tensor.part(first, last, read).equal(expected[first:last])


def test_many_experts_take_the_memory_of_one(tmp_path: Path) -> None:
    """A thread holds the factors of the expert that it has read last, and no others."""
    tensor, read, expected = stacked(
        tmp_path, experts=16, adapted=list(range(16)), transposed=False, size=(64, 512, 256)
    )
    factors = 4 * 256 * (512 + 64)
    assert tensor.change.factors.nbytes == factors + 2 * 256 * 512
    tensor.values(0, tensor.tile, read)  # imports
    for count in (tensor.parameters // 2, tensor.parameters):
        peak = measured_peak(lambda count=count: tensor.values(0, count, read)) + 2 * count
        told = tensor.reading_bytes(count) + 2 * count
        assert 0.3 * told < peak <= told, (count, peak, told)
    assert tensor.values(0, tensor.parameters, read).equal(expected)


@pytest.mark.parametrize(("dora", "transposed"), itertools.product([False, True], repeat=2))
def test_merging_takes_the_memory_that_it_tells(tmp_path: Path, dora: bool, transposed: bool) -> None:
    layer = linear(1024, 1536, 16, dora=dora, transposed=transposed)
    tensor, read = described(layer, tmp_path, dora=dora, transposed=transposed)
    factors = sum(value.nbytes for value in tensor.change.factors.read())
    for elements in (tensor.tile, 512 * 1024):
        count = min(-(-elements // tensor.tile) * tensor.tile, tensor.parameters)
        peak = factors + measured_peak(lambda count=count: tensor.values(0, count, read))
        peak += 2 * count  # what was read, of a file's own memory, which torch's allocator does not count
        told = tensor.reading_bytes(elements) + 2 * count
        assert 0.5 * told < peak <= told, (peak, told)
