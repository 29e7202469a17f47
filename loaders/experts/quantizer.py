"""transformers' quantizer for bitsandbytes' 4 bits, which also loads experts that are stored so.

Without 4-bit experts in the checkpoint's files it is transformers' own. With them, the fused parameters are loaded
packed, and in the end each expert gets linear layers of its own, made from slices (`layers.py`).

Imported only where it is registered: torch, transformers and bitsandbytes are imported here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn

from ..checkpoint.formats.nf4 import Packed4Bit
from ..checkpoint.tensors import TORCH_NAMES
from ..errors import CheckpointError, UsageError
from ..model.experts.fused import FusedExperts, by_module, find_experts, take_apart
from ..model.transformers_internals import (
    WeightMapping,
    bitsandbytes_quantizer,
    conversion,
    conversion_base,
    experts_run_by,
    forget_stored_names,
)
from .layers import dequantize_layer, expert_layers
from .stored import stored_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUNCTION = "ftload_experts"
"""The name under which the experts' forward pass is registered."""
_Quantizer: Any = bitsandbytes_quantizer()
_Operation: Any = conversion_base()


class ExpertsQuantizer(_Quantizer):
    """`Bnb4BitHfQuantizer`, and experts."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._found = _Found()
        self.experts: tuple[FusedExperts, ...] = ()
        """Those that were loaded in 4 bits."""
        self._before: dict[str, Any] = {}
        """The configuration of each module of experts, as it was."""

    # -- before loading

    def before_loading(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        """Put a parameter of the packed size in the place of each that is stored in 4 bits."""
        experts = find_experts(model)
        if not experts or not files:
            return
        mapping = WeightMapping(model)
        stored = stored_experts(files, experts, lambda name: mapping.target(name)[0])
        self._found = _Found((one, stored[one.parameter]) for one in experts if one.parameter in stored)
        for one, packed in self._found:
            codes = packed.parts[0]
            if not self.pre_quantized:
                raise CheckpointError(
                    f"`{codes.name}` of `{codes.file}` is 4-bit, but config.json has no `quantization_config`",
                    hint="prepare the model again",
                )
            place = torch.empty(codes.shape, dtype=getattr(torch, TORCH_NAMES[codes.dtype]), device="meta")
            _set(model, one.parameter, nn.Parameter(place, requires_grad=False))

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """The conversions that put codes and statistics together, before any of the model's own could take them.

        Older releases of transformers do not pass the model.
        """
        ours = []
        for one, packed in self._found:
            names = [one.parameter + part.name.removeprefix(packed.name) for part in packed.parts]
            # a stored name may have a prefix more; the whole of the rest has to fit: a bias only begins like its weight
            patterns = [rf"(?<!\w){re.escape(name)}$" for name in names]
            ours.append(conversion(patterns, one.parameter, LoadExperts(self, packed)))
        return [*ours, *super().update_weight_conversions(weight_conversions, *model)]

    # -- after loading

    def after_loading(self, model: PreTrainedModel) -> None:
        """Take the experts apart."""
        layers: dict[str, list[nn.Linear]] = {}
        for one, _ in self._found:
            packed: Any = model.get_parameter(one.parameter)
            state = getattr(packed, "quant_state", None)
            if state is None or packed.device.type == "meta":
                raise CheckpointError(
                    f"the experts `{one.parameter}` were not loaded as the 4-bit ones that are stored"
                )
            layers[one.parameter] = expert_layers(
                one, packed.data, state, compute_dtype=self.quantization_config.bnb_4bit_compute_dtype
            )
        for name, together in by_module(one for one, _ in self._found).items():
            module = model.get_submodule(name)
            take_apart(module, together, lambda one, expert: layers[one.parameter][expert], range(together[0].experts))
            module.train(module.training)
            self._before[name] = experts_run_by(module, FUNCTION)
        self.experts, self._found = tuple(one for one, _ in self._found), _Found()

    # -- saving, and back to 16 bits

    def is_serializable(self) -> bool:
        """Not with 4-bit experts: saved one by one, they would be loaded as fused ones with random weights."""
        if self._before:
            warnings.warn(
                "a model with 4-bit experts can't be saved: the directory that it was loaded from holds it already; "
                "save its adapter, or `model.dequantize()` first",
                stacklevel=3,
            )
            return False
        return super().is_serializable()

    def before_dequantising(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        """Make the fused parameters again, in `dtype`; transformers goes on with all other layers."""
        for one in self.experts:
            module = model.get_submodule(one.module)
            layers = [module.get_submodule(f"{expert}.{one.projection}") for expert in range(one.experts)]
            fused: Tensor | None = None
            for expert, layer in enumerate(layers):
                weight = dequantize_layer(layer)
                if weight is None:
                    raise UsageError(
                        f"`{one.layer(expert).name}` has an adapter: `dequantize` the model before it gets one"
                    )
                weight = weight.t() if one.transposed else weight
                if fused is None:
                    fused = torch.empty(one.shape, dtype=dtype or weight.dtype, device=weight.device)
                fused[expert] = weight
            assert fused is not None
            _set(model, one.parameter, nn.Parameter(fused, requires_grad=False))
        for name, config in self._before.items():
            module: Any = model.get_submodule(name)
            for expert in range(module.num_experts):
                delattr(module, str(expert))
            module.config = config
        self.experts, self._before = (), {}
        forget_stored_names(model)  # the conversions above have no way back


class _Found(tuple[tuple[FusedExperts, Packed4Bit], ...]):
    """What is to be loaded; shared by copies: transformers copies its quantizer for each stored tensor."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Found:
        return self


class LoadExperts(_Operation):
    """The codes of a fused parameter and their statistics, put together to a `Params4bit`."""

    def __init__(self, quantizer: ExpertsQuantizer, stored: Packed4Bit) -> None:
        self.hf_quantizer = quantizer  # transformers casts nothing for an operation that has one
        self.stored = stored

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadExperts:
        """It has no state, and is copied for each stored tensor."""
        return self

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, source_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Stored tensors, by the pattern that each matched, to the parameter."""
        suffixes = [part.name.removeprefix(self.stored.name) for part in self.stored.parts]
        parts = {suffix: input_dict[pattern][0] for suffix, pattern in zip(suffixes, source_patterns, strict=True)}
        codes = parts.pop("")
        statistics = {suffix.removeprefix("."): part for suffix, part in parts.items()}
        return {full_layer_name: Params4bit.from_prequantized(codes, statistics, device=codes.device)}


def _set(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one of a name."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)
