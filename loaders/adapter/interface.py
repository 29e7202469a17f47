"""The seam for adapters: what is trained beside a frozen base. An implementation is a file beside this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..decision import Decision
from ..model.components import LinearLayer
from ..steps.step import Step
from .base_tensors import BaseTensor
from .experts import Experts
from .targets import Target, Targets

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedLayer:
    """A layer that gets an adapter, or a parameter, as PEFT finds it when it wraps it."""

    layer: Target
    dtype: str
    """safetensors code of its weight, or of what it computes in where the weight is quantised."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """The base, as an adapter finds it."""

    model: PreTrainedModel
    """On `meta`, as PEFT finds it when it wraps it: 4-bit layers are plain ones of the dtype that they compute in."""
    layers: tuple[LinearLayer, ...]
    """Of the model."""
    experts: Experts
    tensors: Mapping[str, BaseTensor]
    """By parameter; a tied one under all its names."""
    is_written: bool
    load: Callable[[nn.Module, Mapping[str, Tensor]], nn.Module] | None
    """Makes a 4-bit layer of one on `meta` and of what its weight is stored in, by suffix; None where none is 4-bit."""
    packed_under: str | None
    """torch's name of the dtype that 4-bit codes are stored under; None where nothing is 4-bit."""
    compute_dtype: str | None
    """torch's name of the dtype that 4-bit layers compute in."""
    training_dtype: Callable[[str], str]
    """torch's name of the dtype in which training has what is loaded in another one."""
    new_tokens: range
    """The tokens for which rows were added to the embedding."""


class Adapter(Protocol):
    """An adapter with all of its settings."""

    @property
    def changes_base(self) -> bool:
        """Whether its initial values are taken out of the base's weights."""
        ...

    @property
    def reads_base(self) -> bool:
        """Whether its initial values come from the base's, or are some of them."""
        ...

    @property
    def plain(self) -> Adapter:
        """One of this kind without the settings that not every layer allows: by it layers are chosen."""
        ...

    @property
    def chooses(self) -> str | None:
        """A regular expression that says which layers are adapted; None where they are chosen by names."""
        ...

    def fitted(self, targets: Targets) -> tuple[Adapter, tuple[Decision, ...]]:
        """The adapter as PEFT can make it for such targets, and what is otherwise than asked."""
        ...

    def adapted(self, targets: Targets, base: Callable[[], BaseModel]) -> tuple[Adapter, Targets]:
        """The adapter and its targets as PEFT makes them of a base, which is asked for only where it must be.

        Raises `UsageError` where PEFT refuses, in its words.
        """
        ...

    def tensors(self, layer: Target) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what is stored for a layer, all of it float32."""
        ...

    def steps(self, layers: Iterable[AdaptedLayer]) -> tuple[Step, ...]:
        """How its tensors are initialised, one step a layer, in the order in which PEFT draws random numbers."""
        ...

    def peft_config(self, targets: Targets) -> LoraConfig:
        """PEFT's configuration for these targets."""
        ...

    def config(self, targets: Targets, *, base: str, revision: str | None) -> dict[str, Any]:
        """The contents of adapter_config.json. `base` is a hub id or a path, `revision` the hub's commit."""
        ...

    def facts(self) -> dict[str, Any]:
        """Its settings, as the report names them."""
        ...
