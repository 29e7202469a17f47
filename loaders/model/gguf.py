"""A GGUF file as a checkpoint: its header says which tensors there are, transformers what they become in the model.

llama.cpp's converter renames tensors, puts rows in another order, stacks experts, adds one to norms. transformers
undoes that, and its own code is asked what it does: run on small tensors whose values say which row they are, it shows
which stored rows a tensor of the model consists of, so that it can be read in pieces. What is no matter of rows (a
norm, a transposed weight) is made as a whole by that code. What a file lacks transformers leaves random, and what it
does not know it drops, both without a word: they are looked for here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.formats.gguf import Blocks, Gguf, GgufWeight, decode_blocks, stored_blocks
from ..checkpoint.gguf_header import GGML_TYPES, GgufHeader, read_gguf_header
from ..checkpoint.json_files import check_sizes
from ..errors import CheckpointError, MissingRequirementError, said_by
from ..source.source import Source
from ..system.quiet import quiet_transformers
from .config import config_of
from .model_class import choose_class
from .on_meta import LEAST_PARTS, PARTS_A_TENSOR, building, empty_model, load_on_meta
from .transformers_internals import (
    WeightMapping,
    dequantise_gguf,
    gguf_is_readable,
    gguf_names,
    gguf_processor,
    gguf_transforms,
    revert,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


_COMPUTED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
"""Tensors that llama.cpp's converter derives from the configuration: no weights, and in no model of transformers."""
_FORMAT = Gguf()
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
    use.
    """
    from transformers import PretrainedConfig

    if not gguf_is_readable():
        raise MissingRequirementError("reading GGUF files needs the `gguf` package", hint="pip install 'ftload[gguf]'")
    assert source.gguf_file is not None
    header = read_gguf_header(source.root / source.gguf_file)
    with _understanding(source), quiet_transformers():
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
        loading = _loading(header.metadata["general.architecture"], gguf.settings, empty)
    _check_types(source, stored.values(), loading)
    groups, strays = _grouped(stored, loading)
    with _understanding(source):
        recipes = {parameter: _recipe(loading, parameter, parts) for parameter, parts in groups.items()}
    state = {parameter: torch.empty(recipe.shape, device="meta") for parameter, recipe in recipes.items()}
    with building(loaded_as.model_class, most_parts):
        model, info = load_on_meta(loaded_as.model_class, loaded_as.config, state)
    _check_tensors(source, groups, strays, loading, model, info)
    known = model.state_dict().keys()
    with _understanding(source):
        # a model that was loaded is saved as it was found, but of a dequantised one transformers keeps no trace of that
        tensors = {
            tensor.name: tensor for tensor in _saved(empty, {name: recipes[name] for name in groups if name in known})
        }
    # what a mapping leads to and the model has not is left out by names that the model's class lists
    left_out = [name for name in stored if _COMPUTED.fullmatch(name)]
    left_out += [part.name for name, parts in groups.items() if name not in known for part in parts]
    notes = [f"`{name}` is not part of the model and is left out, as transformers does" for name in left_out]
    return Checkpoint(
        source=replace(source, notes=(*source.notes, *notes)),
        tensors=tensors,
        stored=stored,
        weight_files=(source.gguf_file,),
    )


# -- how transformers reads an architecture


class _Loading(Protocol):
    """How transformers makes parameters of the tensors of a GGUF file."""

    def parameter(self, name: str) -> str | None:
        """The parameter that a tensor becomes, or is a part of; None for a tensor that is not known."""
        ...

    def sources(self, parameter: str) -> list[str]:
        """The tensors that a parameter is made of, as far as that is known; `.weight` may be missing."""
        ...

    def decode(self, blocks: Tensor, ggml_type: str) -> Tensor:
        """The values of whole blocks (uint8), flat. Raises `LookupError` or `NotImplementedError` where it can't."""
        ...

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, by their names in the file, to parameters."""
        ...


def _loading(architecture: str, settings: Mapping[str, Any], model: PreTrainedModel) -> _Loading:
    transforms = gguf_transforms(architecture, model.config)
    return _Processed(architecture, settings, model) if transforms is None else _Mapped(transforms, model)


class _Processed:
    """As `load_gguf_checkpoint` does it: a table of names, and a processor of the architecture's own."""

    def __init__(self, architecture: str, settings: Mapping[str, Any], model: PreTrainedModel) -> None:
        self._processor = gguf_processor(architecture, settings)
        self._names = gguf_names(model, self._processor)
        self._parameters = {_stem(name): parameter for name, parameter in self._names.items()}

    def parameter(self, name: str) -> str | None:
        return self._parameters.get(_stem(name))

    def sources(self, parameter: str) -> list[str]:
        return [name for name, known in self._names.items() if known == parameter]

    def decode(self, blocks: Tensor, ggml_type: str) -> Tensor:
        return decode_blocks(blocks, ggml_type)

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        loaded: dict[str, Tensor] = {}
        for name, value in values.items():
            done = self._processor.process(
                value.numpy(), name, tensor_key_mapping=self._names, parsed_parameters={"tensors": loaded}
            )
            if done.name in self._names:  # else it has put it into `loaded` itself
                loaded[self._names[done.name]] = torch.from_numpy(done.weights)
        return loaded


