"""The attention implementation that works here."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from ..decision import Decision
from ..errors import said_by


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSupport:
    """Which implementations a model supports."""

    model: str
    """Its class."""
    flash: bool
    sdpa: bool


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


def resolve_attention(support: AttentionSupport, *, use_flash_attn: bool) -> Attention:
    """FlashAttention 2 where it was asked for and runs; else PyTorch's sdpa where the model supports it; else eager."""
    if not use_flash_attn:
        return Attention(requested="eager", effective="eager", reason=None)
    problem = _flash_attention_problem(support)
    if problem is None:
        return Attention(requested="flash_attention_2", effective="flash_attention_2", reason=None)
    fallback = "sdpa" if support.sdpa else "eager"
    return Attention(requested="flash_attention_2", effective=fallback, reason=problem)


def _flash_attention_problem(support: AttentionSupport) -> str | None:
    import torch

    if not support.flash:
        return f"`{support.model}` does not support FlashAttention"
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
