"""bitsandbytes NF4: which stored tensors make up one 4-bit weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..tensors import TensorMeta

BLOCK = 64
"""Weights that share one absolute maximum."""


NESTED_BLOCK = 256
"""Absolute maxima that share one of their own."""


STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"


_OTHER_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor:
    """A weight that the checkpoint already holds in 4 bits."""

    name: str
    shape: tuple[int, ...]
    """The logical shape, (out_features, in_features)."""
    parts: tuple[TensorMeta, ...]
    """The tensors that it is stored in."""
    block_size: int


def find_packed(checkpoint: Checkpoint) -> dict[str, PackedTensor]:
    """The 4-bit weights of a checkpoint, by name. Reads their small JSON states, no weights.

    Raises `CheckpointError` for FP4 and for states that are malformed.
    """
    packed = {}
    for name, state in checkpoint.tensors.items():
        if _OTHER_STATE in name and not name.endswith(STATE_SUFFIX):
            raise CheckpointError(
                f"tensor `{name}`: only NF4 is supported among 4-bit formats", hint="start from the 16-bit model"
            )
        if not name.endswith(STATE_SUFFIX):
            continue
        weight = name.removesuffix(STATE_SUFFIX)
        if state.nbytes > _MOST_STATE_BYTES:
            raise CheckpointError(f"tensor `{name}` of `{state.file}` is too long to be a bitsandbytes state")
        try:
            raw = checkpoint.source.read(state.file, state.begin, state.end)
            shape, block_size, nested_block_size = _parse_state(raw)
            sizes = _part_sizes(math.prod(shape), block_size, nested_block_size)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"tensor `{name}` of `{state.file}` is not a bitsandbytes state") from error
        parts = []
        for suffix, size in sizes.items():
            part = checkpoint.tensors.get(weight + suffix)
            if part is None:
                raise CheckpointError(f"tensor `{weight}{suffix}` of a 4-bit weight is missing")
            if part.parameters != size:
                raise CheckpointError(f"tensor `{part.name}` does not have the size that its 4-bit state tells")
            parts.append(part)
        packed[weight] = PackedTensor(name=weight, shape=shape, parts=(*parts, state), block_size=block_size)
    return packed


_MOST_STATE_BYTES = 64 * 1024
"""A state has some 200."""


def _parse_state(raw: bytes) -> tuple[tuple[int, ...], int, int | None]:
    """Shape, block size and, with double quantisation, the size of its blocks.

    Raises one of several errors unless everything is there that `QuantState.from_dict` takes.
    """
    values = json.loads(raw)
    shape, block_size, nested = tuple(values["shape"]), values["blocksize"], values.get("nested_blocksize")
    sizes = [*shape, block_size] if nested is None else [*shape, block_size, nested]
    fits = all(type(size) is int and size > 0 for size in sizes) and values["quant_type"] == "nf4"
    fits = fits and values["dtype"] in ("bfloat16", "float16", "float32")
    if nested is not None:
        fits = fits and values["nested_dtype"] == "float32" and math.isfinite(values["nested_offset"])
    if not fits:
        raise ValueError("not a state that bitsandbytes would take")
    return shape, block_size, nested


def _part_sizes(n: int, block_size: int, nested_block_size: int | None) -> dict[str, int]:
    """Suffix to the number of elements, of what a weight of n elements is stored in beside its state."""
    blocks = -(-n // block_size)
    sizes = {"": (n + 1) // 2, ".absmax": blocks, ".nested_absmax": 0, ".quant_map": 16, ".nested_quant_map": 256}
    if nested_block_size is None:
        return {suffix: size for suffix, size in sizes.items() if "nested" not in suffix}
    return {**sizes, ".nested_absmax": -(-blocks // nested_block_size)}
