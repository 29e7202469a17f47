"""A GGUF file as a checkpoint: its header says which tensors there are, transformers what they become in the model.

What a file lacks transformers leaves random, and what it does not know it drops, both without a word: they are looked
for here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.formats.gguf import Blocks, stored_blocks
from ...checkpoint.gguf_header import GGML_TYPES, GgufHeader, read_gguf_header
from ...checkpoint.json_files import check_sizes
from ...errors import CheckpointError, MissingRequirementError, said_by
from ...source.source import Source
from ...system.quiet import quiet_transformers
from ..config import config_of
from ..model_class import choose_class
from ..on_meta import LEAST_PARTS, PARTS_A_TENSOR, building, empty_model, load_on_meta
from ..tensor_map import said_of_dropped
from ..transformers_internals import gguf_is_readable
from .loading import GgufLoading, gguf_loading, stem
from .reader import quick_gguf_reader
from .recipes import find_recipes, saved_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_COMPUTED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
"""Tensors that llama.cpp's converter derives from the configuration: no weights, and in no model of transformers."""
_BLOCK_BYTES = {name: block_bytes for name, _, block_bytes in GGML_TYPES.values()}


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufModel:
    """What the header of a GGUF file says."""

    source: Source
    header: GgufHeader
    settings: Mapping[str, Any]
    """The configuration that transformers derives from the metadata: what config.json would hold."""

    def config(self, overrides: Mapping[str, Any] | None = None) -> tuple[PretrainedConfig, tuple[str, ...]]:
        """With `overrides`, as `load_config` gives it; the second value is warnings."""
        return config_of(self.settings, overrides=overrides or {}, shown=self.source.root / str(self.source.gguf_file))


def read_gguf(source: Source) -> GgufModel:
    """Read the header of a `.gguf` file.

    Raises `MissingRequirementError` without the `gguf` package, `CheckpointError` for a file that transformers can't
    use, and for a part of one.
    """
    from transformers import PretrainedConfig

    if not gguf_is_readable():
        raise MissingRequirementError("reading GGUF files needs the `gguf` package", hint="pip install 'ftload[gguf]'")
    assert source.gguf_file is not None
    header = read_gguf_header(source.root / source.gguf_file)
    count = header.metadata.get("split.count")
    if isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"`{source.model}` is one of the {count} files that a GGUF file was split into: whole ones are read",
            hint="join them, by llama.cpp's `llama-gguf-split --merge FIRST_FILE JOINED_FILE`, and give that",
        )
    with _understanding(source), quick_gguf_reader():
        settings, _ = PretrainedConfig.get_config_dict(source.root, gguf_file=source.gguf_file)
        if "model_type" not in settings:
            raise ValueError("its metadata name no model that transformers knows")
    check_sizes(settings, str(source.root / source.gguf_file))
    if _pad_is_beyond(header):
        # whatever it is, the model gets the tokenizer's pad token: a row that it lacks would only stop torch
        settings["pad_token_id"] = None
    return GgufModel(source=source, header=header, settings=settings)


def open_gguf(gguf: GgufModel) -> Checkpoint:
    """The file's tensors under the names that `save_pretrained` would give them; what is left out is in the warnings.

    Raises `CheckpointError` unless the file holds every element of its model, and no other tensors, all in types that
    can be decoded.
    """
    import torch

    source, header = gguf.source, gguf.header
    assert source.gguf_file is not None
    stored = {tensor.name: stored_blocks(tensor, source.gguf_file) for tensor in header.tensors}
    config, _ = gguf.config({"pad_token_id": None})
    loaded_as = choose_class(source, config, trust_remote_code=False)
    most_parts = PARTS_A_TENSOR * len(stored) + LEAST_PARTS
    with building(loaded_as.model_class, most_parts):
        empty = empty_model(loaded_as.model_class, loaded_as.config)
    with _understanding(source):
        loading = gguf_loading(header.metadata["general.architecture"], gguf.settings, empty)
    _check_types(source, stored.values(), loading)
    groups, strays = _grouped(stored, loading)
    with _understanding(source):
        recipes = find_recipes(loading, groups)
    state = {parameter: torch.empty(recipe.shape, device="meta") for parameter, recipe in recipes.items()}
    with building(loaded_as.model_class, most_parts):
        model, info = load_on_meta(loaded_as.model_class, loaded_as.config, state)
    _check_tensors(source, groups, strays, loading, model, info)
    parameters = model.state_dict().keys()
    known = {parameter: recipe for parameter, recipe in recipes.items() if parameter in parameters}
    with _understanding(source):
        # a model that was loaded is saved as it was found, but of a dequantised one transformers keeps no trace of that
        tensors = {tensor.name: tensor for tensor in saved_weights(empty, known)}
    # what a mapping leads to and the model has not is left out by names that the model's class lists
    left_out = [name for name in stored if _COMPUTED.fullmatch(name)]
    left_out += [part.name for name, parts in groups.items() if name not in known for part in parts]
    return Checkpoint(
        source=replace(source, notes=(*source.notes, *said_of_dropped(left_out))),
        tensors=tensors,
        stored=stored,
        weight_files=(source.gguf_file,),
    )


