"""Whether the statistics of 4-bit weights are what quantising could have given: no hash tells what was never right.

nf4.py says what is stored. Read are the two maps, the JSON state, and the blocks' maxima with their own: a byte in
thirty-two of a 4-bit weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.formats.nf4 import STATE_SUFFIX, PackedTensor
from ..checkpoint.tensors import TensorMeta
from .encode import CODE_BOOK, dynamic_map

if TYPE_CHECKING:
    from torch import Tensor


_TOLERANCE = 0.02
"""Of a block's own maximum. The 8-bit map is nowhere coarser than 0.0141, and ends at -0.993."""


def check_statistics(checkpoint: Checkpoint, weight: PackedTensor) -> Iterator[str]:
    """What is wrong with the maps and the maxima of one 4-bit weight, whose files lie on this machine."""
    import torch

    parts = {part.name.removeprefix(weight.name): part for part in weight.parts}
    if checkpoint.read(parts[".quant_map"]).tolist() != torch.tensor(CODE_BOOK).tolist():
        yield f"`{weight.name}.quant_map` is not the code book of NF4"
    absmax = checkpoint.read(parts[".absmax"])
    if ".nested_absmax" in parts:
        if not torch.allclose(checkpoint.read(parts[".nested_quant_map"]).float(), dynamic_map()):
            yield f"`{weight.name}.nested_quant_map` is not bitsandbytes' map of 8-bit codes"
        nested = checkpoint.read(parts[".nested_absmax"])
        if not torch.isfinite(nested).all() or (nested < 0).any():
            yield f"`{weight.name}.nested_absmax` is not finite, or negative"
            return
        state = json.loads(bytes(checkpoint.read(parts[STATE_SUFFIX]).tolist()))
        blocks, offset = state["nested_blocksize"], state["nested_offset"]
        problem = _nested_problem(absmax, nested, blocks, offset)
        if problem is not None:
            yield f"`{weight.name}.absmax` and `.nested_absmax` are not of a quantised weight: {problem}"
        is_zero = offset == 0 and not nested.any()
    else:
        if not torch.isfinite(absmax).all() or (absmax < 0).any():
            yield f"`{weight.name}.absmax` is not finite, or negative"
        is_zero = not absmax.any()
    if is_zero and not _all_zero(checkpoint, parts[""]):
        yield f"`{weight.name}.absmax` is zero, and its codes are not"


def _nested_problem(absmax: Tensor, nested: Tensor, blocks: int, offset: float) -> str | None:
    """What double quantisation can't have given: absmax (uint8, n), nested (float32, one for each `blocks` of them).

    The mean of the maxima is taken off as the offset before they are quantised, so what is stored adds up to nothing;
    each of their blocks is scaled by its own largest; and no maximum is negative.
    """
    import torch

    n = absmax.numel()
    scaled = torch.nn.functional.pad(dynamic_map()[absmax.long()], (0, -n % blocks)).reshape(-1, blocks)
    # a block of equal maxima has the scale 0, and whatever code that gives, they all have it
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


_ZERO_CODES = 0x77
"""Two weights that are zero."""


_READ_AT_ONCE = 1024 * 1024


def _all_zero(checkpoint: Checkpoint, codes: TensorMeta) -> bool:
    return all(bool((chunk == _ZERO_CODES).all()) for chunk in checkpoint.chunks(codes, _READ_AT_ONCE))
