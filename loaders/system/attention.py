"""The attention implementation that works here."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..decision import Decision
from ..errors import said_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """The attention implementation that was asked for and the one that works here."""

    requested: str
    effective: str
    reason: str | None
    """Why they differ; None when they don't."""

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The difference, if there is one."""
        if self.reason is None:
            return ()
        return (Decision(what="attention", requested=self.requested, effective=self.effective, reason=self.reason),)


def resolve_attention(model_class: type[PreTrainedModel], *, use_flash_attn: bool) -> Attention:
    """FlashAttention 2 where it was asked for and runs; else PyTorch's sdpa where the model supports it; else eager."""
    if not use_flash_attn:
        return Attention(requested="eager", effective="eager", reason=None)
    problem = _flash_attention_problem(model_class)
    if problem is None:
        return Attention(requested="flash_attention_2", effective="flash_attention_2", reason=None)
    fallback = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    return Attention(requested="flash_attention_2", effective=fallback, reason=problem)


def _flash_attention_problem(model_class: type[PreTrainedModel]) -> str | None:
    import torch

    if not getattr(model_class, "_supports_flash_attn", False):
        return f"`{model_class.__name__}` does not support FlashAttention"
    if not torch.cuda.is_available():
        return "FlashAttention needs a GPU, and there is none"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"FlashAttention 2 needs compute capability 8.0, `{torch.cuda.get_device_name()}` is older"
    try:
        importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        return "flash-attn is not installed"
    except Exception as error:  # built for another torch: ImportError, OSError or RuntimeError
        return f"flash-attn does not import: {said_by(error)}"
    return None
