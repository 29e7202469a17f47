"""GGUF files, dequantised by transformers into an ordinary checkpoint.

transformers builds the whole model to do so: memory is that of the model in bfloat16, not of a chunk. What a file lacks
it leaves random, and what it does not know it drops, both without a word: they are looked for here.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.gguf_header import GgufHeader, read_gguf_header
from ..errors import CheckpointError, MissingRequirementError, said_by
from ..source.resolve import resolve_source
from ..source.source import Source
from ..system.quiet import quiet_transformers
from .transformers_internals import gguf_is_readable, gguf_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_COMPUTED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
"""Tensors that llama.cpp's converter derives from the configuration: no weights, and in no model of transformers."""


def dequantise(source: Source, directory: Path) -> Source:
    """Write the model of a `.gguf` file into `directory`, in bfloat16 safetensors, and return it as a local source.

    Its notes tell of tensors that are left out. Raises `MissingRequirementError` without the `gguf` package,
    `CheckpointError` for a file that transformers can't use, or that does not hold just the tensors of its model.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    if not gguf_is_readable():
        raise MissingRequirementError("reading GGUF files needs the `gguf` package", hint="pip install 'ftload[gguf]'")
    assert source.gguf_file is not None
    header = read_gguf_header(source.root / source.gguf_file)
    # whatever the file's own pad token is, the model gets the tokenizer's: a row that it lacks would only stop torch
    overrides = {"pad_token_id": None} if _pad_is_beyond(header) else {}
    try:
        # its conversion draws a progress bar that no setting turns off
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.root,
                gguf_file=source.gguf_file,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported by us, with names
                output_loading_info=True,
                **overrides,
            )
            model, info = loaded
            _check_tensors(source, header, model, info)
            model.save_pretrained(directory)
    except (
        ValueError,
        LookupError,
        OSError,
        RuntimeError,  # a NotImplementedError too
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        raise CheckpointError(
            f"`{source.model}` can't be dequantised: {said_by(error)}",
            hint="is it a whole GGUF file of a language model?",
        ) from error
    notes = [
        f"`{tensor.name}` is not part of the model and is left out, as transformers does"
        for tensor in header.tensors
        if _COMPUTED.fullmatch(tensor.name)
    ]
    return replace(resolve_source(str(directory), None), model=source.model, notes=(*source.notes, *notes))


def _pad_is_beyond(header: GgufHeader) -> bool:
    """Whether the embedding has no row for the pad token."""
    pad = header.metadata.get("tokenizer.ggml.padding_token_id")
    rows = next((tensor.shape[0] for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    return isinstance(pad, int) and rows is not None and pad >= rows


def _check_tensors(source: Source, header: GgufHeader, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the file holds every element of the model, and no other tensors.

    `info` is what transformers says of the loading. Where several tensors make up one parameter, it does not say that
    one of them was missing; and of tensors that it does not know, it says nothing.
    """
    stored = {_stem(tensor.name): tensor for tensor in header.tensors}
    known = gguf_names(header.metadata["general.architecture"], model)
    sources = defaultdict(list)
    for name, parameter in known.items():
        sources[parameter].append(name)
    mismatched = {name: (found, expected) for name, found, expected in sorted(info["mismatched_keys"])}
    lacking: set[str] = set()
    for parameter, value in model.state_dict().items():
        if parameter in mismatched:
            continue
        names = sources[parameter]
        found = sum(stored[_stem(name)].parameters for name in names if _stem(name) in stored)
        if parameter in info["missing_keys"] or 0 < found < value.numel():
            lacking |= {name for name in names if _stem(name) not in stored} or {parameter}
    unexpected = set(info["unexpected_keys"])
    if known:
        stems = {_stem(name) for name in known}
        unexpected |= {
            tensor.name for stem, tensor in stored.items() if stem not in stems and not _COMPUTED.fullmatch(tensor.name)
        }
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
    """A name as it can be compared: that map has the names of fused experts without their `.weight`."""
    return name.removesuffix(".weight")
