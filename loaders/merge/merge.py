"""Merging trained adapters into a checkpoint: which of its tensors become others when they are read."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tensors import DTYPE_CODES, TensorMeta
from ..decision import Decision
from ..errors import CheckpointError
from ..model.skeleton import LoadedHeaders, load_headers, resize_embeddings
from ..model.tensor_map import Group
from .adapter import AdapterWeights, TrainedAdapter, open_weights
from .changes import Changed, ExpertLayers, LowRank
from .merged_tensor import adapter_tensor, merged_tensor
from .parts import divide
from .peft_layers import find_changes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedAdapter:
    """An adapter that was merged."""

    adapter: TrainedAdapter
    file: str
    """Its weights, in the adapter's source."""
    tensors: int
    """How many of the base's tensors it changes or replaces."""
    sha256: str | None
    """Of the weights; None where only their header was read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Merge:
    """A checkpoint with adapters in it, and what is to be said of them."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    """The model's, with the rows that the adapters have."""
    adapters: tuple[MergedAdapter, ...] = ()
    decisions: tuple[Decision, ...] = ()


def merge(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    adapters: Iterable[TrainedAdapter],
    *,
    trust_remote_code: bool,
    headers_only: bool,
) -> Merge:
    """Merge adapters into a checkpoint, one after another, as PEFT's `merge_and_unload` does.

    Nothing is computed but what the headers tell: tensors are merged when they are read. `headers_only` leaves the
    weights of an adapter on a hub where they are. Raises `CheckpointError` naming what of an adapter can't be merged.
    """
    merged = Merge(checkpoint=checkpoint, config=config)
    for adapter in adapters:
        weights = open_weights(adapter, headers_only=headers_only)
        loaded = load_headers(
            merged.checkpoint, merged.config, trust_remote_code=trust_remote_code, headers_only=headers_only
        )
        merged = _merge_one(merged, loaded, weights)
    return merged


def _merge_one(merged: Merge, loaded: LoadedHeaders, weights: AdapterWeights) -> Merge:
    checkpoint, model, adapter = merged.checkpoint, loaded.model, weights.adapter
    embedding, head = loaded.embedding, loaded.head
    is_tied = head is not None and model.get_parameter(head) is model.get_parameter(embedding)
    rows = _saved_rows(weights, embedding) or model.get_parameter(embedding).shape[0]
    if rows != model.get_parameter(embedding).shape[0]:
        resize_embeddings(model, rows)
    parameters = {
        name: (tuple(value.shape), DTYPE_CODES[str(value.dtype).removeprefix("torch.")])
        for name, value in model.state_dict().items()
    }
    changes = find_changes(model, weights)
    owners = {parameter: group for group in loaded.groups for parameter in group.parameters}
    tensors, decisions, untied = dict(checkpoint.tensors), merged.decisions, False
    if is_tied and head is not None:
        shared = owners.get(embedding) or owners[head]
        untied = _is_untied(changes.get(embedding), changes.get(head))
        if untied:
            tensors[head] = replace(shared.sources[0], name=head)
            owners[head] = Group(parameters=(head,), sources=(tensors[head],), conversion=None)
            decisions = (*decisions, _untying(adapter, embedding, head))
        else:
            changed = changes.pop(head, None)
            if changed is not None or embedding in changes:
                changes[embedding] = changes.get(embedding) or changed or Changed()
                owners[embedding] = shared
                for source in () if owners.get(head) in (None, shared) else owners[head].sources:
                    tensors.pop(source.name)  # the same once more
    touched = set()
    for parameter, changed in changes.items():
        shape, dtype = parameters[parameter]
        if owners[parameter].conversion is None:
            (source, *_) = owners[parameter].sources
            tensors[source.name] = _merged(source, changed, shape, dtype, weights)
            touched.add(source.name)
        else:
            for source, change in _parts(adapter, parameter, owners[parameter], changed, shape):
                tensors[source.name] = merged_tensor(source.name, source, dtype, change)
                touched.add(source.name)
    for parameter in {embedding, head} - changes.keys() - {None}:
        if parameter in owners and owners[parameter].sources[0].shape != parameters[parameter][0] and not is_tied:
            raise CheckpointError(
                f"the adapter `{adapter.name}` holds an embedding of {rows} rows, but nothing for `{parameter}`",
                hint="save it with both: PEFT's `save_pretrained(…, save_embedding_layers=True)`",
            )
    done = MergedAdapter(adapter=adapter, file=weights.file, tensors=len(touched), sha256=weights.sha256)
    return Merge(
        checkpoint=replace(checkpoint, tensors=tensors),
        config=_with_embeddings(merged.config, rows, untied=untied),
        adapters=(*merged.adapters, done),
        decisions=decisions,
    )


def _saved_rows(weights: AdapterWeights, embedding: str) -> int | None:
    """The rows of the input embedding that an adapter holds whole; None where it holds none."""
    module = embedding.removesuffix(".weight")
    for name in (f"base_model.model.{module}.weight", f"base_model.model.{module}.base_layer.weight"):
        if name in weights.tensors and len(weights.tensors[name].shape) == 2:
            return weights.tensors[name].shape[0]
    return None


def _is_untied(embedding: Changed | None, head: Changed | None) -> bool:
    """Whether what an adapter does to two parameters that are one makes them two.

    Rows of tokens are shared, and so is what PEFT loads into the base itself. A product of matrices is meant for one of
    them: PEFT would add it to both.
    """
    if any(changed is not None and isinstance(changed.change, LowRank) for changed in (embedding, head)):
        return True
    if embedding is not None and head is not None and embedding.change is not None and head.change is not None:
        return True
    return (embedding and embedding.copy) != (head and head.copy)


def _untying(adapter: TrainedAdapter, embedding: str, head: str) -> Decision:
    return Decision(
        what="tie_word_embeddings",
        requested="true",
        effective="false",
        reason=f"the adapter `{adapter.name}` changes `{embedding}` and `{head}`, which were one, in different ways",
    )


def _parts(
    adapter: TrainedAdapter, parameter: str, group: Group, changed: Changed, shape: tuple[int, ...]
) -> list[tuple[TensorMeta, LowRank]]:
    """The stored tensors that become a parameter together, and what becomes of each."""
    parts = []
    if changed.replaced_by is None and isinstance(changed.change, LowRank | ExpertLayers):
        parts = divide(group, parameter, shape, changed.change)
    if not parts:
        raise CheckpointError(
            f"the adapter `{adapter.name}` changes `{parameter}`, which is made of several tensors of the checkpoint, "
            f"`{group.sources[0].name}` among them, in a way that ftload can't follow",
            hint="merge it with PEFT itself",
        )
    return parts


def _merged(
    source: TensorMeta, changed: Changed, shape: tuple[int, ...], dtype: str, weights: AdapterWeights
) -> TensorMeta:
    """A stored tensor with what an adapter does to it."""
    base = source
    if changed.replaced_by is not None:
        base = adapter_tensor(source.name, changed.replaced_by, weights.reader)
    if base.shape != shape:
        raise CheckpointError(
            f"tensor `{source.name}` has shape {list(base.shape)}, the adapter `{weights.adapter.name}` was trained on "
            f"{list(shape)}"
        )
    return base if changed.change is None else merged_tensor(source.name, base, dtype, changed.change)


def _with_embeddings(config: PretrainedConfig, rows: int, *, untied: bool) -> PretrainedConfig:
    """The configuration with so many rows, and with two embeddings where they were one."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.vocab_size = rows
    for part in (config, text) if untied else ():
        part.tie_word_embeddings = False
    return config
