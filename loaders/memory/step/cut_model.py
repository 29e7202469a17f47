"""A model cut to some of its layers and set up for training as `load_prepared` does it, all on `meta`."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ...model.experts.fused import by_module
from ...model.transformers_internals import checkpoint_activations, wrap_checkpointed
from ...system.quiet import quiet_transformers
from .meta_kernels import set_attention
from .setting import LoraSetting, PeftSetting, Setting

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ...model.experts.fused import FusedExperts
    from .autocast import Autocast


@dataclass(frozen=True, kw_only=True, eq=False)
class CutModel:
    """A model with some of its layers, set up for training."""

    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    gradients: tuple[int, ...]
    """Bytes of each layer's gradients."""
    autocast: Autocast | None
    """That of its forward pass."""


def cut_model(model: PreTrainedModel, chosen: list[int], setting: Setting) -> CutModel:
    """A copy of `model` with the decoder layers `chosen`, by index, set up for training; `model` is not changed."""
    from torch import nn

    path, stack = _find_layers(model)
    memo: dict[int, Any] = {id(stack): nn.ModuleList([deepcopy(stack[number]) for number in chosen])}
    copy = deepcopy(model, memo)
    text = copy.config.get_text_config()
    types = vars(text).get("layer_types")
    if types is not None:
        text.layer_types = [types[number] for number in chosen]
    text.num_hidden_layers = len(chosen)
    with quiet_transformers():
        _set_up_training(copy, path, chosen, setting)
    autocast = _autocast(copy, setting) if setting.autocast else None
    layers: Any = copy.get_submodule(path)
    gradients = tuple(gradient_bytes(layer) for layer in layers)
    return CutModel(model=copy, layers=tuple(layers), gradients=gradients, autocast=autocast)


