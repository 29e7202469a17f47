"""One linear layer an expert, made from slices of the 4-bit parameter that holds all experts of a layer.

The blocks of 64 weights that share one absmax run along the flat parameter (experts, out, in), and so do the 256 blocks
that share one statistic of double quantisation (`loaders/checkpoint/formats/nf4.py` has the layout). Where an expert's
weights are whole blocks, its codes and statistics are slices of all experts', and nothing is copied.

Imported only where such layers are made: torch and bitsandbytes are imported here.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

from ..checkpoint.formats.nf4 import BLOCK, NESTED_BLOCK
from ..model.experts.fused import FusedExperts
from ..nf4.slices import nested_in_slices, rows_in_blocks


def expert_layers(fused: FusedExperts, codes: Tensor, state: Any, *, compute_dtype: torch.dtype) -> list[nn.Linear]:
    """The layers of all experts, from the fused parameter's `codes` (two a byte, in any dtype) and its `state`.

    Each maps (…, in) to (…, out) and is bitsandbytes' own `Linear4bit` wherever that computes the right thing, else a
    `PackedExpert`: for a weight that is stored (in, out), and for rows that are no whole blocks, which bitsandbytes'
    kernel for CPUs (0.50) multiplies by the absmax of other blocks. None repacks its weight in eval mode on CPUs with
    AVX512-BF16: gradients would be wrong from then on.
    """
    size = fused.in_features * fused.out_features
    if state.nested and not nested_in_slices(fused):
        # an expert ends within 256 blocks: absmax itself, in float32, for all experts at once
        state = QuantState(
            absmax=dequantize_blockwise(state.absmax, state.state2) + state.offset, shape=state.shape, code=state.code,
            blocksize=state.blocksize, quant_type=state.quant_type, dtype=state.dtype,
        )  # fmt: skip
    storage, packed = codes.dtype, codes.detach().reshape(-1).view(torch.uint8)
    layers = []
    for expert in range(fused.experts):
        first = expert * size // BLOCK * BLOCK
        last = min(-(-(expert + 1) * size // BLOCK) * BLOCK, fused.experts * size)
        part = packed[first // 2 : (last + 1) // 2]
        statistics = _slice(state, first // BLOCK, -(-last // BLOCK))
        statistics.shape = torch.Size((fused.out_features, fused.in_features))
        if rows_in_blocks(fused):
            layers.append(_plain_layer(fused, part.view(storage).reshape(-1, 1), statistics, compute_dtype))
        else:
            layers.append(
                PackedExpert(
                    fused, part.reshape(-1, 1), statistics, skipped=expert * size - first, compute_dtype=compute_dtype
                )
            )
    return layers


def _slice(state: Any, first: int, last: int) -> QuantState:
    """The state of the blocks from `first` to `last` (exclusive); of a nested one, they begin and end with its own."""
    state2 = None
    if state.nested:
        nested = state.state2.absmax[first // NESTED_BLOCK : -(-last // NESTED_BLOCK)]
        state2 = QuantState(
            absmax=nested, code=state.state2.code, blocksize=state.state2.blocksize, dtype=state.state2.dtype
        )
    return QuantState(
        absmax=state.absmax[first:last], code=state.code, blocksize=state.blocksize, quant_type=state.quant_type,
        dtype=state.dtype, offset=state.offset, state2=state2,
    )  # fmt: skip


def _plain_layer(fused: FusedExperts, codes: Tensor, state: QuantState, compute_dtype: torch.dtype) -> Linear4bit:
    settings: dict[str, Any] = {
        "compress_statistics": state.nested,
        "quant_type": state.quant_type,
        "quant_storage": codes.dtype,
    }
    layer: Any = Linear4bit(
        fused.in_features, fused.out_features, bias=False, compute_dtype=compute_dtype, device="meta", **settings
    )
    settings |= {"quant_state": state, "blocksize": state.blocksize, "bnb_quantized": True, "module": layer}
    layer.weight = Params4bit(codes, **settings)
    layer.quant_state = state
    layer.support_avx512bf16_for_cpu = False
    return layer


def dequantize_layer(layer: nn.Module) -> Tensor | None:
    """The weight (out, in) of one of these layers, in the dtype that it had before it was quantised; None of others."""
    weight: Any = layer.weight if isinstance(layer, (Linear4bit, PackedExpert)) else None
    if isinstance(layer, PackedExpert):
        return layer.dequantize(weight.quant_state.dtype)
    return None if weight is None else dequantize_4bit(weight.data, weight.quant_state)


class PackedExpert(nn.Linear):
    """A linear layer without bias whose weight is dequantised whenever it is needed, and kept at no time.

    It computes as `Linear4bit` does: in `compute_dtype`, with a result in the dtype of its input. PEFT wraps it as an
    ordinary linear layer, and rounds a new adapter as on `Linear4bit`, to that dtype. An adapter can't be merged into
    it: the weight is no `Params4bit` but bytes of another shape, to which PEFT fails to add anything.
    """

    def __init__(
        self, fused: FusedExperts, codes: Tensor, state: QuantState, *, skipped: int, compute_dtype: torch.dtype
    ) -> None:
        """`codes` (uint8, n × 1) hold whole blocks, of which the first `skipped` weights are another expert's."""
        super().__init__(fused.in_features, fused.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.transposed = fused.transposed
        self.skipped = skipped
        self.compute_dtype = compute_dtype
        self.quant_state = state
        self._attach_state()

    def _attach_state(self) -> None:
        weight: Any = self.weight
        weight.quant_state = self.quant_state  # as on a `Params4bit`: who counts parameters asks for its shape

    def _apply(self, fn: Any, recurse: bool = True) -> PackedExpert:
        """Statistics follow the weight to its device."""
        super()._apply(fn, recurse)
        self.quant_state.to(self.weight.device)
        self._attach_state()
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`: a copy of this expert's, or a transposed view of one."""
        size = self.in_features * self.out_features
        length = min(-(-(self.skipped + size) // BLOCK) * BLOCK, 2 * self.weight.numel())
        state = self.quant_state
        # one row: where rows are no whole blocks, the kernel for CPUs takes the absmax of another block
        flat = QuantState(
            absmax=state.absmax, shape=torch.Size((1, length)), code=state.code, blocksize=state.blocksize, dtype=dtype,
            quant_type=state.quant_type, offset=state.offset, state2=state.state2,
        )  # fmt: skip
        values = dequantize_4bit(self.weight.detach(), flat).reshape(-1)[self.skipped : self.skipped + size]
        if self.transposed:
            return values.view(self.in_features, self.out_features).t()
        return values.view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) to (…, out), in the dtype of `input`."""
        result: Any = _Multiply.apply(input.to(self.compute_dtype), self)
        return result.to(input.dtype)


class _Multiply(torch.autograd.Function):
    """A product with a weight that is dequantised again for the backward pass: nothing is saved for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedExpert) -> Tensor:
        ctx.layer = layer
        if not x.numel():
            return x.new_empty(*x.shape[:-1], layer.out_features)
        return nn.functional.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        if not gradient.numel():
            return gradient.new_empty(*gradient.shape[:-1], ctx.layer.in_features), None
        return gradient @ ctx.layer.dequantize(gradient.dtype), None
