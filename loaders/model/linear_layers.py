"""The linear layers of a model, and which of them bitsandbytes would replace."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .components import LinearLayer, component_of
from .transformers_internals import conv1d, quantiser_takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantisable_modules(model: PreTrainedModel) -> frozenset[str]:
    """The modules that transformers' own bitsandbytes quantiser would replace.

    It decides before weights are tied: `model` must be one that never was.
    """
    import torch

    is_taken, transposed = quantiser_takes(model), conv1d()
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, transposed)) and is_taken(name)
    )


def linear_layers(
    model: PreTrainedModel,
    classes: Mapping[str, str],
    head: str | None,
    towers: tuple[str, ...],
    packed: Container[str],
) -> Iterator[LinearLayer]:
    """Every linear layer but the head, in module order.

    `towers` are the modules that text does not pass through. `packed` are the layers whose weights are stored in a
    format that stays packed: the place of a Conv1D is then taken by a linear layer that is not transposed.
    """
    import torch

    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    apart = tuple(f"{name}." for name in towers)

    module: Any
    for name, module in model.named_modules():
        if name == head:
            continue
        transposed = isinstance(module, conv1d())
        if transposed:
            in_features, out_features = module.weight.shape
        elif isinstance(module, torch.nn.Linear):
            in_features, out_features = module.in_features, module.out_features
        else:
            continue
        yield LinearLayer(
            name=name,
            in_features=in_features,
            out_features=out_features,
            component=component_of(f"{name}.weight", classes, head=head),
            transposed=transposed and name not in packed,
            in_blocks=name.startswith(blocks) and not f"{name}.".startswith(apart),
        )
