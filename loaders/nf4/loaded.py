"""A 4-bit layer as transformers loads it, from the tensors that it is stored in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..system.quiet import quiet_bitsandbytes

if TYPE_CHECKING:
    from torch import Tensor, nn


def loaded_layer(layer: nn.Module, parts: Mapping[str, Tensor], compute_dtype: str) -> nn.Module:
    """bitsandbytes' `Linear4bit` in the place of `layer`, a linear layer (out, in).

    `parts` go by what follows the weight's name: nothing for the codes. `compute_dtype` is torch's name.
    """
    import torch

    with quiet_bitsandbytes():
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

    rows, columns = layer.get_parameter("weight").shape
    loaded: Any = Linear4bit(columns, rows, bias=False, compute_dtype=getattr(torch, compute_dtype), device="meta")
    statistics = {suffix.removeprefix("."): value for suffix, value in parts.items() if suffix}
    loaded.weight = Params4bit.from_prequantized(
        data=parts[""], quantized_stats=statistics, requires_grad=False, device="cpu", module=loaded
    )
    return loaded
