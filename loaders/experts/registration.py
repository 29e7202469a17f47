"""Telling transformers how to load and run experts that are stored in 4 bits."""

from __future__ import annotations

from ..system.quiet import quiet_bitsandbytes


def register_experts() -> None:
    """Let `from_pretrained` load 4-bit experts from now on, in this process; all other models as before.

    It may be called more than once. torch, transformers and bitsandbytes are imported.
    """
    with quiet_bitsandbytes():
        from ..model.transformers_internals import register_experts_function, replace_bitsandbytes_quantizer
        from .forward import experts_forward
        from .quantizer import FUNCTION, ExpertsQuantizer

    register_experts_function(FUNCTION, experts_forward)
    replace_bitsandbytes_quantizer(ExpertsQuantizer)
