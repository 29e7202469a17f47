"""Which layers get an adapter, as PEFT will find them, and the file that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from ..adapter.base_tensors import BaseTensor
from ..adapter.experts import Experts, check_asked, not_reached, untrained
from ..adapter.interface import AdaptedLayer, Adapter, BaseModel
from ..adapter.peft_matching import Peft
from ..adapter.targets import FusedTarget, Target, Targets, resolve_targets
from ..checkpoint.tensors import DTYPE_CODES
from ..decision import Decision
from ..flags.lora_config import ALL_LINEAR
from ..flags.request import Request
from ..model.components import LinearLayer
from ..model.skeleton import Skeleton
from ..model.tensor_map import ModelTensor
from ..steps.step import Step
from ..strategy import Strategy
from .output_files import OutputFile, output_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_PATH = "adapter/adapter_model.safetensors"
"""Of the adapter's weights, in an output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptedBase:
    """The base, for whoever puts an adapter on it."""

    strategy: Strategy
    skeleton: Skeleton
    groups: tuple[tuple[tuple[ModelTensor, ...], Step], ...]
    """What is written together, and how."""
    is_written: bool
    quantised_layers: frozenset[str]
    quantised_experts: frozenset[str]
    quantization_config: Mapping[str, Any] | None
    new_tokens: range

    @property
    def experts(self) -> Experts:
        """Its fused experts."""
        return Experts.of(self.skeleton.experts, self.quantised_experts)

    @property
    def layers(self) -> tuple[LinearLayer, ...]:
        """Its linear layers as PEFT finds them: bitsandbytes has put its own, (out, in), in the place of a Conv1D."""
        return tuple(
            replace(layer, transposed=layer.transposed and layer.name not in self.quantised_layers)
            for layer in self.skeleton.layers
        )

    @property
    def compute_dtype(self) -> str | None:
        """torch's name of the dtype that 4-bit layers compute in; None where there are none."""
        quantisation = self.strategy.quantisation
        if quantisation is None or self.quantization_config is None:
            return None
        return quantisation.compute_dtype(self.quantization_config)

    def described(self, *, changed: bool) -> BaseModel:
        """It, as an adapter finds it; as it is before it is quantised where the adapter is to change it."""
        quantisation = self.strategy.quantisation
        model, load, packed_under = self.skeleton.model, None, None
        if quantisation is not None and self.quantization_config is not None and not changed:
            model = self._in_training()
            load = partial(quantisation.load, config=self.quantization_config)
            packed_under = quantisation.facts(self.quantization_config, quantisation.block_size)["storage_dtype"]
        return BaseModel(
            model=model,
            layers=self.layers,
            experts=self.experts,
            tensors=self._tensors(),
            is_written=self.is_written,
            load=load,
            packed_under=packed_under,
            compute_dtype=self.compute_dtype,
            training_dtype=self.strategy.training_dtype,
            new_tokens=self.new_tokens,
        )

    def _in_training(self) -> PreTrainedModel:
        """The model on `meta` in the dtypes of training, linear layers in the place of 4-bit ones."""
        import torch

        model = deepcopy(self.skeleton.model)
        for layer in self.skeleton.layers:
            if layer.name in self.quantised_layers:
                has_bias = getattr(model.get_submodule(layer.name), "bias", None) is not None
                linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
                parent, _, leaf = layer.name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, linear)
        for name, value in model.named_parameters():
            dtype = self.strategy.training_dtype(str(value.dtype).removeprefix("torch."))
            if name.removesuffix(".weight") in self.quantised_layers:
                dtype = self.compute_dtype or dtype
            value.data = value.data.to(getattr(torch, dtype))
        return model

    def _tensors(self) -> dict[str, BaseTensor]:
        quantisation, model = self.strategy.quantisation, self.skeleton.model
        tag = quantisation.tag if quantisation is not None else None
        found = {
            tensor.parameter: BaseTensor(
                parameter=tensor.parameter,
                group=group,
                step=step,
                is_quantised=any(output.counted_as == tag for output in step.outputs),
            )
            for group, step in self.groups
            for tensor in group
        }
        by_value = {id(value): name for name, value in model.named_parameters() if name in found}
        for name, value in model.named_parameters(remove_duplicate=False):
            if name not in found and id(value) in by_value:
                found[name] = found[by_value[id(value)]]
        return found

    def dtype_of(self, layer: Target) -> str:
        """The safetensors code of a layer's or parameter's dtype when PEFT wraps it."""
        quantised = {*self.quantised_layers, *(layer.name for layer in self.experts.layers())}
        if layer.name in quantised and self.compute_dtype is not None:
            return DTYPE_CODES[self.compute_dtype]
        parameter = layer.experts.parameter if isinstance(layer, FusedTarget) else f"{layer.name}.weight"
        loaded = str(self.skeleton.model.get_parameter(parameter).dtype).removeprefix("torch.")
        return DTYPE_CODES[self.strategy.training_dtype(loaded)]


def choose_targets(request: Request, base: AdaptedBase, adapter: Adapter) -> tuple[Adapter, Targets]:
    """The adapter as it can be, and what it adapts, confirmed by PEFT.

    Raises `UsageError` where nothing can be adapted, or not what was asked for.
    """
    skeleton, experts, layers = base.skeleton, base.experts, base.layers
    unknown = {*skeleton.fused_experts} - {fused.parameter for fused in skeleton.experts}
    check_asked(request.lora_experts, experts, layers, unknown)
    modules = tuple(name for name, _ in skeleton.model.named_modules())
    peft = Peft(model=skeleton.model, adapter=adapter.plain, experts=experts)
    if adapter.chooses is not None:
        targets = Targets(patterns=(adapter.chooses,), layers=(), matches={}, decisions=())
    else:
        targets = resolve_targets(
            layers,
            modules=experts.modules(modules),
            asked=request.lora_targets,
            fused_experts=bool(skeleton.fused_experts),
        )
        named = request.lora_targets not in (None, (ALL_LINEAR,))
        targets = peft.confirm(targets, asked=named, layers=layers)
    decisions: tuple[Decision, ...] = ()
    if request.lora_experts is not None:
        targets = experts.added_to(targets, modules=modules)
        if unknown:
            decisions = (not_reached(request.lora_experts, unknown),)
    elif "target_parameters" not in request.lora_settings:
        decisions = tuple(_untrained(request, skeleton, experts))
    adapter, otherwise = adapter.fitted(targets)
    if request.lora_experts is not None:
        targets = replace(peft, adapter=adapter.plain).confirm_experts(targets)
    adapter, targets = adapter.adapted(targets, partial(base.described, changed=adapter.changes_base))
    return adapter, replace(targets, decisions=(*targets.decisions, *otherwise, *decisions))


def _untrained(request: Request, skeleton: Skeleton, experts: Experts) -> tuple[Decision, ...]:
    weights = sum(prod(skeleton.model.get_parameter(name).shape) for name in skeleton.fused_experts)
    if not weights:
        return ()
    return (untrained(experts, weights, len(skeleton.fused_experts), request.lora_rank),)


def adapter_file(base: AdaptedBase, adapter: Adapter, targets: Targets) -> OutputFile:
    """The adapter's weights."""
    layers = (AdaptedLayer(layer=layer, dtype=base.dtype_of(layer)) for layer in (*targets.layers, *targets.fused))
    return output_file(ADAPTER_PATH, adapter.steps(layers))
