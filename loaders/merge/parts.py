"""Which part of a parameter a stored tensor is, where transformers merges several on loading: experts, gate and up.

The conversion itself is asked, with a few numbers in the place of each tensor: where they turn up tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..checkpoint.tensors import TensorMeta
from ..model.tensor_map import Group
from .changes import ExpertLayers, LowRank

if TYPE_CHECKING:
    from torch import Tensor

_ROWS, _COLUMNS = 4, 6
"""Of what stands for a tensor: both orientations differ, and interleaved halves are told from those that are not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Where a stored matrix turns up in a parameter."""

    source: TensorMeta
    expert: int | None
    turned: bool
    """Whether it is turned on the way: rows become columns."""
    place: int
    """Among those that share its expert, the first number along the outputs."""


def divide(
    group: Group, parameter: str, shape: tuple[int, ...], change: LowRank | ExpertLayers
) -> list[tuple[TensorMeta, LowRank]]:
    """What a change of a whole parameter of `shape` is for each stored tensor that becomes a part of it.

    Without those of experts that are not changed. Empty where the parts are not what can be told: matrices that are
    stacked, turned, or put beside one another so that their outputs follow one another.
    """
    parts = list(_find_parts(group, parameter, change))
    outs, ins = shape[-2:][::-1] if change.transposed else shape[-2:]
    found = []
    for part in parts:
        transposed = change.transposed != part.turned
        beside = sorted((other for other in parts if other.expert == part.expert), key=lambda other: other.place)
        sizes = [_sizes(other, change.transposed != other.turned) for other in beside]
        if sum(size for size, _ in sizes) != outs or any(size != ins for _, size in sizes):
            return []
        at = beside.index(part)
        own = change.of_expert(part.expert)
        if own is not None:
            first_out = sum(size for size, _ in sizes[:at])
            own = replace(own, transposed=transposed, outs=sizes[at][0], ins=ins, first_out=first_out)
            found.append((part.source, own))
    return found if len(parts) == len(group.sources) else []


def _sizes(part: _Part, transposed: bool) -> tuple[int, int]:
    """Outputs and inputs of a stored matrix."""
    rows, columns = part.source.shape
    return (columns, rows) if transposed else (rows, columns)


def _find_parts(group: Group, parameter: str, change: LowRank | ExpertLayers) -> Iterator[_Part]:
    import torch

    if group.conversion is None or any(len(source.shape) != 2 for source in group.sources):
        return
    size = _ROWS * _COLUMNS
    numbers = torch.arange(size * len(group.sources), dtype=torch.float32).reshape(-1, _ROWS, _COLUMNS)
    names = [source.name for source in group.sources]
    try:
        loaded = group.conversion.load(dict(zip(names, numbers, strict=True)))
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError):
        return  # it takes matrices of certain sizes alone
    whole = loaded.get(parameter)
    if len(loaded) != 1 or whole is None or whole.dim() not in (2, 3):
        return
    for source, own in zip(group.sources, numbers, strict=True):
        part = _locate(source, own, whole, change)
        if part is not None:
            yield part


def _locate(source: TensorMeta, own: Tensor, whole: Tensor, change: LowRank | ExpertLayers) -> _Part | None:
    """Where the numbers of one tensor lie together, along all inputs."""
    expert = None
    if whole.dim() == 3:
        experts = (whole == own[0, 0]).nonzero()[:, 0].tolist()
        if len(experts) != 1:
            return None
        (expert,) = experts
        whole = whole[expert]
    for turned, block in ((False, own), (True, own.T)):
        places = (whole == block[0, 0]).nonzero().tolist()
        if len(places) != 1:
            continue
        (row, column) = places[0]
        rows, columns = block.shape
        if not whole[row : row + rows, column : column + columns].equal(block):
            continue
        along_inputs = (row, rows, whole.shape[0]) if change.transposed else (column, columns, whole.shape[1])
        if along_inputs[0] == 0 and along_inputs[1] == along_inputs[2]:
            return _Part(source=source, expert=expert, turned=turned, place=column if change.transposed else row)
    return None
