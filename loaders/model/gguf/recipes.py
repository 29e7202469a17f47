"""What a tensor of the model consists of: which stored rows, in which order.

transformers' own code is run on small tensors whose values say where they come from. Where what comes out is made of
whole rows, the tensor can be read in pieces; what is no matter of rows (a norm that one was added to, a transposed
weight) is made as a whole, by that code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from ...checkpoint.formats.gguf import Blocks, Gguf, GgufWeight, Order
from ..transformers_internals import revert
from .loading import GgufLoading

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

_FORMAT = Gguf()
_MARKS = 3
"""Columns of a row that says which it is, and rows of columns that do."""
_MOST_MARKED = 1 << 24
"""Rows: more than any model has in one tensor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """How one parameter is made."""

    loading: GgufLoading
    parameter: str
    parts: tuple[Blocks, ...]
    shape: tuple[int, ...]
    order: Order | None
    """None where it is no matter of rows."""

    def load(self, values: Mapping[str, Tensor]) -> Tensor:
        """Make it, of all values of its parts."""
        return self.loading.load(values)[self.parameter]


def find_recipes(loading: GgufLoading, groups: Mapping[str, Sequence[Blocks]]) -> dict[str, Recipe]:
    """Find out how parameters are made, by their names, of the parts that are given for each."""
    recipes: dict[str, Recipe] = {}
    alike: dict[tuple[object, ...], Recipe] = {}
    for parameter, parts in groups.items():
        # the experts of all layers are stacked in the same way, and have very many rows
        experts = len(parts[0].dimensions) > 2
        key = (_numbered(parameter), *((_numbered(part.name), part.dimensions) for part in parts))
        known = alike.get(key) if experts else None
        if known is not None:
            recipes[parameter] = replace(known, parameter=parameter, parts=tuple(parts))
        else:
            recipes[parameter] = alike[key] = _find_recipe(loading, parameter, tuple(parts))
    return recipes


def _numbered(name: str) -> str:
    """A name without the number of its layer."""
    return re.sub(r"\d+", "#", name, count=1)


def _find_recipe(loading: GgufLoading, parameter: str, parts: tuple[Blocks, ...]) -> Recipe:
    import numpy as np
    import torch

    found = _in_order(loading, parameter, parts)
    if found is not None:
        shape, order = found
    else:
        # zeros take no memory until they are copied
        zeros = {part.name: torch.from_numpy(np.zeros(part.dimensions, np.int8)) for part in parts}
        shape, order = tuple(loading.load(zeros)[parameter].shape), None
    return Recipe(loading=loading, parameter=parameter, parts=parts, shape=shape, order=order)


def _in_order(loading: GgufLoading, parameter: str, parts: Sequence[Blocks]) -> tuple[tuple[int, ...], Order] | None:
    """The shape and the order of rows, or of columns, of a parameter; None where it is made in another way.

    What puts rows in order does so whatever their length: three columns suffice to see it. What puts columns in order
    needs all of them, but few rows. A vector may be put in order too, but so short a one tells nothing.
    """
    import numpy as np

    columns = parts[0].columns
    if any(len(part.dimensions) < 2 or part.columns != columns for part in parts) or columns <= _MARKS:
        return None
    if sum(part.rows for part in parts) > _MOST_MARKED:
        return None
    marks, first = {}, 0
    for part in parts:
        marks[part.name] = _mark(range(first, first + part.rows), (*part.dimensions[:-1], _MARKS))
        first += part.rows
    made = _try(loading, parameter, marks)
    rows = None if made is None else _rows(made)
    if made is not None and rows is not None:
        return (*made.shape[:-1], columns), Order(rows=rows)
    if len(parts) == 1 and len(parts[0].dimensions) == 2:
        made = _try(loading, parameter, {parts[0].name: _mark(range(columns), (columns, _MARKS)).T.contiguous()})
        places = None if made is None else _rows(made.T)
        if places is not None and len(places) == columns:
            return parts[0].dimensions, Order(rows=range(parts[0].rows), columns=np.asarray(places))
    return None


def _try(loading: GgufLoading, parameter: str, values: Mapping[str, Tensor]) -> Tensor | None:
    """What is made of values in an unusual shape, if that works."""
    try:
        return loading.load(values)[parameter]
    except (ValueError, LookupError, RuntimeError, TypeError):
        return None


def _mark(rows: range | np.ndarray, shape: Sequence[int]) -> Tensor:
    """Rows that say which they are: `_MARKS` numbers each, int32."""
    import torch

    numbers = torch.as_tensor(rows, dtype=torch.int32)[:, None] * _MARKS
    return (numbers + torch.arange(_MARKS, dtype=torch.int32)).reshape(*shape)


def _rows(made: Tensor) -> range | np.ndarray | None:
    """The rows that a tensor consists of by their marks; None where it is not made of whole rows."""
    import torch

    if made.dtype != torch.int32 or made.dim() < 2 or made.shape[-1] != _MARKS or not made.numel():
        return None
    rows = made.reshape(-1, _MARKS)[:, 0] // _MARKS
    if not torch.equal(made, _mark(rows.numpy(), made.shape)):
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
    alike: dict[tuple[object, ...], tuple[Recipe, list[GgufWeight]]] = {}
    for parameter, recipe in recipes.items():
        name = names.get(id(whole[parameter]))
        if name is not None:
            yield _weight(recipe, name, recipe.shape, recipe.order)
            continue
        key = (_numbered(parameter), recipe.shape, id(recipe.order))
        if key not in alike or recipe.order is None:
            alike[key] = recipe, list(_divided(model, recipe))
            yield from alike[key][1]
            continue
        layer = re.findall(r"\d+", parameter)[0]
        for weight in alike[key][1]:
            yield _weight(recipe, re.sub(r"\d+", layer, weight.name, count=1), weight.shape, weight.order)


def _divided(model: PreTrainedModel, recipe: Recipe) -> Iterator[GgufWeight]:
    """The tensors that one parameter is saved as."""
    import torch

    if recipe.order is None or recipe.order.columns is not None:
        value = torch.empty(recipe.shape, device="meta")
    else:
        value = _mark(recipe.order.rows, (*recipe.shape[:-1], _MARKS))
    for name, part in revert(model, {recipe.parameter: value}).items():
        rows = _rows(part)
        if rows is not None:
            yield _weight(recipe, name, (*part.shape[:-1], recipe.shape[-1]), Order(rows=rows))
        elif value.is_meta:
            yield _weight(recipe, name, tuple(part.shape), None, model)
        else:
            raise ValueError(f"`{name}` is not made of rows of `{recipe.parameter}`")


def _weight(
    recipe: Recipe, name: str, shape: tuple[int, ...], order: Order | None, divided_by: PreTrainedModel | None = None
) -> GgufWeight:
    first = recipe.parts[0]
    whole = recipe.load if divided_by is None else partial(_divide, divided_by, recipe, name)
    return GgufWeight(
        name=name, shape=shape, dtype="BF16", file=first.file, begin=first.begin, end=first.end, format=_FORMAT,
        parts=recipe.parts, tag=first.ggml_type, tile=prod(shape) if order is None else shape[-1],
        decode=recipe.loading.decode, order=order, transform=whole if order is None else None,
    )  # fmt: skip


def _divide(model: PreTrainedModel, recipe: Recipe, name: str, values: Mapping[str, Tensor]) -> Tensor:
    return revert(model, {recipe.parameter: recipe.load(values)})[name]