def _grouped(stored: Mapping[str, Blocks], loading: GgufLoading) -> tuple[dict[str, list[Blocks]], list[str]]:
    """What each parameter is made of, and the tensors that become none; those that are computed are neither."""
    groups: dict[str, list[Blocks]] = {}
    strays = []
    for name, part in stored.items():
        parameter = loading.parameter(name)
        if _COMPUTED.fullmatch(name):
            continue
        if parameter is None:
            strays.append(name)
        else:
            groups.setdefault(parameter, []).append(part)
    return groups, strays


# -- what can be wrong with a file


@contextmanager
def _understanding(source: Source) -> Iterator[None]:
    """Ask transformers about a file: what its code raises is told as the file's fault."""
    try:
        with quiet_transformers():
            yield
    except (
        ValueError,
        LookupError,
        OSError,
        RuntimeError,  # a NotImplementedError too
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        struct.error,
    ) as error:
        raise CheckpointError(
            f"`{source.model}` can't be dequantised: {said_by(error)}",
            hint="is it a whole GGUF file of a language model?",
        ) from error


def _pad_is_beyond(header: GgufHeader) -> bool:
    """Whether the embedding has no row for the pad token."""
    pad = header.metadata.get("tokenizer.ggml.padding_token_id")
    rows = next((tensor.shape[0] for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    return isinstance(pad, int) and rows is not None and pad >= rows


def _check_types(source: Source, parts: Iterable[Blocks], loading: GgufLoading) -> None:
    """Raise `CheckpointError` for a tensor without elements, or of a type that can't be decoded."""
    import torch

    first: dict[str, Blocks] = {}
    for part in parts:
        if not part.nbytes:
            raise CheckpointError(f"tensor `{part.name}` of `{source.model}` has no elements")
        first.setdefault(part.ggml_type, part)
    for ggml_type, part in first.items():
        try:
            loading.decode(torch.zeros(_BLOCK_BYTES[ggml_type], dtype=torch.uint8), ggml_type)
        except (LookupError, NotImplementedError) as error:
            raise CheckpointError(
                f"tensor `{part.name}` of `{source.model}` is stored as {ggml_type}, which the `gguf` package can't "
                "decode",
                hint="take a file of another quantisation",
            ) from error


def _check_tensors(
    source: Source,
    groups: Mapping[str, Sequence[Blocks]],
    strays: Collection[str],
    loading: GgufLoading,
    model: PreTrainedModel,
    info: Mapping[str, Any],
) -> None:
    """Raise `CheckpointError` unless the file holds every element of the model, and no other tensors.

    `info` is what transformers says of the loading. Where several tensors make up one parameter, it does not say that
    one of them was missing.
    """
    mismatched = {name: (found, expected) for name, found, expected in sorted(info["mismatched_keys"])}
    lacking: set[str] = set()
    for parameter, value in model.state_dict().items():
        parts = groups.get(parameter, ())
        found = sum(part.rows * part.columns for part in parts)
        if parameter not in mismatched and (parameter in info["missing_keys"] or 0 < found < value.numel()):
            here = {stem(part.name) for part in parts}
            lacking |= {name for name in loading.sources(parameter) if stem(name) not in here} or {parameter}
    unexpected = {*strays, *(part.name for name in info["unexpected_keys"] for part in groups[name])}
    problems = [
        f"tensor `{name}` has shape {list(found)}, the metadata ask for {list(expected)}{_more(mismatched)}"
        for name, (found, expected) in list(mismatched.items())[:1]
    ]
    problems += [
        f"{what} tensor `{min(names)}`{_more(names)}"
        for what, names in (("lacks", lacking), ("has the unexpected", unexpected))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"`{source.model}` does not fit `{type(model).__name__}`: {'; '.join(problems)}",
            hint="the file is incomplete, or transformers does not know all that this architecture has in GGUF files",
        )


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
