"""A weight encoded in 4 bits while it streams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.formats.nf4 import BLOCK
from ..checkpoint.tensors import ITEM_BYTES, TORCH_NAMES, TensorMeta
from ..steps.step import Inputs, Sink, cast_bytes
from .encode import FourBits, statistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantize:
    """Encode a weight in 4 bits."""

    source: TensorMeta
    name: str
    transposed: bool
    """GPT-2's Conv1D stores (in, out); bitsandbytes wants (out, in)."""
    dtype: str
    """safetensors code of what it is cast to before: BF16, or F32 where the architecture keeps the layer so."""
    kind: FourBits

    def memory(self, chunk_bytes: int) -> int:
        """A chunk, its cast and its codes, absmax and its own codes; the whole tensor if it is transposed."""
        if self.transposed:
            chunk_bytes = max(chunk_bytes, self.source.nbytes)
        elements = min(chunk_bytes // ITEM_BYTES[self.source.dtype], self.source.parameters)
        return (
            chunk_bytes
            + cast_bytes(self.source, self.dtype, chunk_bytes)
            + elements // 2
            + (ITEM_BYTES[self.dtype] * elements if self.transposed else 0)
            + -(-self.source.parameters // BLOCK) * 6
        )

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Encode chunk by chunk; absmax (n/64 float32) is held until the end.

        Raises `CheckpointError` naming the tensor when it holds NaN or infinity.
        """
        import torch

        assert inputs.encode is not None
        shape = self.source.shape[::-1] if self.transposed else self.source.shape
        # the encoder finds what is not finite at no cost
        if self.transposed:
            chunks: Iterable[Tensor] = [inputs.read(self.source, self.dtype, checked=False).T]
        else:
            chunks = inputs.chunks(self.source, self.dtype, multiple=BLOCK, checked=False)
        all_absmax, done = torch.empty(-(-self.source.parameters // BLOCK)), 0
        for values in chunks:
            try:
                codes, absmax = inputs.encode(values)
            except ValueError:
                inputs.read(self.source, self.dtype)  # says more of it
                raise
            sink.write(self.name, codes)
            all_absmax.numpy()[done : done + absmax.numel()] = absmax.numpy()
            done += absmax.numel()
        for suffix, value in statistics(all_absmax, shape, TORCH_NAMES[self.dtype], self.kind).items():
            sink.write(self.name + suffix, value)
