"""The linear layers of a model, and which of them bitsandbytes would replace."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .components import LinearLayer, component_of
from .transformers_internals import conv1d, quantiser_takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantisable_modules(model: PreTrainedModel, settings: Mapping[str, Any] | None) -> frozenset[str]:
    """The modules that transformers' own bitsandbytes quantiser would replace.

    `settings` are the `quantization_config` that config.json goes on having, None where it gets a new one. The
    quantiser decides before weights are tied: `model` must be one that never was. Raises `CheckpointError` for settings
    that except no modules by their names.
    """
    import torch

    is_taken, transposed = quantiser_takes(model, _skipped(settings or {})), conv1d()
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, transposed)) and is_taken(name)
    )


def _skipped(settings: Mapping[str, Any]) -> list[str] | None:
    """The modules that stay as they are although others are quantised: unsloth leaves out those that lose most."""
    names = settings.get("llm_int8_skip_modules")
    if names is None or (isinstance(names, list) and all(map(_is_pattern, names))):
        return names
    raise CheckpointError(
        f"`llm_int8_skip_modules` of config.json is {repr(names)[:60]}, not a list of modules",
        hint="config.json and the weights must belong together",
    )


def _is_pattern(name: Any) -> bool:
    """Whether it is a regular expression: transformers takes each of the names for one."""
    try:
        re.compile(name if isinstance(name, str) else "(")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


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
