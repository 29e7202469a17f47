"""The initial values of one layer's adapter, by PEFT's own layer: alone in a model, under its whole name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..steps.step import Inputs, Sink
from .base_tensors import BaseTensor

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor, nn

    from .draws import Draws

Load = Callable[["nn.Module", Mapping[str, "Tensor"]], "nn.Module"]
"""A quantised layer, from the layer on `meta` and what it is stored in, by suffix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoneLayer:
    """A layer, or a module whose parameters are adapted, on `meta`, as PEFT finds it in the whole model."""

    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    """Those that are adapted as parameters, by their whole names; none of a layer."""
    config: LoraConfig
    """Of the whole model: ranks and alphas go by names."""

    def wrapped(self, module: nn.Module) -> dict[str, Tensor]:
        """What PEFT stores of its adapter, once it has wrapped `module`, which may change."""
        from peft import get_peft_model, get_peft_model_state_dict
        from torch import nn

        config = copy(self.config)
        config.target_modules = [] if self.parameters else [self.name]
        config.target_parameters = list(self.parameters) or None
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.modules_to_save = config.trainable_token_indices = config.task_type = None
        config.bias = "none"
        root = inner = nn.Module()
        *path, leaf = self.name.split(".")
        for part in path:
            inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.add_module(leaf, module)
        adapted: Any = get_peft_model(root, config)  # pyright: ignore[reportArgumentType] - any module will do
        return get_peft_model_state_dict(adapted, save_embedding_layers=False)

    def rehearse(self) -> None:
        """Wrap it on `meta`: what is drawn is drawn."""
        self.wrapped(deepcopy(self.module))

    def without_values(self) -> nn.Module:
        """It with weights that take no memory: all zero."""
        import torch

        module = deepcopy(self.module)
        for name, value in list(module.named_parameters()):
            zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
            _replace(module, name, zeros)
        return module

    def with_weight(self, value: Tensor) -> nn.Module:
        """It with this weight, in the dtype that the layer has."""
        module = self.without_values()
        _replace(module, "weight", value.to(module.get_parameter("weight").dtype))
        return module


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    from torch import nn

    inner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(inner), leaf, nn.Parameter(value, requires_grad=False))


@dataclass(frozen=True, kw_only=True, eq=False)
class FromWeight:
    """How an initialisation depends on the layer's weight."""

    base: BaseTensor
    load: Load | None
    """Of a layer that is 4-bit when PEFT wraps it."""
    changes: bool
    """Whether it changes the weight: what is left is the base's."""
    writes: bool
    """Whether the base's step is carried out with it."""
    copies: int
    """What PEFT allocates to compute it, in weights of two bytes an element."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InitByPeft:
    """Initialise the adapter of one layer, and write the base's weight where that is read for it."""

    layer: LoneLayer
    names: tuple[str, ...]
    """Of the adapter's tensors."""
    nbytes: int
    """Of all of these."""
    weight: FromWeight | None
    """None where nothing of the base is read."""
    draws: Draws
    number: int
    """Of the layer, among those that draw."""

    def memory(self, chunk_bytes: int) -> int:
        """The adapter in the layer's dtype and in float32, and what is computed of the weight."""
        own = 3 * self.nbytes
        if self.weight is None:
            return own
        return own + self.weight.base.memory(chunk_bytes) + self.weight.base.nbytes * self.weight.copies

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Read the weight if need be, let PEFT wrap the layer, and write what it made."""
        weight = self.weight
        module = self.layer.without_values() if weight is None else self._read(weight, inputs, sink)
        with self.draws.of(self.number):
            values = self.layer.wrapped(module)
        for name in self.names:
            sink.write(name, values[name])
        if weight is not None and weight.changes:
            changed = module.get_parameter("weight").data
            del module, values
            weight.base.write_changed(changed, inputs, sink)

    def _read(self, weight: FromWeight, inputs: Inputs, sink: Sink) -> nn.Module:
        if weight.changes or weight.base.alone is None:
            return self.layer.with_weight(weight.base.read(inputs))
        parts = weight.base.write(inputs, sink if weight.writes else None)
        if weight.load is None:
            return self.layer.with_weight(parts[""])
        return weight.load(self.layer.without_values(), parts)
