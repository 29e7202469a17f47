"""Which stored tensor becomes which parameter, and what will be saved under which name.

Renaming, merging and splitting on loading are transformers' conversion mapping; the names that `save_pretrained` would
write come from the same mapping, reversed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.formats.interface import PackedTensor
from ..checkpoint.tensors import DTYPE_CODES, TORCH_NAMES, TensorMeta
from ..checkpoint.transposed import transposed
from ..errors import CheckpointError
from .components import Component, LinearLayer, component_of
from .experts.fused import FusedExperts
from .experts.single import single_experts
from .experts.stacked import stack_experts
from .transformers_internals import (
    WeightMapping,
    conv1d,
    finds_statistics,
    is_kept_in_float32,
    is_replaced_when_quantised,
    revert,
    set_after_loading,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """Stored tensors that transformers merges or splits on loading."""

    model: PreTrainedModel
    converter: Any
    parameter: str
    sources: tuple[tuple[str, str], ...]
    """Stored name and the converter's pattern that it matched, in transformers' order."""

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load and save in one go: stored names to values, then saved names to values."""
        return revert(self.model, self.load(values))

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored names to values, then parameter names to values."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.parameter, name, pattern, values[name])
        loaded = converter.convert(self.parameter, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in loaded.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelTensor:
    """One tensor that the prepared model is made of, under the name that it is saved by."""

    name: str
    parameter: str
    """The model's own name for what it is, or is a part of."""
    buffer: bool
    """Part of the state, but not a parameter."""
    shape: tuple[int, ...]
    """As saved, after resizing; the logical shape for a tensor that is or will be 4-bit."""
    dtype: str
    """The safetensors code that the reference loads it with: BF16, or F32 where the architecture keeps it so."""
    component: Component
    sources: tuple[TensorMeta, ...]
    linear: LinearLayer | None = None
    """The linear layer that it is the weight of, where bitsandbytes would quantise that layer."""
    experts: FusedExperts | None = None
    """The experts that it holds, where they are to be quantised: it then has the model's own name and shape."""
    quantised_from: str = "BF16"
    """The safetensors code that the reference casts it to before it quantises it."""
    set_after_loading: Tensor | None = None
    """What of a buffer is otherwise than stored: see `transformers_internals.py`."""
    rows_before: int | None = None
    """Rows in the checkpoint, where resizing adds some."""
    conversion: Conversion | None = None
    padding: int = 0
    """Elements that are saved but not loaded: rows beyond those that the model has."""
    quantised_problem: str | None = None
    """Why a quantised model with this tensor could not be loaded; None where it could."""

    @property
    def packed(self) -> PackedTensor | None:
        """What it is made from, where that stays packed: transformers loads it without decoding it."""
        return kept_packed(self.sources)


def kept_packed(sources: Iterable[TensorMeta]) -> PackedTensor | None:
    """The first of some tensors that transformers loads without decoding it."""
    packed = (source for source in sources if isinstance(source, PackedTensor))
    return next((source for source in packed if source.stays_packed), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """What becomes one parameter, or goes through one converter."""

    parameters: tuple[str, ...]
    sources: tuple[TensorMeta, ...]
    conversion: Conversion | None
    renamed: tuple[str, ...] = ()
    """What the sources of a conversion are called in it."""


def map_tensors(
    checkpoint: Checkpoint, model: PreTrainedModel, state: Mapping[str, Tensor]
) -> tuple[list[Group], list[str]]:
    """Group the stored tensors by the parameter that they become; the second value is what transformers drops."""
    weights = WeightMapping(model)
    targets = weights.targets(state)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name, (target, pattern) in targets.items():
        found.setdefault(target, []).append((name, pattern))
    dropped = [name for name in state if name not in targets]
    groups = []
    order = {name: position for position, name in enumerate(model.state_dict())}
    for target in sorted(found, key=order.__getitem__):
        metas = tuple(checkpoint.tensors[name] for name, _ in found[target])
        patterns = [(name, pattern) for name, pattern in found[target] if pattern is not None]
        if not patterns:
            # from_pretrained keeps the first where several names lead to one parameter
            source = _as_held(metas[0], model, target)
            groups.append(Group(parameters=(target,), sources=(source,), conversion=None))
            continue
        conversion = Conversion(
            model=model, converter=weights.by_pattern[patterns[0][1]], parameter=target, sources=tuple(patterns)
        )
        loaded = conversion.load(state)
        renamed = tuple(weights.renamed(meta.name) for meta in metas)
        groups.append(Group(parameters=tuple(loaded), sources=metas, conversion=conversion, renamed=renamed))
    return groups, dropped


def said_of_dropped(names: Sequence[str]) -> list[str]:
    """One warning for all that is dropped: a layer that predicts further tokens has hundreds of tensors."""
    if not names:
        return []
    if len(names) == 1:
        return [f"`{names[0]}` is not part of the model and is left out, as transformers does"]
    return [f"`{names[0]}` and {len(names) - 1} more are not part of the model and are left out, as transformers does"]


def _as_held(source: TensorMeta, model: PreTrainedModel, parameter: str) -> TensorMeta:
    """What is decoded, with the axes of its module: bitsandbytes stores the weight of a `Conv1D` transposed."""
    if isinstance(source, PackedTensor) and source.as_linear and not source.stays_packed:
        module = model.get_submodule(parameter.rpartition(".")[0])
        return transposed(source) if isinstance(module, conv1d()) else source
    return source


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedModel:
    """The model as it will be saved, resized and tied, and what it was before."""

    model: PreTrainedModel
    state: Mapping[str, Tensor]
    """What `save_pretrained` would write, by the model's own names."""
    names: Mapping[str, str]
    """The name that each parameter is saved by, unless it goes through a converter."""
    shapes_before: Mapping[str, tuple[int, ...]]
    """Of all parameters and buffers, before the embeddings were resized."""
    quantisable: Mapping[str, LinearLayer]
    """The linear layers that bitsandbytes would quantise, by the names of their weights."""
    experts: Mapping[str, FusedExperts]
    """Fused experts that are to be saved as the model has them, by parameter."""
    stays_packed: bool
    """Whether the checkpoint holds weights that transformers does not decode."""
    classes: Mapping[str, str]
    """Module names to class names."""
    head: str | None
    """The module of the output embedding."""


def saved_tensors(group: Group, saved: SavedModel) -> list[ModelTensor]:
    """What `save_pretrained` makes of one group; nothing where the parameter is tied to another or never saved.

    Raises `CheckpointError` for integers where the model has floats, and for resizing that changes more than rows, or
    what goes through a converter.
    """
    import torch

    kept = {name: saved.state[name] for name in group.parameters if name in saved.state}
    if not kept:
        return []
    parameter = group.parameters[0]
    buffer = not isinstance(saved.model.get_parameter_or_buffer(parameter), torch.nn.Parameter)
    component = component_of(parameter, saved.classes, head=saved.head)
    dtype = DTYPE_CODES[str(kept[next(iter(kept))].dtype).removeprefix("torch.")]
    if getattr(torch, TORCH_NAMES[dtype]).is_floating_point:
        _check_floats(group, saved, dtype)
    quantised_problem = _quantised_problem(group, saved)
    fused = _fused(group, saved)
    if fused is not None:
        experts = saved.experts[parameter]
        return [
            ModelTensor(
                name=parameter, parameter=parameter, buffer=False, shape=experts.shape, dtype=dtype,
                component=component, sources=(fused,), experts=experts,
                quantised_from="F32" if is_kept_in_float32(saved.model, parameter) else "BF16",
                quantised_problem=quantised_problem,
            )
        ]  # fmt: skip
    for name, value in kept.items():
        before, after = saved.shapes_before[name], tuple(value.shape)
        if before[1:] != after[1:] or (group.conversion is not None and before != after):
            raise CheckpointError(f"resizing the embeddings changes `{name}` in a way that ftload can't follow")
    if group.conversion is not None:
        stored = {meta.name: torch.empty(meta.shape, device="meta") for meta in group.sources}
        loaded = group.conversion.load(stored)
        elements = sum(value.numel() for value in loaded.values())
        outputs = {name: tuple(value.shape) for name, value in revert(saved.model, loaded).items()}
        padding = sum(map(prod, outputs.values())) - elements
        # a converter and its reverse cancel out when they give back every name and shape, and nothing is lost between
        for names in ([meta.name for meta in group.sources], group.renamed):
            if not padding and outputs == {n: meta.shape for n, meta in zip(names, group.sources, strict=True)}:
                return [
                    ModelTensor(
                        name=name, parameter=parameter, buffer=buffer, shape=meta.shape, dtype=dtype,
                        component=component, sources=(meta,), quantised_problem=quantised_problem,
                    )
                    for name, meta in zip(names, group.sources, strict=True)
                ]  # fmt: skip
        return [
            ModelTensor(
                name=name, parameter=parameter, buffer=buffer, shape=shape, dtype=dtype, component=component,
                sources=group.sources, conversion=group.conversion, quantised_problem=quantised_problem,
                padding=padding if position == 0 else 0,
            )
            for position, (name, shape) in enumerate(outputs.items())
        ]  # fmt: skip
    shape, before = tuple(saved.state[parameter].shape), saved.shapes_before[parameter]
    source = group.sources[0]
    if parameter not in saved.names and kept_packed((source,)) is None:
        matrices = single_experts(source, shape, parameter, lambda values: revert(saved.model, values))
        if matrices is None:
            raise CheckpointError(
                f"tensor `{source.name}` would be saved as several tensors, in a way that ftload can't follow",
                hint="save the checkpoint with transformers first: `from_pretrained`, `save_pretrained`",
            )
        return [
            ModelTensor(
                name=matrix.name, parameter=parameter, buffer=buffer, shape=matrix.shape, dtype=dtype,
                component=component, sources=(matrix,), quantised_problem=quantised_problem,
            )
            for matrix in matrices
        ]  # fmt: skip
    if saved.stays_packed:
        dtype = source.dtype  # what is stored beside weights that stay packed wins over `dtype=` on loading
    return [
        ModelTensor(
            name=saved.names.get(parameter, parameter), parameter=parameter, buffer=buffer, shape=shape, dtype=dtype,
            component=component, sources=(source,), linear=saved.quantisable.get(parameter),
            rows_before=before[0] if shape != before else None,
            # that a module is made in float32 counts only for what is not quantised
            quantised_from="F32" if is_kept_in_float32(saved.model, parameter) else "BF16",
            set_after_loading=set_after_loading(saved.model, parameter) if buffer else None,
            quantised_problem=quantised_problem,
        )
    ]  # fmt: skip


def _fused(group: Group, saved: SavedModel) -> TensorMeta | None:
    """What fused experts are read from as one tensor; None where they are not to be, or can't."""
    experts = saved.experts.get(group.parameters[0]) if len(group.parameters) == 1 else None
    if experts is None:
        return None
    if group.conversion is None:
        return group.sources[0]
    if kept_packed(group.sources) is not None:
        return None
    return stack_experts(experts.parameter, experts.shape, group.sources, group.conversion)


def _quantised_problem(group: Group, saved: SavedModel) -> str | None:
    """What keeps transformers from loading the group where config.json says that the model is 4-bit."""
    if group.conversion is not None and any(name in saved.quantisable for name in group.parameters):
        return "is merged or split into linear layers on loading, which it can't do with 4-bit weights"
    if group.conversion is not None and kept_packed(group.sources) is not None:
        return "is merged or split on loading, which it can't do with packed weights"
    for name in group.parameters:
        if name in saved.quantisable and not finds_statistics(name):
            return "has 4-bit statistics that it looks for under another name"
    owner = saved.classes[group.parameters[0].rpartition(".")[0]]
    if is_replaced_when_quantised(owner):
        return f"belongs to a `{owner}`, in whose place it puts other modules when weights are 4-bit"
    return None


def _check_floats(group: Group, saved: SavedModel, dtype: str) -> None:
    import torch

    for meta in group.sources:
        if not getattr(torch, TORCH_NAMES[meta.dtype]).is_floating_point:
            raise CheckpointError(
                f"tensor `{meta.name}` of `{meta.file}` holds {TORCH_NAMES[meta.dtype]}, where the model has "
                f"{TORCH_NAMES[dtype]}",
                hint="the checkpoint is damaged, or quantised in a way that its config.json does not tell",
            )


def saved_names(model: PreTrainedModel, groups: Iterable[Group], state: Mapping[str, Tensor]) -> dict[str, str]:
    """The name that each parameter of `state` is saved by, those that go through a converter, now or then, left out."""
    plain = {
        name: state[name] for group in groups if group.conversion is None for name in group.parameters if name in state
    }
    # renaming hands the very same tensors on, so that one call answers for all of them
    names = {id(value): name for name, value in revert(model, plain).items()}
    return {parameter: names[id(value)] for parameter, value in plain.items() if id(value) in names}
