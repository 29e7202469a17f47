"""4-bit weights of bitsandbytes: how they are stored, decoded, and checked.

A weight `W` of n elements is stored as `W` (uint8, (n+1)//2 × 1: two codes a byte, the first in the upper half; with
`bnb_4bit_quant_storage`, the same bytes under another dtype, as FSDP needs them),
`.absmax` (one a block: float32, or uint8 codes with double quantisation), `.quant_map` (float32, 16: the code book) and
`.quant_state.bitsandbytes__nf4` or `…__fp4` (uint8: JSON); with double quantisation `.nested_absmax` (float32, one for
256 blocks) and `.nested_quant_map` (float32, 256) as well. Sources: QLoRA, arXiv:2305.14314, appendix E for NF4's code
book and section 3 for double quantisation; bitsandbytes' `get_4bit_type` for FP4's, `QuantState.as_dict(packed=True)`
for the layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ..tensors import DTYPE_CODES, TensorMeta
from .interface import Headers, PackedTensor, Read

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Weights that share one absmax."""
NESTED_BLOCK = 256
"""Values of absmax that share one of their own."""

ANY_STATE = ".quant_state.bitsandbytes__"
"""What follows is the type: nf4 or fp4."""
_MOST_STATE_BYTES = 64 * 1024
"""A state has some 200."""
CODE_BOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4 (QLoRA, appendix E)."""
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
CODE_BOOKS = {"nf4": CODE_BOOK, "fp4": (*_FP4, 0.0, *(-value for value in _FP4[1:]))}
"""By type. FP4 is a sign, two bits of exponent and one of mantissa, where the largest value is 1. Its second zero is +0
on every machine, as in bitsandbytes' `get_4bit_type` and its kernels for AVX-512 and NEON; its others give -0."""


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (float32, ascending), in which absmax is stored.

    Seven decades, each twice as finely divided as the one below, mirrored, and 0 and 1 (arXiv:1511.04561, as
    bitsandbytes' `create_dynamic_map` computes it).
    """
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What the JSON state of a 4-bit weight says."""

    shape: tuple[int, ...]
    """(out_features, in_features)."""
    dtype: str
    """torch's name for what the weight was, and is decoded to."""
    block_size: int
    nested_block_size: int | None
    """None without double quantisation."""
    nested_offset: float
    """What was taken off absmax before that was quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed4Bit(PackedTensor):
    """A weight in 4 bits."""

    state: State

    def reading_bytes(self, elements: int) -> int:
        """Codes as they are stored (half a byte) and as indices (2 bytes), float32 values, and those of absmax."""
        elements = min(max(elements, self.tile), self.parameters)
        blocks = -(-elements // self.state.block_size)
        return elements * 13 // 2 + blocks * 32 + 4096

    @property
    def stored_bytes(self) -> int:
        """Size of codes and statistics; the JSON state counts as the file's overhead."""
        return sum(part.nbytes for part in self.parts if ANY_STATE not in part.name)

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode as bitsandbytes' `dequantize_4bit` does on a CPU: the code book's value times absmax, in float32."""
        import torch

        size, count = self.state.block_size, end - begin
        codes = _read_codes(self.parts[0], begin // 2, (end + 1) // 2, read)
        values = _pairs(self.tag).index_select(0, codes).flatten()[:count]
        absmax = self._absmax(begin // size, -(-end // size), read)
        whole = count // size
        values[: whole * size].view(whole, size).mul_(absmax[:whole, None])
        if whole * size < count:
            values[whole * size :].mul_(absmax[-1])
        return values.to(getattr(torch, self.state.dtype))

    def _absmax(self, first: int, last: int, read: Read) -> Tensor:
        """Of the blocks from `first` to `last` (exclusive), in float32."""
        import torch

        parts = self._by_suffix()
        stored = read(parts[".absmax"], first, last)
        if self.state.nested_block_size is None:
            return stored.float()
        size = self.state.nested_block_size
        nested_map = read(parts[".nested_quant_map"], 0, 256)
        nested = read(parts[".nested_absmax"], first // size, -(-last // size))
        scales = nested.index_select(0, torch.arange(first, last) // size - first // size)
        return nested_map.index_select(0, stored.int()).mul_(scales).add_(self.state.nested_offset)

    def problems(self, read: Read) -> Iterator[str]:
        """What is wrong with the two maps and absmax: no hash tells what was never right.

        Read are the maps and absmax with its own: a byte in thirty-two of a 4-bit weight.
        """
        import torch

        def whole(part: TensorMeta) -> Tensor:
            return read(part, 0, part.parameters)

        parts = self._by_suffix()
        if whole(parts[".quant_map"]).tolist() != torch.tensor(CODE_BOOKS[self.tag]).tolist():
            yield f"`{self.name}.quant_map` is not the code book of {self.tag.upper()}"
        absmax = whole(parts[".absmax"])
        if self.state.nested_block_size is not None:
            if not torch.allclose(whole(parts[".nested_quant_map"]).float(), dynamic_map()):
                yield f"`{self.name}.nested_quant_map` is not bitsandbytes' map of 8-bit codes"
            nested = whole(parts[".nested_absmax"])
            if not torch.isfinite(nested).all() or (nested < 0).any():
                yield f"`{self.name}.nested_absmax` is not finite, or negative"
                return
            problem = _nested_problem(absmax, nested, self.state.nested_block_size, self.state.nested_offset)
            if problem is not None:
                yield f"`{self.name}.absmax` and `.nested_absmax` are not of a quantised weight: {problem}"
            is_zero = self.state.nested_offset == 0 and not nested.any()
        else:
            if not torch.isfinite(absmax).all() or (absmax < 0).any():
                yield f"`{self.name}.absmax` is not finite, or negative"
            is_zero = not absmax.any()
        if is_zero and not _all_zero(self.parts[0], self.tag, read):
            yield f"`{self.name}.absmax` is zero, and its codes are not"

    def _by_suffix(self) -> dict[str, TensorMeta]:
        return {part.name.removeprefix(self.name): part for part in self.parts}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bitsandbytes4Bit:
    """NF4 and FP4."""

    name: str = "bitsandbytes 4-bit"
    method: str = "bitsandbytes"
    kind: str = "4-bit"

    def find(self, headers: Headers, *, strict: bool) -> Iterator[Packed4Bit]:
        """4-bit weights. Reads their small JSON states.

        Raises `CheckpointError` for states that are malformed and codes of another size; if `strict`, also for
        statistics that are missing, of another size or dtype.
        """
        states = [tensor for name, tensor in headers.tensors.items() if ANY_STATE in name]
        for state in states:
            if state.nbytes > _MOST_STATE_BYTES:
                raise CheckpointError(f"tensor `{state.name}` of `{state.file}` is too long to be a bitsandbytes state")
        for meta, raw in zip(states, headers.read(states), strict=True):
            weight, _, quant_type = meta.name.partition(ANY_STATE)
            try:
                state = _parse_state(raw, quant_type)
                sizes = _part_sizes(state)
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                raise CheckpointError(f"tensor `{meta.name}` of `{meta.file}` is not a bitsandbytes state") from error
            parts = _find_parts(headers.tensors, weight, sizes, strict=strict)
            yield Packed4Bit(
                name=weight, shape=state.shape, dtype=DTYPE_CODES[state.dtype], file=parts[0].file,
                begin=parts[0].begin, end=parts[0].end, format=self, parts=(*parts, meta), tag=quant_type,
                tile=state.block_size * (1 + state.block_size % 2), stays_packed=not headers.dequantize, as_linear=True,
                state=state,
            )  # fmt: skip

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        """4 bits. They may come without a 4-bit tensor: of an architecture none of whose layers are quantised."""
        is_named, is_4_bit = section.get("bnb_4bit_quant_type") in CODE_BOOKS, bool(section.get("load_in_4bit"))
        return (is_named or is_4_bit) if found else (is_named and is_4_bit)

    def kept_settings(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, with what transformers takes where a config.json says nothing, or null."""
        return {**section, **{key: value for key, value in _DEFAULTS.items() if section.get(key) is None}}


_DEFAULTS = {
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_use_double_quant": False,
}
"""Those of transformers' `BitsAndBytesConfig`."""


def _parse_state(raw: bytes, quant_type: str) -> State:
    """Read a JSON state. Raises one of several errors unless it holds all that `QuantState.from_dict` takes."""
    values = json.loads(raw)
    state = State(
        shape=tuple(values["shape"]),
        dtype=values["dtype"],
        block_size=values["blocksize"],
        nested_block_size=values.get("nested_blocksize"),
        nested_offset=0.0 if values.get("nested_blocksize") is None else values["nested_offset"],
    )
    sizes = [*state.shape, state.block_size]
    fits = values["quant_type"] == quant_type in CODE_BOOKS and state.dtype in ("bfloat16", "float16", "float32")
    if state.nested_block_size is not None:
        sizes.append(state.nested_block_size)
        fits = fits and values["nested_dtype"] == "float32" and math.isfinite(state.nested_offset)
    if not fits or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError("not a state that bitsandbytes would take")
    return state


def _part_sizes(state: State) -> dict[str, int]:
    """Suffix to the number of elements, of what a weight is stored in beside its state."""
    n = math.prod(state.shape)
    blocks = -(-n // state.block_size)
    sizes = {"": (n + 1) // 2, ".absmax": blocks, ".nested_absmax": 0, ".quant_map": 16, ".nested_quant_map": 256}
    if state.nested_block_size is None:
        return {suffix: size for suffix, size in sizes.items() if "nested" not in suffix}
    return {**sizes, ".nested_absmax": -(-blocks // state.nested_block_size)}


def _find_parts(
    tensors: Mapping[str, TensorMeta], weight: str, sizes: Mapping[str, int], *, strict: bool
) -> list[TensorMeta]:
    """The codes and, as far as they are there, the statistics; all of them if `strict`."""
    parts = []
    for suffix, size in sizes.items():
        part = tensors.get(weight + suffix)
        if part is None:
            if strict or not suffix:
                raise CheckpointError(f"tensor `{weight}{suffix}` of a 4-bit weight is missing")
            continue
        # codes may be stored in any dtype, which takes the same bytes
        if part.nbytes != size if not suffix else strict and part.parameters != size:
            raise CheckpointError(f"tensor `{part.name}` does not have the size that its 4-bit state tells")
        parts.append(part)
    return parts


def _read_codes(codes: TensorMeta, begin: int, end: int, read: Read) -> Tensor:
    """The bytes from `begin` to `end` (exclusive), whatever dtype they are stored under, as indices (int32)."""
    return read(replace(codes, dtype="U8", shape=(codes.nbytes,)), begin, end).int()


@cache
def _pairs(quant_type: str) -> Tensor:
    """The two values of each byte of codes (float32, 256 × 2)."""
    import torch

    book = torch.tensor(CODE_BOOKS[quant_type], dtype=torch.float32)
    return torch.stack((book.repeat_interleave(16), book.repeat(16)), dim=1)


_TOLERANCE = 0.02
"""Of a block's own absmax. The 8-bit map is nowhere coarser than 0.0141, and ends at -0.993."""


def _nested_problem(absmax: Tensor, nested: Tensor, blocks: int, offset: float) -> str | None:
    """What double quantisation can't have given: absmax (uint8, n), nested (float32, one for each `blocks` of them).

    The mean of absmax is taken off as the offset before it is quantised, so what is stored adds up to nothing; each
    block of it is scaled by its own largest; and absmax is nowhere negative.
    """
    import torch

    n = absmax.numel()
    scaled = torch.nn.functional.pad(dynamic_map()[absmax.long()], (0, -n % blocks)).reshape(-1, blocks)
    # a block of equal values has the scale 0, and whatever code that gives, they all have it
    codes = absmax.split(blocks)
    if any((codes[index] != codes[index][0]).any() for index in (nested == 0).nonzero().flatten().tolist()):
        return "a block's scale is 0, and its codes differ"
    if (scaled.abs().amax(dim=1)[nested > 0] < 1 - _TOLERANCE).any():
        return "a block does not reach its scale"
    values = (scaled * nested[:, None]).flatten()[:n]
    most = _TOLERANCE * nested.max().item()
    if abs(values.mean().item()) > most:
        return "their mean is not the offset"
    if values.min().item() + offset < -most:
        return "some are negative"
    return None


_ZEROS = {"nf4": (0xFF, 0x77), "fp4": (0x77, 0x00)}
"""Which bits of a byte say that both of its weights are zero, and how: FP4 has a zero of either sign."""
_READ_AT_ONCE = 1024 * 1024


def _all_zero(codes: TensorMeta, quant_type: str, read: Read) -> bool:
    bits, zeros = _ZEROS[quant_type]
    return all(
        bool((_read_codes(codes, begin, min(begin + _READ_AT_ONCE, codes.nbytes), read) & bits == zeros).all())
        for begin in range(0, codes.nbytes, _READ_AT_ONCE)
    )
