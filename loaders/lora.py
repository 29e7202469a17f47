"""The LoRA strategy: the standard base, frozen, and a fresh low-rank adapter (arXiv:2106.09685) in float32.

Tensor names and adapter_config.json are PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .standard import Standard


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora(Standard):
    """Training of an adapter on a bfloat16 base."""

    name: str = "lora"
    has_adapter: bool = True
    packages: tuple[str, ...] = ("peft",)
