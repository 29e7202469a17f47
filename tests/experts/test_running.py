"""The forward and backward pass of 4-bit experts: what runs, what is kept, and what is allocated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.experts.forward import experts_forward
from ftload.loaders.experts.layers import PackedExpert, expert_layers
from ftload.loaders.model.experts.fused import FusedExperts

from ..loaders.test_activations import measured_peak
from .checkpoints import load, pack_experts, random_model, unpacked, write_checkpoint

LAYOUTS = {
    "linear, nested": {"in_features": 256, "out_features": 128, "transposed": False},
    "linear": {"in_features": 192, "out_features": 100, "transposed": False},
    "transposed": {"in_features": 128, "out_features": 128, "transposed": True},
    "rows of 96": {"in_features": 96, "out_features": 160, "transposed": False},
    "odd": {"in_features": 35, "out_features": 33, "transposed": False},
}


def layers_of(name: str, experts: int = 5, **settings: Any) -> tuple[list[Any], torch.Tensor]:
    """The layers of random experts, and their weights (experts, out, in) as bitsandbytes dequantises them, flat."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    fused = FusedExperts(parameter="experts.down_proj", experts=experts, **LAYOUTS[name])
    weight = torch.randn(fused.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4", **settings)
    layers = expert_layers(fused, codes, state, compute_dtype=torch.bfloat16)
    state.shape = torch.Size((1, weight.numel()))
    values = dequantize_4bit(codes.view(torch.uint8).view(-1, 1), state).view(fused.shape)
    return layers, values.mT if fused.transposed else values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_multiplies_by_its_weight_forwards_and_backwards(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 whatever comes in, and out in the dtype of what came in, as `Linear4bit` does."""
    layers, weights = layers_of(name)
    for layer, weight in zip(layers, weights, strict=True):
        x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        gradient = torch.randn(7, layer.out_features, generator=torch.Generator().manual_seed(2)).to(dtype)
        y = layer(x)
        y.backward(gradient)
        other = x.detach().clone().requires_grad_()
        expected = torch.nn.functional.linear(other.bfloat16(), weight).to(dtype)
        expected.backward(gradient)
        assert y.dtype == x.grad.dtype == dtype
        assert torch.equal(y, expected)
        assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("name", LAYOUTS)
def test_autocast_and_empty_inputs(name: str) -> None:
    layers, weights = layers_of(name)
    layer, weight = layers[3], weights[3]
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.nn.functional.linear(x.bfloat16(), weight).float())
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    empty = torch.empty(0, layer.in_features, requires_grad=True)
    nothing = layer(empty)
    assert nothing.shape == (0, layer.out_features)
    nothing.sum().backward()
    assert empty.grad.shape == empty.shape
    # and no weight is dequantised for it
    assert measured_peak(lambda: layer(empty).sum().backward()) < weight.numel()


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_saved_for_the_backward_pass(name: str) -> None:
    layers, _ = layers_of(name)
    saved: list[torch.Tensor] = []

    def save(value: torch.Tensor) -> torch.Tensor:
        saved.append(value)
        return value

    x = torch.randn(3, layers[0].in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        result = sum(layer(x).sum() for layer in layers)
    assert saved == []
    held = [held for held in objects_held_by(result.grad_fn) if held.is_floating_point()]
    assert all(value.numel() < layers[0].in_features * layers[0].out_features / 32 for value in held)


def objects_held_by(node: Any) -> list[torch.Tensor]:
    """The tensors that a graph's own functions keep beside those that autograd saves for them."""
    found, nodes, seen = [], [node], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [other for other, _ in node.next_functions]
        for value in vars(node).values() if hasattr(node, "__dict__") else ():
            for part in value if isinstance(value, tuple) else (value,):
                found += [part] if isinstance(part, torch.Tensor) else []
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_allocates_one_experts_weight_at_a_time(name: str) -> None:
    """With few tokens, what is allocated beside the weight is small; all experts' weights would be 16 times as much."""
    layers, _ = layers_of(name, experts=16)
    size = layers[0].in_features * layers[0].out_features
    x = torch.randn(1, layers[0].in_features, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        sum(layer(x).sum() for layer in layers).backward()

    step()
    peak = measured_peak(step)
    assert 2 * size <= peak  # bfloat16
    # less than two experts' weights; where bitsandbytes falls back from its kernel, to indices of 4 bytes: six
    assert peak < (4 if layers[0].in_features % 2 == 0 else 24) * size + 8192, peak / size


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_state_follows_its_layer(name: str) -> None:
    layers, weights = layers_of(name)
    copied = copy.deepcopy(layers[2])
    with torch.no_grad():
        assert torch.equal(copied(torch.eye(copied.in_features, dtype=torch.bfloat16)).t(), weights[2])
    if isinstance(layers[2], PackedExpert):  # a `Params4bit` is never on `meta`
        moved = layers[2].to("meta")
        state = moved.weight.quant_state
        assert {tensor.device.type for tensor in (moved.weight, state.absmax, state.code)} == {"meta"}
        assert state.shape == (moved.out_features, moved.in_features)
    with torch.no_grad():  # its neighbours stay where they were
        assert torch.equal(layers[1](torch.eye(copied.in_features, dtype=torch.bfloat16)).t(), weights[1])
    layers[1].bfloat16().half()
    with torch.no_grad():
        assert torch.equal(layers[1](torch.eye(copied.in_features, dtype=torch.bfloat16)).t(), weights[1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_evaluation_repacks_nothing(name: str) -> None:
    """Also where the processor has AVX512-BF16, and nobody has told the layer."""
    layers, _ = layers_of(name)
    layer = layers[1].eval()
    before = layer.weight.data.clone()
    assert getattr(layer, "support_avx512bf16_for_cpu", False) is False
    layer(torch.randn(3, layer.in_features).bfloat16())
    assert torch.equal(layer.weight.data, before)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_codes_in_another_dtype() -> None:
    """`bnb_4bit_quant_storage`: the same bytes, as FSDP shards them."""
    for name in ("linear, nested", "linear", "rows of 96"):
        layers, weights = layers_of(name, quant_storage=torch.bfloat16)
        ours = isinstance(layers[0], PackedExpert)
        assert layers[0].weight.dtype == (torch.uint8 if ours else torch.bfloat16)
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                assert torch.equal(layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).t(), weight)


def test_loading_makes_no_16_bit_copy(tmp_path: Path) -> None:
    """Less than a byte a parameter, with the rest of the model: half a byte is packed, and absmax is unpacked."""
    for name, size in (("qwen3_moe", {"num_experts": 32}), ("gpt_oss", {"num_local_experts": 32})):
        write_checkpoint(tmp_path / name, name, hidden_size=128, intermediate_size=192, num_hidden_layers=1, **size)
        experts = sum(value.numel() for value in unpacked(tmp_path / name).values())
        load(tmp_path / name)
        assert measured_peak(lambda name=name: load(tmp_path / name)) < experts, name


# -- the forward pass of a layer's experts


def experts_of(directory: Path) -> Any:
    module: Any = load(directory)[0].get_submodule("model.layers.0.mlp.experts")
    return module


def inputs(tokens: int, indices: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    index = torch.tensor(indices)
    weights = torch.rand(index.shape, generator=generator)
    return torch.randn(tokens, 64, generator=generator).bfloat16(), index, weights.bfloat16()


def test_an_index_beyond_the_experts_is_none(written: Callable[[str], Path]) -> None:
    """As expert parallelism marks what other processes compute; and a layer that no token reached gives zeros."""
    module = experts_of(written("qwen3_moe"))
    x, index, weights = inputs(3, [[0, 1], [2, 3], [1, 0]])
    with torch.no_grad():
        whole = experts_forward(module, x, index, weights)
        part = experts_forward(module, x, torch.tensor([[0, 1], [4, 4], [1, 4]]), weights)
        none = experts_forward(module, x, torch.full((3, 2), 4), weights)
        alone = experts_forward(module, x[2:], torch.tensor([[1]]), weights[2:, :1])
    assert torch.equal(part[0], whole[0])
    assert not part[1].any()
    assert torch.equal(part[2:], alone)
    assert none.shape == x.shape
    assert not none.any()


def test_routing_weights_in_float32_are_multiplied_and_summed_in_float32(written: Callable[[str], Path]) -> None:
    module = experts_of(written("qwen3_moe"))
    x, index, weights = inputs(3, [[0, 1], [2, 3], [1, 0]])
    with torch.no_grad():
        single = [
            experts_forward(module, x, index[:, [choice]], torch.ones(3, 1, dtype=torch.float32)).float()
            for choice in range(2)
        ]
        found = experts_forward(module, x, index, weights.float())
    assert torch.equal(found, sum(single[choice] * weights[:, [choice]].float() for choice in range(2)).bfloat16())


def test_only_a_trained_expert_runs_without_tokens(written: Callable[[str], Path]) -> None:
    """Data-parallel training waits for a gradient of every parameter; nothing is dequantised for it."""
    module = experts_of(written("gpt_oss"))
    calls: list[tuple[int, int]] = []
    for expert in range(4):
        layer: Any = module.get_submodule(f"{expert}.down")
        layer.register_forward_hook(lambda _, x, y, expert=expert: calls.append((expert, len(x[0]))))
    x, index, weights = inputs(3, [[0, 2], [2, 0], [0, 2]])
    experts_forward(module, x.requires_grad_(), index, weights)
    assert calls == [(0, 3), (2, 3)]
    calls.clear()
    extra = torch.nn.Linear(64, 64)
    module.get_submodule("3").add_module("adapter", extra)
    experts_forward(module, x, index, weights)
    assert calls == [(0, 3), (2, 3), (3, 0)]
    calls.clear()
    with torch.no_grad():
        experts_forward(module, x, index, weights)
    assert calls == [(0, 3), (2, 3)]


def test_it_is_the_way_of_bitsandbytes_own_parametrisation(written: Callable[[str], Path]) -> None:
    """`replace_parameter_4bit` on the same weights, by which transformers multiplies in grouped products."""
    directory = written("qwen3_moe")
    other = random_model("qwen3_moe").get_submodule("model.layers.0.mlp.experts")
    pack_experts_of(other)
    module = experts_of(directory)
    x, index, weights = inputs(6, [[0, 1], [2, 3], [1, 0], [3, 0], [2, 1], [0, 3]])
    found = []
    for one in (module, other):
        one_x = x.clone().requires_grad_()
        y = one(one_x, index, weights)
        y.float().square().sum().backward()
        found.append((y.detach(), one_x.grad))
    assert torch.equal(found[0][0], found[1][0])
    error = (found[0][1].float() - found[1][1].float()).norm() / found[1][1].float().norm()
    assert error < 5e-3


def pack_experts_of(module: Any) -> None:
    holder = torch.nn.Module()
    holder.add_module("mlp", torch.nn.Module())
    holder.get_submodule("mlp").add_module("experts", module)
    pack_experts(holder)
