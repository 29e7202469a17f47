"""The Liger strategy: the standard weights, and Liger's Triton kernels when they are loaded.

Nothing of Liger is stored on disk. The kernels are applied to the loaded model, and its forward pass is replaced on it
alone. Liger also replaces rotary embedding, norm and MLP in transformers' module of that architecture: other models of
the same architecture in the process may come to use them too.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decision import Decision
from .errors import said_by
from .standard import Standard
from .system.quiet import quiet_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_KERNELS = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "fused_linear_cross_entropy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Whether Liger has kernels for an architecture, and which ones are applied on loading."""

    supported: bool
    applied: tuple[str, ...]
    reason: str | None
    """Why there are none; None where there are some."""

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """That there are none, where that is so."""
        if self.reason is None:
            return ()
        return (Decision(what="use_liger_kernel", requested="true", effective="false", reason=self.reason),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Liger(Standard):
    """Full fine-tuning with Liger kernels and their fused linear cross-entropy."""

    name: str = "liger"
    packages: tuple[str, ...] = ("liger-kernel",)


def liger_kernels(model_type: str) -> tuple[str, ...]:
    """The kernels that Liger has for an architecture, empty where it has none.

    Raises `ImportError` where liger-kernel or Triton is missing or broken.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if apply is None:
        return ()
    parameters = inspect.signature(apply).parameters
    return tuple(kernel for kernel in _KERNELS if kernel in parameters)


def resolve_kernels(model_type: str) -> Kernels:
    """The kernels for an architecture, whatever the state of the packages here."""
    applied: tuple[str, ...] = ()
    try:
        with quiet_bitsandbytes():  # Liger imports PEFT
            applied = liger_kernels(model_type)
        reason = None if applied else f"Liger has no kernels for `{model_type}`"
    except Exception as error:  # a missing or broken Triton raises whatever it likes
        reason = f"liger-kernel does not import: {said_by(error)}"
    return Kernels(supported=bool(applied), applied=applied, reason=reason)


def apply_liger(model: PreTrainedModel) -> tuple[str, ...]:
    """Patch one loaded model in place; returns the kernels in effect, none where Liger has none for it."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kernels = liger_kernels(model.config.model_type)
    if not kernels:
        return ()
    options = dict.fromkeys(kernels, True)
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, **options)
    return kernels


def liger_problem() -> str | None:
    """Why Liger's kernels can't run here; None when they can."""
    import torch

    if not torch.cuda.is_available():
        return "Liger's Triton kernels need a GPU, and there is none"
    try:
        importlib.import_module("liger_kernel.transformers")
    except Exception as error:  # a broken Triton raises whatever it likes
        return f"liger-kernel does not import: {said_by(error)}"
    return None
