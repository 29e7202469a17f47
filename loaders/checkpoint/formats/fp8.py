"""FP8 weights with scales, and what is stored like them: MXFP8 and packed FP4.

A weight `W` is stored as codes and, as `W_scale_inv`, what they are multiplied by: a value is the code's, in float32,
times the scale of its block, rounded to bfloat16. Codes are float8_e4m3fn (or float8_e5m2), or int8 bytes of two E2M1
each, the first in the lower half. Scales are floats, or one byte b that stands for 2^(b-127) (E8M0). Sources:
transformers' `Fp8Dequantize` (integrations/finegrained_fp8.py) for names, dtypes and arithmetic; DeepSeek-V3's
`weight_dequant` (inference/kernel.py) for blocks at an edge, which are smaller; OCP Microscaling Formats (MX) 1.0 for
E2M1, E8M0 and MXFP8, whose blocks are 32 codes of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ..tensors import TORCH_NAMES, TensorMeta
from .interface import Headers, PackedTensor, Read, decoded_by_numba

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("fp8", "mxfp8")
_CODES_A_BYTE = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 2}
"""By the dtype of what is stored."""
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_PIECE = 1024 * 1024
"""Elements that are decoded at a time: what they are read into is used again while the processor's cache holds it."""
_SCALE_BYTES = 13
"""What one takes at most on its way to float32, as it is stored included."""
_DEFAULT_BLOCK = (128, 128)
"""That of transformers' `FineGrainedFP8Config`, where config.json says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """How the scales of a weight lie: those of one matrix after another, row by row."""

    matrix_rows: int
    """Rows of a matrix: fused experts are one matrix below another."""
    columns: int
    scale_rows: int
    """Of a matrix."""
    scale_columns: int
    height: int
    """Rows of a block; the last block of a matrix may be smaller."""
    width: int
    """Columns of a block, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedFP8(PackedTensor):
    """A weight in FP8 or FP4; its second part are the scales, and what else it has is not needed to decode it."""

    blocks: Blocks

    def reading_bytes(self, elements: int) -> int:
        """Of a piece: its codes, the scales of each row, and FP4 unpacked."""
        elements = min(max(elements, self.tile), self.parameters, _PIECE)
        stored = elements // _CODES_A_BYTE[self.parts[0].dtype]
        rows = min(elements // self.blocks.columns + 2, self.parameters // self.blocks.columns)
        scales = rows * (self.blocks.scale_columns * _SCALE_BYTES + 48)
        return stored + (elements if stored < elements else 0) + scales + 16 * 1024

    def values(self, begin: int, end: int, read: Read) -> Tensor:
        """Decode as `Fp8Dequantize` does: the code's value times the scale in float32, then bfloat16.

        Raises `CheckpointError` naming scales that are not finite, and `MissingRequirementError` without numba.
        """
        return self.chunk(begin, end, read, None)

    def chunk(self, begin: int, end: int, read: Read, buffer: bytearray | None) -> Tensor:
        """As `values`, in the buffer if that is large enough."""
        import torch

        if buffer is None or len(buffer) < 2 * (end - begin) or begin == end:
            out = torch.empty(end - begin, dtype=torch.bfloat16)
        else:
            out = torch.frombuffer(buffer, dtype=torch.bfloat16, count=end - begin)
        for first in range(begin, end, _PIECE):
            last = min(first + _PIECE, end)
            self._decode(first, last, read, out[first - begin : last - begin].view(torch.uint16).numpy())
        return out

    def _decode(self, begin: int, end: int, read: Read, out: Any) -> None:
        """Decode one piece into `out` (uint16: bits of bfloat16)."""
        import numpy as np
        import torch

        decoders, unpack = _kernel()
        stored = self.parts[0]
        a_byte = _CODES_A_BYTE[stored.dtype]
        codes = read(stored, begin // a_byte, end // a_byte).view(torch.uint8).numpy()
        if a_byte == 2:
            codes = unpack(codes, np.empty(end - begin, np.uint8))
        columns = self.blocks.columns
        decode = decoders[stored.dtype]
        decode(codes, self._scales(begin, end, read), out, begin % columns, columns, self.blocks.width)

    def _scales(self, begin: int, end: int, read: Read) -> Any:
        """Of each row that the elements from `begin` to `end` (exclusive) lie in (float32, rows × scale columns)."""
        import numpy as np
        import torch

        blocks, stored = self.blocks, self.parts[1]
        rows = np.arange(begin // blocks.columns, -(-end // blocks.columns))
        of_row = rows // blocks.matrix_rows * blocks.scale_rows + rows % blocks.matrix_rows // blocks.height
        first, last = int(of_row[0]), int(of_row[-1]) + 1
        values = read(stored, first * blocks.scale_columns, last * blocks.scale_columns).float()
        if stored.dtype == "U8":
            values = torch.exp2(values - 127)
        scales = values.numpy().reshape(-1, blocks.scale_columns)
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"tensor `{stored.name}` of `{stored.file}`, the scales of `{self.name}`, holds NaN or infinity",
                hint="the checkpoint is damaged or was saved from a diverged run",
            )
        return scales[of_row - first]


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8:
    """FP8 in blocks, by channel or by tensor, MXFP8, and packed FP4."""

    name: str = "FP8"
    method: str = "fp8"
    kind: str = "FP8"

    def find(self, headers: Headers, *, strict: bool) -> Iterator[PackedFP8]:
        """Weights that have scales.

        Where config.json says that the checkpoint is FP8 and `strict`, raises `CheckpointError` for weights without
        scales, scales without a weight, and scales of a shape or dtype that none have.
        """
        claimed = headers.section.get("quant_method") in METHODS
        strict = strict and claimed
        block = _block_size(headers.section, strict=strict)
        used = set()
        for codes in headers.tensors.values():
            if codes.dtype not in _CODES_A_BYTE:
                continue
            # compressed-tensors has `_scale` as well, and its weights are not for this format to decode
            scales = _beside(codes, _SCALE_NAMES if claimed else _SCALE_NAMES[:1], headers.tensors)
            try:
                tensor = self._tensor(codes, scales[:1], block)
            except CheckpointError:
                if strict:
                    raise
                continue
            used.add(scales[0].name)
            activations = _of_activations(codes, headers.tensors) if claimed else ()
            yield replace(tensor, parts=(*tensor.parts, *activations))
        if strict:
            _check_orphans(headers.tensors, used)

    def _tensor(self, codes: TensorMeta, scales: tuple[TensorMeta, ...], block: tuple[int, int] | None) -> PackedFP8:
        """The weight of some codes and scales. Raises `CheckpointError` where they don't go together."""
        if not scales:
            raise CheckpointError(
                f"tensor `{codes.name}` of `{codes.file}` holds {TORCH_NAMES[codes.dtype]}, and its scales "
                f"(`{codes.name}{_SCALE_NAMES[0]}`) are missing",
                hint="the checkpoint is incomplete: download it again",
            )
        (scale,) = scales
        if scale.dtype not in _SCALES:
            raise CheckpointError(
                f"tensor `{scale.name}` of `{scale.file}`, the scales of `{codes.name}`, holds "
                f"{TORCH_NAMES[scale.dtype]}: neither floats nor E8M0"
            )
        codes_a_byte = _CODES_A_BYTE[codes.dtype]
        shape = (*codes.shape[:-1], codes.shape[-1] * codes_a_byte) if codes.shape else ()
        blocks = _blocks(shape, scale.shape, block)
        if blocks is None:
            raise CheckpointError(
                f"tensor `{scale.name}` of `{scale.file}` has shape {list(scale.shape)}, which divides `{codes.name}` "
                f"of shape {list(shape)} into no blocks",
                hint="`weight_block_size` of config.json and the weights must belong together",
            )
        return PackedFP8(
            name=codes.name, shape=shape, dtype="BF16", file=codes.file, begin=codes.begin, end=codes.end, format=self,
            parts=(codes, scale), tag="fp4" if codes_a_byte == 2 else "fp8", tile=codes_a_byte, blocks=blocks,
        )  # fmt: skip

    def claims(self, section: Mapping[str, Any], *, found: bool) -> bool:
        """By its name alone: which tensors are FP8 is theirs to say."""
        return section.get("quant_method") in METHODS

    def kept_settings(self, section: Mapping[str, Any]) -> None:
        """Nothing: what is written is not FP8."""


_SCALE_NAMES = ("_scale_inv", "_scale", ".scale", ".qscale_weight")
"""transformers', AutoFP8's, DeepSeek-V4's and Mistral's; what begins with a point takes the place of `.weight`."""
_ACTIVATION_NAMES = (
    "_activation_scale", ".activation_scale", ".input_scale", ".output_scale", ".k_scale", ".v_scale", ".qscale_act",
)  # fmt: skip
"""What activations are multiplied by before they meet FP8 weights, or are cached: of no use with decoded ones."""
_CACHE_NAMES = {
    "k_proj": ("k_scale", "kv_scale"), "v_proj": ("v_scale",), "qkv_proj": ("k_scale", "v_scale", "kv_scale"),
}  # fmt: skip
"""Those of cached keys and values lie beside the layers (AutoFP8), whose names are the keys here."""

_OWNERS = {"_scale_inv": "", "weight_scale": "weight", ".qscale_weight": ".weight"}
"""How names of scales end, which nothing else has, and their weights' in the place of that."""


def _beside(codes: TensorMeta, suffixes: tuple[str, ...], tensors: Mapping[str, TensorMeta]) -> tuple[TensorMeta, ...]:
    """What is stored beside a weight under names with these suffixes."""
    is_weight = codes.name.endswith(".weight")
    names = [
        codes.name.removesuffix(".weight" if suffix.startswith(".") else "") + suffix
        for suffix in suffixes
        if is_weight or not suffix.startswith(".")
    ]
    return tuple(tensors[name] for name in names if name in tensors)


def _of_activations(codes: TensorMeta, tensors: Mapping[str, TensorMeta]) -> tuple[TensorMeta, ...]:
    """The scales of what goes into a layer, or comes out of it."""
    module, _, layer = codes.name.removesuffix(".weight").rpartition(".")
    caches = (f"{module}.{name}" for name in _CACHE_NAMES.get(layer, ()))
    return (*_beside(codes, _ACTIVATION_NAMES, tensors), *(tensors[name] for name in caches if name in tensors))


def _check_orphans(tensors: Mapping[str, TensorMeta], used: set[str]) -> None:
    """Raise `CheckpointError` for scales that no weight has."""
    for scale in tensors.values():
        of = next(((end, whose) for end, whose in _OWNERS.items() if scale.name.endswith(end)), None)
        if of is None or scale.name in used:
            continue
        weight = scale.name.removesuffix(of[0]) + of[1]
        found = f"is {TORCH_NAMES[tensors[weight].dtype]}, not FP8" if weight in tensors else "is missing"
        raise CheckpointError(
            f"tensor `{scale.name}` of `{scale.file}` holds the scales of `{weight}`, which {found}",
            hint="the checkpoint is damaged: download it again",
        )


def _block_size(section: Mapping[str, Any], *, strict: bool) -> tuple[int, int] | None:
    """config.json's `weight_block_size`. If `strict`, raises `CheckpointError` for what is no size of a block."""
    size = section.get("weight_block_size", _DEFAULT_BLOCK)
    if isinstance(size, list | tuple) and len(size) == 2 and all(type(part) is int and part > 0 for part in size):
        return size[0], size[1]
    if strict and size is not None:
        raise CheckpointError(f"`weight_block_size` of config.json is {size!r}, not two positive integers")
    return None


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> Blocks | None:
    """How scales of a shape lie on a weight of another (logical) shape; None where they don't fit.

    A grid that has as many scales as there are blocks of config.json's size has those blocks, the last of them smaller.
    Any other grid divides the weight evenly, as in transformers.
    """
    if not math.prod(shape):
        return None
    rows, columns = (1, 1, *shape)[-2:]
    down, across = (1, 1, *scales)[-2:]
    all_rows = math.prod(shape) // columns
    if math.prod(scales) == 1:
        height, width, rows = all_rows, columns, all_rows
    elif len(scales) == 1 and len(shape) > 1 and scales[0] == shape[0]:  # one a channel, or an expert
        down, across = scales[0], 1
        height, width, rows = all_rows // down, columns, all_rows
    elif len(scales) != len(shape) or len(shape) < 2 or scales[:-2] != shape[:-2]:
        return None
    elif block is not None and (down, across) == (-(-rows // block[0]), -(-columns // block[1])):
        height, width = block
    elif 0 not in scales and rows % down == 0 and columns % across == 0:
        height, width = rows // down, columns // across
    else:
        return None
    return Blocks(matrix_rows=rows, columns=columns, scale_rows=down, scale_columns=across, height=height, width=width)


@cache
def _kernel() -> tuple[Mapping[str, Any], Any]:
    """The compiled loops: the decoder of each dtype, and what unpacks FP4.

    Raises `MissingRequirementError` where numba can't be used.
    """
    import numpy as np

    with decoded_by_numba("FP8"):
        from .fp8_kernel import decode_e2m1, decode_e4m3, decode_e5m2, unpack

        unpack(np.zeros(1, np.uint8), np.empty(2, np.uint8))
    return {"F8_E4M3": decode_e4m3, "F8_E5M2": decode_e5m2, "I8": decode_e2m1}, unpack
