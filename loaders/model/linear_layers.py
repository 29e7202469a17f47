"""The linear layers of a model, and which of them bitsandbytes would replace."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING

from .components import LinearLayer, component_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantisable_modules(model: PreTrainedModel) -> frozenset[str]:
    """The modules that transformers' own bitsandbytes quantiser would replace.

    It decides before weights are tied: `model` must be one that never was.
    """
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
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
    from transformers.pytorch_utils import Conv1D

    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    apart = tuple(f"{name}." for name in towers)

    for name, module in model.named_modules():
        if name == head:
            continue
        transposed = isinstance(module, Conv1D)
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