class _Mapped:
    """By a weight mapping, as safetensors are loaded, with a decoder of transformers' own."""

    def __init__(self, transforms: list[Any], model: PreTrainedModel) -> None:
        self._mapping = WeightMapping(model, transforms)
        self._model = model

    def parameter(self, name: str) -> str:
        return self._mapping.target(name)[0]

    def sources(self, parameter: str) -> list[str]:
        return []

    def decode(self, blocks: Tensor, ggml_type: str) -> Tensor:
        import torch

        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(ggml_type)
        if plain is not None:
            return blocks.view(plain)
        values = dequantise_gguf(blocks, ggml_type)
        return decode_blocks(blocks, ggml_type) if values is None else values

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        converters: dict[str, Any] = {}
        for name, value in values.items():
            parameter, pattern = self._mapping.target(name)
            if pattern is None:
                loaded[parameter] = value
                continue
            converter = converters.setdefault(parameter, deepcopy(self._mapping.by_pattern[pattern]))
            converter.add_tensor(parameter, name, pattern, value)
        for parameter, converter in converters.items():
            done = converter.convert(parameter, model=self._model, config=self._model.config)
            loaded |= {name: made[0] if isinstance(made, list) else made for name, made in done.items()}
        return loaded


def _grouped(stored: Mapping[str, Blocks], loading: _Loading) -> tuple[dict[str, list[Blocks]], list[str]]:
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


# -- what a tensor of the model consists of


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recipe:
    """How one parameter is made."""

    loading: _Loading
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


def _recipe(loading: _Loading, parameter: str, parts: Sequence[Blocks]) -> _Recipe:
    """Find out how a parameter is made."""
    marked = _marked(loading, parameter, parts)
    if marked is not None:
        shape = (*marked.shape[:-1], parts[0].columns)
    else:
        import torch

        # zeros take no memory until they are copied
        zeros = {part.name: torch.zeros(part.dimensions, dtype=torch.int8) for part in parts}
        shape = tuple(loading.load(zeros)[parameter].shape)
    return _Recipe(loading=loading, parameter=parameter, parts=tuple(parts), shape=shape, marked=marked)


def _marked(loading: _Loading, parameter: str, parts: Sequence[Blocks]) -> Tensor | None:
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


def _saved(model: PreTrainedModel, recipes: Mapping[str, _Recipe]) -> Iterator[GgufWeight]:
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


def _divide(model: PreTrainedModel, recipe: _Recipe, name: str, values: Mapping[str, Tensor]) -> Tensor:
    return revert(model, {recipe.parameter: recipe.load(values)})[name]


def _weight(
    recipe: _Recipe,
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


def _check_types(source: Source, parts: Iterable[Blocks], loading: _Loading) -> None:
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
    loading: _Loading,
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
            here = {_stem(part.name) for part in parts}
            lacking |= {name for name in loading.sources(parameter) if _stem(name) not in here} or {parameter}
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


def _stem(name: str) -> str:
    """A name as it can be compared: transformers' table has the names of fused experts without their `.weight`."""
    return name.removesuffix(".weight")
