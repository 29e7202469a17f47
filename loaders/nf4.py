"""4-bit NormalFloat (NF4) with double quantisation, as bitsandbytes computes and stores it.

A weight `W` of n elements is stored as `W` (uint8, (n+1)//2 × 1, two codes a byte), `.absmax` (uint8, one a block of
64), `.nested_absmax` (float32, one for 256 blocks), `.quant_map` (float32, 16), `.nested_quant_map` (float32, 256) and
`.quant_state.bitsandbytes__nf4` (uint8: JSON). Sources: QLoRA, arXiv:2305.14314, appendix E for the code book and
section 3 for double quantisation; bitsandbytes' `QuantState.as_dict(packed=True)` for the layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, TensorMeta
from .errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Weights that share one absolute maximum."""
NESTED_BLOCK = 256
"""Absolute maxima that share one of their own."""

STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
_OTHER_STATE = ".quant_state.bitsandbytes__"
_OFFSET_CHARACTERS = 24
"""The longest that Python prints a non-negative float: 17 digits, a point, leading zeros or an exponent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor:
    """A weight that the checkpoint already holds in 4 bits."""

    name: str
    shape: tuple[int, ...]
    """The logical shape, (out_features, in_features)."""
    parts: tuple[TensorMeta, ...]
    """The tensors that it is stored in."""
    double_quant: bool
    block_size: int

    @property
    def parameters(self) -> int:
        """Logical parameters: two for each stored byte, less padding."""
        return math.prod(self.shape)


def find_packed(checkpoint: Checkpoint) -> dict[str, PackedTensor]:
    """The 4-bit weights of a checkpoint, by name. Reads their small JSON states, no weights.

    Raises `CheckpointError` for FP4 and for states that are malformed.
    """
    packed = {}
    for name, state in checkpoint.tensors.items():
        if _OTHER_STATE in name and not name.endswith(STATE_SUFFIX):
            raise CheckpointError(f"tensor `{name}`: only NF4 is supported among 4-bit formats")
        if not name.endswith(STATE_SUFFIX):
            continue
        weight = name.removesuffix(STATE_SUFFIX)
        parts = tuple(
            meta
            for key in (weight, *(f"{weight}.{part}" for part in _PARTS))
            if (meta := checkpoint.tensors.get(key)) is not None
        )
        raw = checkpoint.source.read(state.file, state.begin, state.end)
        try:
            values = json.loads(raw)
            shape = tuple(int(n) for n in values["shape"])
            block_size = int(values["blocksize"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"tensor `{name}` of `{state.file}` is not a bitsandbytes state") from error
        if not parts or parts[0].name != weight or parts[0].parameters != (math.prod(shape) + 1) // 2:
            raise CheckpointError(f"tensor `{weight}` does not have the size that its 4-bit state tells")
        packed[weight] = PackedTensor(
            name=weight,
            shape=shape,
            parts=(*parts, state),
            double_quant="nested_blocksize" in values,
            block_size=block_size,
        )
    return packed


_PARTS = ("absmax", "nested_absmax", "quant_map", "nested_quant_map")


def stored_shapes(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Suffix to (shape, safetensors dtype) of what a weight of `shape` is stored in; the JSON state at its longest."""
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    return {
        "": (((n + 1) // 2, 1), "U8"),
        ".absmax": ((blocks,), "U8"),
        ".nested_absmax": ((-(-blocks // NESTED_BLOCK),), "F32"),
        ".nested_quant_map": ((256,), "F32"),
        ".quant_map": ((16,), "F32"),
        STATE_SUFFIX: ((len(_state(shape, 0.0)) - len("0.0") + _OFFSET_CHARACTERS,), "U8"),
    }


def encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a piece of a weight that begins at a block: bfloat16 → codes (uint8, (n+1)//2), absmax (float32).

    Raises `ValueError` for NaN and infinity, which would spoil the whole weight without a word.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    if not torch.isfinite(values).all():
        raise ValueError("NaN or infinity")
    codes, state = quantize_4bit(
        values.reshape(-1).contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
    )
    return codes.reshape(-1), state.absmax


def compress_statistics(absmax: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """Double quantisation: absmax (float32, one a block) → suffix to tensor, everything but the codes.

    `shape` is the logical shape of the weight, which the JSON state records.
    """
    import torch
    from bitsandbytes.functional import quantize_blockwise

    # from a million or so elements on, torch's mean depends on the number of threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        offset = absmax.mean()
    finally:
        torch.set_num_threads(threads)
    codes, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = torch.frombuffer(bytearray(_state(shape, offset.item())), dtype=torch.uint8)
    return {
        ".absmax": codes,
        ".nested_absmax": nested.absmax,
        ".nested_quant_map": nested.code,
        ".quant_map": _code_book(),
        STATE_SUFFIX: state,
    }


@cache
def _code_book() -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu")


def _state(shape: tuple[int, ...], offset: float) -> bytes:
    state: Mapping[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return json.dumps(state).encode()
