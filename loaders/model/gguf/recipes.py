"""What a tensor of the model consists of: which stored rows, in which order.

transformers' own code is run on small tensors whose values say which row they are. Where what comes out is made of
whole rows, the tensor can be read in pieces; what is no matter of rows (a norm that one was added to, a transposed
weight) is made as a whole, by that code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from ...checkpoint.formats.gguf import Blocks, Gguf, GgufWeight
from ..transformers_internals import revert
from .loading import GgufLoading

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

_FORMAT = Gguf()


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """How one parameter is made."""

    loading: GgufLoading
    parameter: str
    parts: tuple[Blocks, ...]
    shape: tuple[int, ...]
    marked: Tensor | None
    """The parameter made of rows that say which they are (`_mark`); None where it is no matter of rows."""

    def load(self, values: Mapping[str, Tensor]) -> Tensor:
        """Make it, of all values of its parts."""
        return self.loading.load(values)[self.parameter]


_MARKS = 3
"""Columns of a row that says which it is."""
_MOST_MARKED = 1 << 24
"""Rows: more than any model has in one tensor."""


def find_recipe(loading: GgufLoading, parameter: str, parts: Sequence[Blocks]) -> Recipe:
    """Find out how a parameter is made."""
    marked = _marked(loading, parameter, parts)
    if marked is not None:
        shape = (*marked.shape[:-1], parts[0].columns)
    else:
        import torch

        # zeros take no memory until they are copied
        zeros = {part.name: torch.zeros(part.dimensions, dtype=torch.int8) for part in parts}
        shape = tuple(loading.load(zeros)[parameter].shape)
    return Recipe(loading=loading, parameter=parameter, parts=tuple(parts), shape=shape, marked=marked)


def _marked(loading: GgufLoading, parameter: str, parts: Sequence[Blocks]) -> Tensor | None:
    """The parameter made of rows that are short and say which they are; None where that fails, or tells nothing.

    What puts rows in order does so whatever their length. A vector is one row, in which elements may be put in order.
    """
    import torch

    columns = {part.columns for part in parts}
    total = sum(part.rows for part in parts)
    if len(columns) != 1 or min(columns) < _MARKS or min(len(part.dimensions) for part in parts) < 2:
        return None
    if total > _MOST_MARKED:
        return None
    rows, first = {}, 0
    for part in parts:
        marks = torch.arange(first * _MARKS, (first + part.rows) * _MARKS, dtype=torch.int32)
        rows[part.name] = marks.reshape(*part.dimensions[:-1], _MARKS)
        first += part.rows
    try:
        made = loading.load(rows)[parameter]
    except (ValueError, LookupError, RuntimeError, TypeError):
        return None
    return made if _rows(made) is not None else None


def _rows(made: Tensor) -> range | np.ndarray | None:
    """The rows that a tensor consists of by their marks; None where it is not made of whole rows."""
    import torch

    if made.dtype != torch.int32 or made.dim() < 2 or made.shape[-1] != _MARKS or not made.numel():
        return None
    marks = made.reshape(-1, _MARKS)
    rows = marks[:, 0] // _MARKS
    if not torch.equal(marks, rows[:, None] * _MARKS + torch.arange(_MARKS, dtype=torch.int32)):
        return None
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count, dtype=torch.int32)):
        return range(first, first + count)
    return rows.numpy()


def saved_weights(model: PreTrainedModel, recipes: Mapping[str, Recipe]) -> Iterator[GgufWeight]:
    """What `save_pretrained` makes of the parameters: other names, and parts of what is merged on loading."""
    import torch

    whole = {parameter: torch.empty(recipe.shape, device="meta") for parameter, recipe in recipes.items()}
    names = {id(value): name for name, value in revert(model, whole).items()}
    for parameter, recipe in recipes.items():
        name = names.get(id(whole[parameter]))
        if name is not None:
            rows = None if recipe.marked is None else _rows(recipe.marked)
            yield _weight(recipe, name, recipe.shape, rows, recipe.load)
            continue
        divided = revert(model, {parameter: whole[parameter] if recipe.marked is None else recipe.marked})
        for name, value in divided.items():
            rows = _rows(value)
            shape = tuple(value.shape) if rows is None else (*value.shape[:-1], recipe.shape[-1])
            yield _weight(recipe, name, shape, rows, partial(_divide, model, recipe, name))


def _divide(model: PreTrainedModel, recipe: Recipe, name: str, values: Mapping[str, Tensor]) -> Tensor:
    return revert(model, {recipe.parameter: recipe.load(values)})[name]


def _weight(
    recipe: Recipe,
    name: str,
    shape: tuple[int, ...],
    rows: range | np.ndarray | None,
    transform: Callable[[Mapping[str, Tensor]], Tensor],
) -> GgufWeight:
    first = recipe.parts[0]
    return GgufWeight(
        name=name, shape=shape, dtype="BF16", file=first.file, begin=first.begin, end=first.end, format=_FORMAT,
        parts=recipe.parts, tag=first.ggml_type, tile=prod(shape) if rows is None else shape[-1], rows=rows,
        decode=recipe.loading.decode, transform=transform if rows is None else None,
    )  # fmt: skip
