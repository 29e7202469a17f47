"""The seam for quantisations: how weights of the base are stored in fewer bits.

A strategy has one or none. An implementation lies in a package of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..decision import Decision
from ..flags.request import Request
from ..model.experts.fused import FusedExperts
from ..model.tensor_map import ModelTensor
from .step import Encoder, OutputTensor, Step

if TYPE_CHECKING:
    from torch import Tensor, nn


class Quantisation(Protocol):
    """What is quantised, into which tensors, and what config.json says of it."""

    @property
    def tag(self) -> str:
        """The word under which reports count what it stores."""
        ...

    @property
    def tags(self) -> tuple[str, ...]:
        """Every word that `tag` can be, whatever is asked for."""
        ...

    @property
    def bits(self) -> int:
        """Of a weight, statistics aside."""
        ...

    @property
    def block_size(self) -> int:
        """Weights that share an absmax."""
        ...

    def configured(self, request: Request, stored: Mapping[str, Any] | None) -> Quantisation:
        """The same with the settings that are asked for; `stored` is the checkpoint's own `quantization_config`.

        Raises `CheckpointError` for stored settings that have no meaning.
        """
        ...

    def covers(self, tensors: tuple[ModelTensor, ...]) -> bool:
        """Whether it is this that stores a group of tensors; all others are stored as without quantisation."""
        ...

    def step(self, tensors: tuple[ModelTensor, ...]) -> Step:
        """How a group that it covers is written: encoded, or taken over where the checkpoint holds it so already."""
        ...

    def load(self, layer: nn.Module, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A layer with a quantised weight in the place of `layer`, as a `quantization_config` says it is loaded.

        `parts` are what its weight is stored in, by what follows its name.
        """
        ...

    def loaded(self, part: OutputTensor, experts: FusedExperts) -> OutputTensor:
        """A tensor that is stored of these experts, as they are held once loaded; empty where it is not held."""
        ...

    @property
    def mixed_precision(self) -> str | None:
        """torch's name of the dtype in which FSDP has to gather weights, to divide what it stores; None if it can't."""
        ...

    def is_divided(self, part: OutputTensor, experts: FusedExperts | None) -> bool:
        """Whether FSDP divides what a tensor that it stores becomes in memory; else each GPU holds it whole."""
        ...

    def problem(self, tensors: tuple[ModelTensor, ...]) -> str | None:
        """Why a model with these tensors could not be loaded once it is quantised; None where it could."""
        ...

    def config(self, stored: Mapping[str, Any] | None) -> dict[str, Any]:
        """config.json's `quantization_config`, made from the checkpoint's own where that is already quantised."""
        ...

    def compute_dtype(self, config: Mapping[str, Any]) -> str:
        """torch's name of the dtype that a `quantization_config` lets layers compute in."""
        ...

    def facts(self, config: Mapping[str, Any], block_size: int) -> dict[str, Any]:
        """What the report says of a `quantization_config`."""
        ...

    def choose_encoder(self, device: str) -> tuple[Encoder, tuple[Decision, ...]]:
        """The encoder for `cpu` or `cuda`, and what is done otherwise than expected.

        Raises `MissingRequirementError` where there is none for the device.
        """
        ...

    def try_library(self) -> str:
        """Use the library that loads what is written; returns what was done. Raises whatever the library raises."""
        ...

    def try_encoder(self) -> str:
        """Use the encoder; returns what was done. Raises `MissingRequirementError` where it can't be used."""
        ...
