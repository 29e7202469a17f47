"""Whether two parameters that the configuration ties are equal, where the checkpoint holds both.

This is the one question whose answer is in the weights themselves, and only such checkpoints raise it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tensors import TensorMeta
from ..progress import Silent
from ..source.blocks import Blocks
from .tensor_map import Group
from .transformers_internals import tied_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


_COMPARED_AT_ONCE = 4 * 1024 * 1024
"""Elements of two tensors that are in memory when they are compared."""
_HELD_BYTES = 64 * 1024 * 1024
"""Of two tensors that are read from a hub and not kept."""
_PIECE = 16 * 1024
"""Elements that are compared first of tensors on a hub: at the beginning, in the middle and at the end."""


def tie_equal_weights(
    checkpoint: Checkpoint, model: PreTrainedModel, mapping: Iterable[Group], *, headers_only: bool
) -> list[str]:
    """Tie the parameters of `model` that are equal in the checkpoint, untie those that are not; returns warnings.

    With `headers_only` no file is fetched: what only a whole tensor could tell is then taken to be tied, and said.
    """
    sources = {group.parameters[0]: group.sources[0] for group in mapping if group.conversion is None}
    warnings = []
    tied = tied_weights(model)
    for target, origin in list(tied.items()):
        if target not in sources or origin not in sources or model.get_parameter(target) is model.get_parameter(origin):
            continue
        first, second = sources[target], sources[origin]
        answer = _are_equal(checkpoint, first, second, model.get_parameter(origin).dtype, headers_only=headers_only)
        if answer == "no":
            del tied[target]
            warnings.append(
                f"`{target}` and `{origin}` are tied in the configuration but differ in the checkpoint: both are kept, "
                "untied, as transformers does"
            )
            continue
        parent, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(origin))
        if answer == "undecided":
            warnings.append(
                f"`{target}` and `{origin}` are tied in the configuration and both in the checkpoint: taken to be "
                f"equal, as they are in {_elements(_sample(first)):,} of {first.parameters:,} elements; "
                "`prepare` compares all of them"
            )
    return warnings


def _are_equal(
    checkpoint: Checkpoint, first: TensorMeta, second: TensorMeta, dtype: torch.dtype, *, headers_only: bool
) -> Literal["yes", "no", "undecided"]:
    """Whether two tensors are equal once they are cast to `dtype`, as they are on loading."""
    if first.shape != second.shape:
        return "no"
    files = {first.file, second.file}
    if not checkpoint.source.is_here(files):
        # of gigabytes, a few pieces tell the usual case: a head that was trained on its own
        if not _all_equal(_pieces(checkpoint, first), _pieces(checkpoint, second), dtype):
            return "no"
        if _elements(_sample(first)) == first.parameters:
            return "yes"
        if headers_only:
            return "undecided"
        if checkpoint.source.cached:
            checkpoint.source.fetch(files)
    with _coming(checkpoint, first, second) as checkpoint:
        one, other = (checkpoint.chunks(meta, _COMPARED_AT_ONCE) for meta in (first, second))
        return "yes" if _all_equal(one, other, dtype) else "no"


@contextmanager
def _coming(checkpoint: Checkpoint, first: TensorMeta, second: TensorMeta) -> Iterator[Checkpoint]:
    """The checkpoint, where the two tensors can be read: from a hub side by side, if they are not kept."""
    source = checkpoint.source
    if source.is_here({first.file, second.file}):
        yield checkpoint
        return
    walks = [
        [(part.file, begin, min(begin + _COMPARED_AT_ONCE, part.end)) for part in tensor.stored_in
         for begin in range(part.begin, part.end, _COMPARED_AT_ONCE)]
        for tensor in (first, second)
    ]  # fmt: skip
    pieces = [piece for pair in zip_longest(*walks) for piece in pair if piece is not None]
    blocks = Blocks(source, pieces, _HELD_BYTES, Silent())
    with blocks.coming():
        yield replace(checkpoint, source=replace(source, read_remote=blocks.read_into))


def _all_equal(first: Iterable[Tensor], second: Iterable[Tensor], dtype: torch.dtype) -> bool:
    import torch

    return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in zip(first, second, strict=True))


def _sample(tensor: TensorMeta) -> list[tuple[int, int]]:
    """The pieces that are compared first, as first and last (exclusive) element; all of a small tensor."""
    count = tensor.parameters
    if count <= 3 * _PIECE:
        return [(0, count)] if count else []
    return [(begin, begin + _PIECE) for begin in (0, count // 2, count - _PIECE)]


def _elements(pieces: Iterable[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in pieces)


def _pieces(checkpoint: Checkpoint, tensor: TensorMeta) -> Iterator[Tensor]:
    for begin, end in _sample(tensor):
        yield checkpoint.values(tensor, begin, end)
