"""Which layers get an adapter, as PEFT will find them, and the file that holds it."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ..adapter.experts import Experts, check_asked, not_reached, untrained
from ..adapter.interface import AdaptedLayer, Adapter
from ..adapter.peft_matching import Peft
from ..adapter.targets import ALL_LINEAR, FusedTarget, Target, Targets, resolve_targets
from ..checkpoint.tensors import DTYPE_CODES
from ..decision import Decision
from ..flags.request import Request
from ..model.components import LinearLayer
from ..model.skeleton import Skeleton
from ..strategy import Strategy
from .output_files import OutputFile, output_file

ADAPTER_PATH = "adapter/adapter_model.safetensors"
"""Of the adapter's weights, in an output."""


def choose_targets(
    request: Request, skeleton: Skeleton, adapter: Adapter, *, quantised: frozenset[str], experts: Experts
) -> tuple[Adapter, Targets]:
    """The adapter as it can be, and what it adapts, confirmed by PEFT. `quantised` are the names of 4-bit layers.

    Raises `UsageError` where nothing can be adapted, or not what was asked for.
    """
    layers = tuple(_seen_by_peft(layer, quantised=layer.name in quantised) for layer in skeleton.layers)
    unknown = {*skeleton.fused_experts} - {fused.parameter for fused in skeleton.experts}
    check_asked(request.lora_experts, experts, layers, unknown)
    modules = tuple(name for name, _ in skeleton.model.named_modules())
    targets = resolve_targets(
        layers,
        modules=experts.modules(modules),
        asked=request.lora_targets,
        fused_experts=bool(skeleton.fused_experts),
    )
    named = request.lora_targets not in (None, (ALL_LINEAR,))
    targets = Peft(model=skeleton.model, adapter=adapter, experts=experts).confirm(targets, asked=named, layers=layers)
    if request.lora_experts is None:
        return adapter, replace(targets, decisions=(*targets.decisions, *_untrained(request, skeleton, experts)))
    targets = experts.added_to(targets, modules=modules)
    adapter, decisions = adapter.fitted(targets)
    if unknown:
        decisions = (*decisions, not_reached(request.lora_experts, unknown))
    targets = Peft(model=skeleton.model, adapter=adapter, experts=experts).confirm_experts(targets)
    return adapter, replace(targets, decisions=(*targets.decisions, *decisions))


def _untrained(request: Request, skeleton: Skeleton, experts: Experts) -> tuple[Decision, ...]:
    weights = sum(prod(skeleton.model.get_parameter(name).shape) for name in skeleton.fused_experts)
    if not weights:
        return ()
    return (untrained(experts, weights, len(skeleton.fused_experts), request.lora_rank),)


def _seen_by_peft(layer: LinearLayer, *, quantised: bool) -> LinearLayer:
    """A layer as it is when PEFT wraps it: bitsandbytes has put its own, (out, in), in the place of a Conv1D."""
    return replace(layer, transposed=layer.transposed and not quantised)


def adapter_file(
    strategy: Strategy, skeleton: Skeleton, adapter: Adapter, targets: Targets, *, computed_in: dict[str, str]
) -> OutputFile:
    """The adapter's weights. `computed_in` maps 4-bit layers and fused experts to the dtype that they compute in."""
    weights = {tensor.parameter: tensor for tensor in skeleton.tensors if tensor.conversion is None}
    packed = {
        fused.layer(number).name: computed_in[fused.parameter]
        for fused in skeleton.experts
        if fused.parameter in computed_in
        for number in range(fused.experts)
    }
    computed_in = {**computed_in, **packed}

    def dtype(layer: Target) -> str:
        if layer.name in computed_in:
            return DTYPE_CODES[computed_in[layer.name]]
        parameter = layer.experts.parameter if isinstance(layer, FusedTarget) else f"{layer.name}.weight"
        loaded = str(skeleton.model.get_parameter(parameter).dtype).removeprefix("torch.")
        return DTYPE_CODES[strategy.training_dtype(loaded)]

    layers = (
        AdaptedLayer(layer=layer, dtype=dtype(layer), weight=weights.get(f"{layer.name}.weight"))
        for layer in (*targets.layers, *targets.fused)
    )
    return output_file(ADAPTER_PATH, adapter.steps(layers))
