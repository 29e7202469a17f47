"""The QLoRA strategy (arXiv:2305.14314): a base in 4 bits, by default NF4 with double quantisation, and an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import MissingRequirementError
from .flags.request import Request
from .lora import Lora
from .model.tensor_map import ModelTensor
from .nf4.linear import NF4_LINEAR
from .steps.plain import plain_step
from .steps.quantisation import Quantisation
from .steps.step import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Qlora(Lora):
    """Training of an adapter on a 4-bit base."""

    name: str = "qlora"
    packages: tuple[str, ...] = ("peft", "bitsandbytes")
    quantisation: Quantisation = NF4_LINEAR

    def configured(self, request: Request, stored: Mapping[str, Any] | None) -> Qlora:
        """With the quantisation's settings."""
        return replace(self, quantisation=self.quantisation.configured(request, stored))

    def step(self, tensors: tuple[ModelTensor, ...]) -> Step:
        """Quantise what the quantisation covers, treat the rest as standard.

        Raises `MissingRequirementError` where transformers could not load what would be written.
        """
        problem = self.quantisation.problem(tensors)
        if problem is not None:
            raise MissingRequirementError(
                f"transformers can't load this model in {self.quantisation.bits} bits: tensor `{tensors[0].name}` "
                f"{problem}",
                hint="train it with --use_lora, on a bfloat16 base",
            )
        return self.quantisation.step(tensors) if self.quantisation.covers(tensors) else plain_step(tensors)

    def training_dtype(self, counted_as: str) -> str:
        """K-bit preparation turns everything that is 16-bit into float32."""
        return "float32" if counted_as in ("bfloat16", "float16") else counted_as
