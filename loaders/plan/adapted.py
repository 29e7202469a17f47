"""Which layers get an adapter, as PEFT will find them, and the file that holds it."""

from __future__ import annotations

from dataclasses import replace

from ..adapter.interface import AdaptedLayer, Adapter
from ..adapter.peft_matching import Peft
from ..adapter.targets import ALL_LINEAR, Targets, resolve_targets
from ..checkpoint.tensors import DTYPE_CODES
from ..flags.request import Request
from ..model.components import LinearLayer
from ..model.skeleton import Skeleton
from ..strategy import Strategy
from .output_files import OutputFile, output_file

ADAPTER_PATH = "adapter/adapter_model.safetensors"
"""Of the adapter's weights, in an output."""


def choose_targets(request: Request, skeleton: Skeleton, adapter: Adapter, quantised: frozenset[str]) -> Targets:
    """The layers to adapt, confirmed by PEFT. `quantised` are the names of those whose weights are quantised.

    Raises `UsageError` where nothing can be adapted, or not what was asked for.
    """
    layers = tuple(_seen_by_peft(layer, quantised=layer.name in quantised) for layer in skeleton.layers)
    targets = resolve_targets(
        layers,
        modules=(name for name, _ in skeleton.model.named_modules()),
        asked=request.lora_targets,
        fused_experts=bool(skeleton.fused_experts),
    )
    named = request.lora_targets not in (None, (ALL_LINEAR,))
    return Peft(model=skeleton.model, adapter=adapter).confirm(targets, asked=named, layers=layers)


def _seen_by_peft(layer: LinearLayer, *, quantised: bool) -> LinearLayer:
    """A layer as it is when PEFT wraps it: bitsandbytes has put its own, (out, in), in the place of a Conv1D."""
    return replace(layer, transposed=layer.transposed and not quantised)


def adapter_file(
    strategy: Strategy, skeleton: Skeleton, adapter: Adapter, targets: Targets, *, computed_in: dict[str, str]
) -> OutputFile:
    """The adapter's weights. `computed_in` maps quantised layers to torch's name of the dtype they compute in."""
    weights = {tensor.parameter: tensor for tensor in skeleton.tensors if tensor.conversion is None}

    def dtype(layer: LinearLayer) -> str:
        loaded = str(skeleton.model.get_parameter(f"{layer.name}.weight").dtype).removeprefix("torch.")
        return DTYPE_CODES[computed_in.get(layer.name) or strategy.training_dtype(loaded)]

    layers = (
        AdaptedLayer(layer=layer, dtype=dtype(layer), weight=weights.get(f"{layer.name}.weight"))
        for layer in targets.layers
    )
    return output_file(ADAPTER_PATH, adapter.steps(layers))