def _autocast(model: PreTrainedModel, setting: Setting) -> Autocast:
    """Autocast that is on again where checkpointing runs a layer a second time."""
    from .autocast import Autocast

    autocast = Autocast(setting.device)
    if setting.checkpointing:
        wrap_checkpointed(model, autocast.in_region)
    return autocast


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradients of all parameters that are trained."""
    return sum(value.nbytes for value in module.parameters() if value.requires_grad)


def layer_bytes(
    model: PreTrainedModel, setting: Setting, codes: Mapping[str, int]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, int]]:
    """Bytes of the parameters in training, of one layer of each kind, and of all outside the layers.

    Each is a pair: base and adapter without quantised weights, which are no parameters here, and what `codes` says of
    these, by name.
    """
    path, _ = _find_layers(model)
    kinds = layer_kinds(model, setting.lora)
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    cut = cut_model(model, chosen, setting)
    plain = [_parameter_bytes(layer) for layer in cut.layers]
    packed = [_sum_below(codes, f"{path}.{number}.") for number in chosen]
    outside = _parameter_bytes(cut.model) - sum(plain), sum(codes.values()) - _sum_below(codes, f"{path}.")
    return tuple(zip(plain, packed, strict=True)), outside


def _sum_below(sizes: Mapping[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))


def _parameter_bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters())


def _find_layers(model: PreTrainedModel) -> tuple[str, Any]:
    """The name of the stack of decoder layers, and the `nn.ModuleList` itself."""
    from torch import nn

    depth = model.config.get_text_config().num_hidden_layers
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    # the outermost one: experts inside a layer may be as many as there are layers
    return min(stacks, key=lambda stack: stack[0].count("."))


_MANY_KINDS = 8


def layer_kinds(model: PreTrainedModel, lora: LoraSetting | PeftSetting | None = None) -> list[Any]:
    """A hashable value for each decoder layer; layers with equal values do the same work.

    Where an adapter makes too many kinds of them, as ranks of their own do, layers whose adapters come close in size
    count as one kind, and the first of them stands for all.
    """
    path, layers = _find_layers(model)
    types = vars(model.config.get_text_config()).get("layer_types") or [None] * len(layers)
    adapters = [()] * len(layers) if lora is None else _adapters(lora, path, len(layers))
    kinds = [(types[number], _shapes(layer), adapters[number], _settings(layer)) for number, layer in enumerate(layers)]
    if len(set(kinds)) > _MANY_KINDS:
        # some attribute numbers the layers
        kinds = [kind[:3] for kind in kinds]
    if len(set(kinds)) > _MANY_KINDS:
        sizes = [sum(prod(shape) for _, shape in parts or ()) for parts in adapters]
        step = max(1, (max(sizes) - min(sizes)) // _SIZES + 1)
        kinds = [(*kind[:2], (size - min(sizes)) // step) for kind, size in zip(kinds, sizes, strict=True)]
    return kinds


_SIZES = 4
"""Of adapters, in equal steps from the smallest to the largest, where there are too many."""


def _adapters(lora: LoraSetting | PeftSetting, path: str, depth: int) -> list[Any]:
    """What each layer has of an adapter: names within the layer, and what tells them apart. None before the first."""
    found: list[list[Any]] = [[] for _ in range(depth)]
    for name, more in lora.parts:
        if name.startswith(f"{path}."):
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            found[int(number)].append((rest, more))
    first = next((number for number, parts in enumerate(found) if parts), depth)
    # nothing before the first of them is gone through backwards
    return [frozenset(parts) if number >= first else None for number, parts in enumerate(found)]


def _shapes(layer: nn.Module) -> Any:
    return type(layer), tuple((name, value.shape, value.dtype) for name, value in layer.named_parameters())


def _settings(layer: nn.Module) -> Any:
    return tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
    )


def _set_up_training(model: PreTrainedModel, path: str, chosen: list[int], setting: Setting) -> None:
    """What `load_prepared` does, in its order."""
    import torch

    set_attention(model, setting.attention)
    prefixes = {f"{path}.{position}": f"{path}.{number}" for position, number in enumerate(chosen)}
    if setting.is_quantised:
        from .meta_linear import quantised_linear

        for name, full in _full_names(model, prefixes).items():
            if full in setting.quantised:
                _replace(model, name, quantised_linear(model.get_submodule(name)))
        _split_quantised_experts(model, setting.quantised_experts, prefixes)
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.to(getattr(torch, setting.unquantised_dtype))
    for name, full in _full_names(model, prefixes).items():
        for leaf, parameter in model.get_submodule(name).named_parameters(recurse=False):
            if f"{full}.{leaf}" in setting.wide:
                parameter.data = parameter.data.float()
    if setting.checkpointing:
        # transformers' own default is not re-entrant
        checkpoint_activations(model, use_reentrant=setting.is_quantised and setting.reentrant)
        if setting.lora is not None:
            model.enable_input_require_grads()
    if setting.lora is not None:
        model.requires_grad_(False)
        if isinstance(setting.lora, PeftSetting):
            from .peft_layers import add_peft_layers

            add_peft_layers(model, model.get_submodule(path), chosen, setting.lora)
        else:
            _add_adapters(model, setting.lora, prefixes, setting)
    model.train()


def _split_quantised_experts(
    model: PreTrainedModel, experts: tuple[FusedExperts, ...], prefixes: Mapping[str, str]
) -> None:
    from .meta_experts import split_experts

    together = by_module(experts)
    for name, full in _full_names(model, prefixes).items():
        if full in together:
            split_experts(model.get_submodule(name), together[full])


def _add_adapters(model: PreTrainedModel, lora: LoraSetting, prefixes: Mapping[str, str], setting: Setting) -> None:
    """Beside linear layers, each expert's among them, and beside the parameters of experts that are not quantised."""
    from .meta_experts import AdaptedParameters, is_split
    from .meta_linear import lora_linear

    together = by_module(lora.experts)
    ranks = dict.fromkeys(lora.layers, lora.rank)
    for fused in lora.experts:
        ranks |= {fused.layer(number).name: lora.expert_rank for number in range(fused.experts)}
    for name, full in _full_names(model, prefixes).items():
        if full in ranks:
            adapted = lora_linear(model.get_submodule(name), lora, rank=ranks[full], setting=setting)
            _replace(model, name, adapted)
        elif full in together:
            module = model.get_submodule(name)
            if not is_split(module):
                adapted = AdaptedParameters(module, together[full], lora)
                _replace(model, name, adapted)


def _full_names(model: PreTrainedModel, prefixes: Mapping[str, str]) -> dict[str, str]:
    """The name in the whole model of each module, by its name in the cut one.

    `prefixes` gives the name in the whole model of each layer in the cut one.
    """
    names = {}
    for name, _ in model.named_modules():
        prefix = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), None)
        names[name] = name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)
    return names


def _replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
