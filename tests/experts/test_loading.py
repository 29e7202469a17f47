"""Experts in 4 bits, loaded by transformers: the weights, and what the model computes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import MODELS, load, reference, unpacked, write_checkpoint


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a name, written once."""
    root = tmp_path_factory.mktemp("experts")

    def write(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else write_checkpoint(directory, name)

    return write


def weight_of(layer: Any) -> torch.Tensor:
    """What a layer multiplies by: the identity comes back as its transposed weight."""
    return layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).t()


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_has_its_experts_weight_bit_for_bit(written: Callable[[str], Path], name: str) -> None:
    directory = written(name)
    model, info = load(directory, device_map={"": "cpu"})
    assert {key: value for key, value in info.items() if value} == {}
    expected = unpacked(directory)
    assert expected
    for parameter, values in expected.items():
        path, _, leaf = parameter.rpartition(".")
        experts = model.get_submodule(path)
        assert not hasattr(experts, leaf)
        first = "gate_up" if experts.has_gate else "up"
        for expert, value in enumerate(values.mT if experts.is_transposed else values):
            assert list(experts.get_submodule(str(expert))) == [first, "down"]
            layer: Any = experts.get_submodule(f"{expert}.{leaf.removesuffix('_proj')}")
            assert (layer.out_features, layer.in_features) == value.shape == layer.weight.quant_state.shape
            assert not layer.training
            assert layer.weight.dtype == torch.uint8
            assert torch.equal(weight_of(layer), value), (parameter, expert)
            assert getattr(layer, "support_avx512bf16_for_cpu", False) is False


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_dequantised_model(written: Callable[[str], Path], name: str) -> None:
    """Within the rounding of bfloat16: sums over experts are taken in another order than by transformers' eager way."""
    directory = written(name)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for model in (load(directory, device_map={"": "cpu"})[0], reference(directory)):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), embedded.grad))
    (loss, gradient), (expected_loss, expected) = found
    assert abs(loss - expected_loss) < 2e-3
    error = (gradient.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02, error
