"""The LoRA strategy: the standard base, frozen, and a fresh low-rank adapter (arXiv:2106.09685) in float32."""

from __future__ import annotations

from dataclasses import dataclass

from .adapter.interface import Adapter
from .adapter.peft_lora import PeftLora
from .adapter.peft_variant import PeftVariant
from .flags.request import Request
from .standard import Standard


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora(Standard):
    """Training of an adapter on a bfloat16 base."""

    name: str = "lora"
    packages: tuple[str, ...] = ("peft",)

    def adapter(self, request: Request) -> Adapter:
        """LoRA as PEFT makes it; PEFT is imported only for settings other than the default's."""
        return PeftVariant.of(request) if request.lora_settings else PeftLora.of(request)
