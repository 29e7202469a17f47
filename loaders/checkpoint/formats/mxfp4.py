"""The experts of gpt-oss in 4 bits (MXFP4): how they are stored and decoded.

The weights `W` of E experts, each (in, out), are stored transposed: `W_blocks` (uint8, E × out × in/32 × 16: two E2M1
codes a byte, the first in the lower half) and `W_scales` (uint8, E × out × in/32: one E8M0 scale for 32 codes). A value
is E2M1[code] · 2^(scale - 127), which bfloat16 holds exactly. Biases and all else are stored as they are. Sources: OCP
Microscaling Formats (MX) Specification 1.0, section 5, for the two types; transformers' `integrations/mxfp4.py` for the
layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ..tensors import TORCH_NAMES, TensorMeta
from .interface import Headers, PackedTensor, Read, decoded_by_numba

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
"""Values that share one scale."""
_BYTES = BLOCK // 2
"""Of a block."""
_ROWS = 960
"""Stored rows that are read and transposed together: more are no faster, and those of gpt-oss are a multiple of it."""
_TILE = 6 * 2**20
"""The most elements that are decoded together, where that takes no more than four parts of an expert."""
_NAN = 255
"""The scale that means NaN (section 5.4.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedExperts(PackedTensor):
    """The weights of several experts, (E, in, out).

    A tile is one of a few equal parts of an expert, some of its rows. These are columns where they are stored: for each
    part all blocks of the expert are read.
    """

    def reading_bytes(self, elements: int) -> int:
        """Blocks of some rows and the scales of an expert.

        Where values are cut into chunks, all that are decoded together, what is left of those before, and the chunk
        that was handed out last.
        """
        _, inputs, outputs = self.shape
        packed = inputs * outputs // BLOCK + min(_ROWS, outputs) * inputs // 2
        cut = 0 if elements >= self.parameters else max(self.tile, elements) + elements
        return packed + 2 * cut + 64 * 1024

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode part after part. Raises `CheckpointError` for a scale that is NaN."""
        import torch

        values = torch.empty(end - begin, dtype=torch.bfloat16)
        bits = values.view(torch.uint16).numpy().reshape(-1, self.tile // self.shape[2], self.shape[2])
        for place, part in enumerate(range(begin // self.tile, end // self.tile)):
            self._decode(part, bits[place], read)
        return values

    def _decode(self, part: int, bits: Any, read: Read) -> None:
        """Into the bits of bfloat16 (uint16, some rows × out)."""
        blocks, scales = self.parts
        _, inputs, outputs = self.shape
        groups = inputs // BLOCK
        expert, row = divmod(part * bits.shape[0], inputs)
        exponents = read(scales, expert * outputs * groups, (expert + 1) * outputs * groups).numpy()
        if (exponents == _NAN).any():
            raise CheckpointError(
                f"tensor `{scales.name}` of `{scales.file}` holds a scale that is NaN ({_NAN}), of expert {expert}",
                hint="the checkpoint is damaged or was saved from a diverged run",
            )
        exponents = exponents.reshape(outputs, groups)
        for first in range(0, outputs, _ROWS):
            strip = exponents[first : first + _ROWS]
            begin = (expert * outputs + first) * groups * _BYTES
            codes = read(blocks, begin, begin + strip.size * _BYTES).numpy()
            _decoder()(codes.reshape(*strip.shape, _BYTES), strip, bits, row // BLOCK, first)
            del codes  # before the next are read


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4:
    """MXFP4 as gpt-oss has it."""

    name: str = "MXFP4"
    method: str = "mxfp4"
    kind: str = "MXFP4"

    def find(self, headers: Headers, *, strict: bool) -> Iterator[PackedExperts]:
        """Blocks and scales that belong together.

        Raises `CheckpointError`, if `strict`, where config.json means this format: for blocks or scales alone, of
        another shape or dtype, and beside the weights themselves, and for experts none of which are stored so.
        """
        tensors = headers.tensors
        claimed = strict and self.claims(headers.section, found=False)
        if claimed:
            _check_experts(tensors)
        for weight in dict.fromkeys(
            name.removesuffix(suffix) for name in tensors for suffix in (BLOCKS, SCALES) if name.endswith(suffix)
        ):
            problem = _problem(tensors, weight)
            if problem is None:
                blocks, scales = tensors[weight + BLOCKS], tensors[weight + SCALES]
                experts, outputs, groups, _ = blocks.shape
                shape = (experts, groups * BLOCK, outputs)
                yield PackedExperts(
                    name=weight, shape=shape, dtype="BF16", file=blocks.file, begin=blocks.begin, end=blocks.end,
                    format=self, parts=(blocks, scales), tag=self.method, tile=_tile(groups * BLOCK, outputs),
                )  # fmt: skip
            elif claimed:  # else the name means nothing
                raise CheckpointError(problem, hint="the checkpoint is damaged, or not stored as gpt-oss is")

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        """By its method alone."""
        return section.get("quant_method") == self.method

    def kept_settings(self, section: Mapping[str, Any]) -> None:
        """Nothing: transformers finds bfloat16."""


def _tile(inputs: int, outputs: int) -> int:
    """Elements that are decoded together, for experts of (in, out): whole blocks of all columns."""
    cuts = [cut for cut in (1, 2, 3, 4) if inputs // BLOCK % cut == 0]
    enough = [cut for cut in cuts if inputs * outputs // cut <= _TILE]
    return inputs * outputs // (enough[0] if enough else cuts[-1])


def _check_experts(tensors: Mapping[str, TensorMeta]) -> None:
    """Raise `CheckpointError` where all experts are stored as they are."""
    if any(name.endswith((BLOCKS, SCALES)) for name in tensors):
        return
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            raise CheckpointError(
                f"config.json says MXFP4, but no tensor is stored so: `{name}` of `{tensor.file}` holds "
                f"{TORCH_NAMES[tensor.dtype]}",
                hint="config.json and the weights must belong together",
            )


def _problem(tensors: Mapping[str, TensorMeta], weight: str) -> str | None:
    """Why a weight can't be decoded from its blocks and scales; None where it can."""
    parts = []
    for suffix, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        part = tensors.get(weight + suffix)
        if part is None:
            return f"tensor `{weight}{suffix}` is missing, where there is `{weight}{other}`"
        if part.dtype != "U8":
            return f"tensor `{part.name}` of `{part.file}` holds {TORCH_NAMES[part.dtype]}, MXFP4 is stored in uint8"
        parts.append(part)
    blocks, scales = parts
    if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or not blocks.parameters:
        return (
            f"tensor `{blocks.name}` of `{blocks.file}` has shape {list(blocks.shape)}, the blocks of experts have "
            f"[experts, rows, blocks, {_BYTES}]"
        )
    if scales.shape != blocks.shape[:-1]:
        return (
            f"tensor `{scales.name}` of `{scales.file}` has shape {list(scales.shape)}, its blocks ask for "
            f"{list(blocks.shape[:-1])}"
        )
    if weight in tensors:
        return f"tensor `{weight}` is both in `{tensors[weight].file}` and, as MXFP4, in `{blocks.file}`"
    return None


@cache
def _decoder() -> Any:
    """The compiled loop. Raises `MissingRequirementError` where numba can't be used."""
    import numpy as np

    with decoded_by_numba("MXFP4"):
        from .mxfp4_kernel import decode_transposed

        one = np.zeros((1, 1, _BYTES), np.uint8)
        decode_transposed(one, np.zeros((1, 1), np.uint8), np.empty((BLOCK, 1), np.uint16), 0, 0)
    return decode_transposed
