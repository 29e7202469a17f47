"""The seam for adapters: what is trained beside a frozen base. An implementation is a file beside this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..decision import Decision
from ..model.tensor_map import ModelTensor
from ..steps.step import Step
from .targets import Target, Targets

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedLayer:
    """A layer that gets an adapter, or a parameter, as PEFT finds it when it wraps it."""

    layer: Target
    dtype: str
    """safetensors code of its weight, or of what it computes in where the weight is quantised."""
    weight: ModelTensor | None
    """The weight as the base holds it; None where it is merged from several tensors, and for experts."""


class Adapter(Protocol):
    """An adapter with all of its settings."""

    def fitted(self, targets: Targets) -> tuple[Adapter, tuple[Decision, ...]]:
        """The adapter as PEFT can make it for such targets, and what is otherwise than asked."""
        ...

    def tensors(self, layer: Target) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what is stored for a layer, all of it float32."""
        ...

    def steps(self, layers: Iterable[AdaptedLayer]) -> tuple[Step, ...]:
        """How its tensors are initialised, one step a layer, in the order in which PEFT draws random numbers."""
        ...

    def peft_config(self, targets: Targets) -> PeftConfig:
        """PEFT's configuration for these targets."""
        ...

    def config(self, targets: Targets, *, base: str, revision: str | None) -> dict[str, Any]:
        """The contents of adapter_config.json. `base` is a hub id or a path, `revision` the hub's commit."""
        ...

    def facts(self) -> dict[str, Any]:
        """Its settings, as the report names them."""
        ...
