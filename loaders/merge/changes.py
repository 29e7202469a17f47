"""What an adapter does to one tensor of its base: the arithmetic of PEFT's `merge`, for any of its rows.

PEFT computes a delta in float32, the dtype that it gives to adapters, adds it to the weight and rounds the sum
(peft/tuners/lora/layer.py: `merge` and `get_delta_weight` of `Linear`, `Embedding` and `ParamWrapper`; variants.py and
dora.py for DoRA; trainable_tokens/layer.py). A piece of a product of matrices is, bit by bit, a piece of the whole one
as long as it has some rows and columns: a single one would be another routine of the library that multiplies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ..checkpoint.finite import all_finite
from ..checkpoint.plain import PlainReader
from ..checkpoint.tensors import TensorMeta
from ..errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ROWS = 64
"""Rows, or columns, that are computed together."""


_held = threading.local()
"""What a thread has read last: the pieces of a tensor, and the experts of a layer, need the same again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """Tensors of an adapter that are used together, as float32. A thread holds those that it has read last."""

    reader: PlainReader
    tensors: tuple[TensorMeta, ...]

    def read(self) -> tuple[Tensor, ...]:
        """All of them, in their shapes. Raises `CheckpointError` naming one that is not finite."""
        if getattr(_held, "owner", None) is not self:
            _held.owner = _held.values = None
            _held.values = tuple(_read_whole(self.reader, tensor) for tensor in self.tensors)
            _held.owner = self
        return _held.values

    @property
    def nbytes(self) -> int:
        """Of all of them in float32, and of the largest as it is stored."""
        return 4 * sum(tensor.parameters for tensor in self.tensors) + max(tensor.nbytes for tensor in self.tensors)


def _read_whole(reader: PlainReader, tensor: TensorMeta) -> Tensor:
    """A tensor of an adapter, in float32 and in its shape. Raises `CheckpointError` where it is not finite."""
    import torch

    values = reader.values(tensor, 0, tensor.parameters).to(torch.float32).reshape(tensor.shape)
    if not all_finite(values):
        raise CheckpointError(
            f"tensor `{tensor.name}` of the adapter's `{tensor.file}` holds NaN or infinity",
            hint="the adapter is damaged or was saved from a diverged run",
        )
    return values


