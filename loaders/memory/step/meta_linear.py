"""Linear layers for `meta`: one with a quantised weight, and the default adapter beside one.

Each allocates, and saves for the backward pass, what the real one does, and computes nothing.

This module imports torch: import it where a step is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .setting import LoraSetting, Setting


class _Product(torch.autograd.Function):
    """As `MatMul4Bit`: only the packed weight is saved; it is unpacked in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return torch.nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None


class QuantisedLinear(nn.Module):
    """In place of bitsandbytes' `Linear4bit`, without its packed weight: that is counted with the weights."""

    def __init__(self, shape: tuple[int, int], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.shape, self.bias = shape, bias
        self.out_features, self.in_features = shape

    @property
    def weight(self) -> Tensor:
        """The weight as PEFT unpacks it: anew each time, (out, in)."""
        return torch.empty(self.shape, device="meta", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """The product, in bfloat16."""
        bias = None if self.bias is None else self.bias.bfloat16()
        product: Any = _Product.apply(x.bfloat16(), self.shape, bias)
        return product.to(x.dtype)


def quantised_linear(linear: nn.Module) -> nn.Module:
    """The quantised one in place of a linear layer or a Conv1D."""
    return QuantisedLinear(_out_in(linear), getattr(linear, "bias", None))


def _out_in(linear: Any) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns) if hasattr(linear, "out_features") else (columns, rows)


class _Lora(nn.Module):
    def __init__(self, base: Any, lora: LoraSetting, rank: int, *, casts: bool) -> None:
        super().__init__()
        self.base, self.scaling, self.casts = base, lora.alpha / rank, casts
        self.dtype = dtype = getattr(torch, lora.dtype)
        out_features, in_features = base.shape if isinstance(base, QuantisedLinear) else _out_in(base)
        self.a = nn.Linear(in_features, rank, bias=False, device="meta", dtype=dtype)
        self.b = nn.Linear(rank, out_features, bias=False, device="meta", dtype=dtype)
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        update = self.b(self.a(self.dropout(x.to(self.dtype) if self.casts else x))) * self.scaling
        return (result + update).to(result.dtype)


def lora_linear(base: Any, lora: LoraSetting, *, rank: int, setting: Setting) -> nn.Module:
    """In place of PEFT's LoRA layer: `base(x) + B(A(dropout(x))) · alpha / r`, with x in the dtype of A.

    Beside a 4-bit weight x is left to autocast where that is on, for CUDA: PEFT asks for that device alone.
    """
    on_cuda = setting.autocast and setting.device == "cuda"
    return _Lora(base, lora, rank, casts=not (isinstance(base, QuantisedLinear) and on_cuda))
