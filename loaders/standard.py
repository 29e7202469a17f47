"""The standard strategy: all weights in bfloat16, all of them trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapter.interface import Adapter
from .errors import CheckpointError
from .flags.request import Request
from .model.tensor_map import ModelTensor
from .steps.plain import plain_step
from .steps.quantisation import Quantisation
from .steps.step import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Standard:
    """Full fine-tuning of a bfloat16 model."""

    name: str = "standard"
    packages: tuple[str, ...] = ()
    quantisation: Quantisation | None = None

    def configured(self, request: Request, stored: Mapping[str, Any] | None) -> Standard:
        """The same: nothing is quantised."""
        return self

    def adapter(self, request: Request) -> Adapter | None:
        """None: all weights are trained."""
        return None

    def step(self, tensors: tuple[ModelTensor, ...]) -> Step:
        """Copy, cast, grow or convert.

        Raises `CheckpointError` for a tensor that is stored in 4 bits.
        """
        for tensor in tensors:
            if tensor.packed is not None:
                raise CheckpointError(
                    f"the checkpoint is already quantised to 4 bits (tensor `{tensor.name}`)",
                    hint="prepare it with --use_qlora, or decode it with --dequantize",
                )
        return plain_step(tensors)

    def training_dtype(self, counted_as: str) -> str:
        """The dtype in training of base weights that are stored as `counted_as`: the same."""
        return counted_as