class Change(Protocol):
    """What becomes of a tensor: rows × columns; a vector has one column, the experts of a stack follow one another."""

    @property
    def factors(self) -> Factors:
        """What it reads of the adapter."""
        ...

    @property
    def whole(self) -> bool:
        """Whether all rows have to be computed at once."""
        ...

    def apply(self, base: Tensor, first: int, last: int) -> Tensor:
        """The rows from `first` to `last` (exclusive), made of the same rows of `base`, in its dtype.

        Raises `CheckpointError` naming a tensor of the adapter that is not finite.
        """
        ...

    def memory(self, elements: int) -> int:
        """What `apply` allocates for so many elements beside the factors and its result, in bytes."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """What becomes of one parameter."""

    replaced_by: TensorMeta | None = None
    """The tensor of the adapter that takes its place."""
    copy: int | None = None
    """Which copy of the module that tensor is for, where PEFT trained one (`modules_to_save`): equal for tied ones."""
    change: Change | None = None
    """What is then added to it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """LoRA: the base plus `scaling · B A`, for a matrix, for a stack of experts, or for one of them.

    With DoRA, the weights of each output are scaled to the length that was learnt for them.
    """

    factors: Factors
    """A (rank × in), B (out × rank) and, for DoRA, the magnitudes (out). Of E experts: A (E·rank × in), in which one
    expert's rows follow another's, and B (out × rank·E), in which the experts' columns take turns."""
    scaling: float
    outs: int
    """The outputs that the tensor holds."""
    ins: int
    transposed: bool = False
    """Whether the tensor is (in, out): GPT-2's Conv1D, embeddings, some experts."""
    rounded: bool = False
    """Whether the delta is rounded before it is added: PEFT does so for embeddings and experts."""
    experts: int = 1
    expert: int | None = None
    """The expert that the tensor belongs to; None where it holds all of them."""
    first_out: int = 0
    """Where the tensor's outputs begin, if it is a part of what becomes one matrix."""

    @property
    def whole(self) -> bool:
        """DoRA measures columns where the tensor is transposed."""
        return self.dora and self.transposed

    @property
    def dora(self) -> bool:
        """Whether lengths were learnt too."""
        return len(self.factors.tensors) == 3

    def apply(self, base: Tensor, first: int, last: int) -> Tensor:
        """Add the delta, expert by expert."""
        import torch

        pieces = [
            self._apply(base[begin - first : end - first], expert, begin - start, end - start)
            for expert, start, begin, end in _by_expert(self._rows, first, last)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def memory(self, elements: int) -> int:
        """The delta and the base in its dtype; for DoRA the sum, its squares and the scaled sum too."""
        return elements * (20 if self.dora else 8)

    def of_expert(self, expert: int | None) -> LowRank:
        """The change of one expert's matrix; None where there is one matrix alone."""
        return replace(self, expert=expert)

    @property
    def _rows(self) -> int:
        """Rows of a matrix."""
        return self.ins if self.transposed else self.outs

    def _apply(self, base: Tensor, expert: int, first: int, last: int) -> Tensor:
        """Rows of one expert's matrix."""
        a, b, *magnitudes = self.factors.read()
        if self.experts > 1:
            expert = expert if self.expert is None else self.expert
            rank = a.shape[0] // self.experts
            a, b = a[expert * rank : (expert + 1) * rank], b.reshape(b.shape[0], rank, self.experts)[:, :, expert]
        outs = slice(self.first_out, self.first_out + self.outs)
        delta = self._delta(a, b[outs], first, last)
        if magnitudes:
            learnt = magnitudes[0][outs]
            return _scaled(base, delta, learnt if self.transposed else learnt[first:last], transposed=self.transposed)
        if self.rounded:
            return base + delta.to(base.dtype)
        return delta.add_(base).to(base.dtype)

    def _delta(self, a: Tensor, b: Tensor, first: int, last: int) -> Tensor:
        """Rows of `scaling · B A`, or of its transpose, in float32."""
        begin = max(0, min(first, self._rows - LEAST_ROWS))
        end = min(max(last, begin + LEAST_ROWS), self._rows)
        product = (b @ a[:, begin:end]).T if self.transposed else b[begin:end] @ a
        return product[first - begin : last - begin].mul_(self.scaling)


def _by_expert(rows: int, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
    """Whose rows of a stack those are: an expert, where its rows start, and which of the given ones they are."""
    for expert in range(first // rows, -(-last // rows)):
        start = expert * rows
        yield expert, start, max(first, start), min(last, start + rows)


def _scaled(base: Tensor, delta: Tensor, magnitudes: Tensor, *, transposed: bool) -> Tensor:
    """DoRA (arXiv:2402.09353, equation 5): each output's weights, scaled to the length that was learnt."""
    import torch

    outputs = base.T + delta.T if transposed else base + delta
    factors = (magnitudes / torch.linalg.norm(outputs, dim=1)).view(-1, 1)
    return ((factors.T if transposed else factors) * (base + delta)).to(base.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLayers:
    """A stack of experts, each of which was adapted as a linear layer of its own, or not at all."""

    layers: Mapping[int, LowRank]
    """By the expert; at least one."""
    rows: int
    """Of an expert's matrix."""
    transposed: bool
    """Whether that is (in, out); without DoRA then."""
    whole: bool = False

    @property
    def factors(self) -> Factors:
        """The largest of those that it reads, one after another."""
        return max((layer.factors for layer in self.layers.values()), key=lambda factors: factors.nbytes)

    def apply(self, base: Tensor, first: int, last: int) -> Tensor:
        """Change the rows of each expert by its own layer."""
        import torch

        pieces = []
        for expert, start, begin, end in _by_expert(self.rows, first, last):
            piece, layer = base[begin - first : end - first], self.layers.get(expert)
            pieces.append(piece if layer is None else layer.apply(piece, begin - start, end - start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def of_expert(self, expert: int | None) -> LowRank | None:
        """The change of one expert's matrix; None for an expert that was not adapted."""
        return None if expert is None else self.layers.get(expert)

    def memory(self, elements: int) -> int:
        """The changed rows of all experts, and what the layers take, one after another."""
        return 4 * elements + max(layer.memory(min(elements, layer.outs * layer.ins)) for layer in self.layers.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedBias:
    """`lora_bias`: the bias of B, scaled, is added to the layer's own."""

    factors: Factors
    scaling: float
    whole: bool = True

    def apply(self, base: Tensor, first: int, last: int) -> Tensor:
        """All of it."""
        (bias,) = self.factors.read()
        return (base + (bias * self.scaling).view(-1, 1)).to(base.dtype)

    def memory(self, elements: int) -> int:
        """The scaled bias, and the sum."""
        return elements * 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """`trainable_token_indices`: some rows of an embedding were trained, and take the place of the old ones."""

    factors: Factors
    indices: tuple[int, ...]
    whole: bool = False

    def apply(self, base: Tensor, first: int, last: int) -> Tensor:
        """Those that are among the rows."""
        (rows,) = self.factors.read()
        result = base.clone()
        for index, row in zip(self.indices, rows, strict=True):
            if first <= index < last:
                result[index - first] = row
        return result

    def memory(self, elements: int) -> int:
        """The copy."""
        return elements * 4
