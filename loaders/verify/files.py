"""What the files of a prepared directory say, compared with its report: no weight is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ..adapter.targets import ADAPTED, is_match
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.json_files import fetch_config
from ..checkpoint.safetensors_header import read_header
from ..checkpoint.tensors import TensorMeta
from ..model.config import differing_settings, load_config, load_generation_config, settings_hash
from ..model.skeleton import Skeleton, build_skeleton
from ..plan.vocabulary import set_padding
from ..report.document import Report
from ..report.json_values import from_json
from ..report.schema import published_schema
from ..source.file_names import REPORT_FILE
from ..source.resolve import resolve_source
from ..source.source import Source
from ..system.durable import hash_files
from ..system.quiet import quiet_transformers
from ..tokenizer.loading import load_tokenizer
from ..write.fingerprint import can_have_a_part

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..progress import Progress


PREPARE_AGAIN = "prepare it again with --overwrite"


@dataclass(kw_only=True)
class Context:
    """A prepared directory and what has been read of it. Whatever can't be read raises `FtloadError`, each time."""

    root: Path
    document: Mapping[str, Any]
    """The report as JSON values."""
    trust_remote_code: bool
    progress: Progress
    found: str = ""
    """What the check that is being made has seen, in a few words."""
    notes: tuple[str, ...] = ()
    """What that check has to tell of what is not wrong."""
    hint: str = PREPARE_AGAIN
    """What helps where the check that is being made finds something wrong. Preparing again does where the directory is
    not what was written; what was written wrong would be written again."""

    @cached_property
    def report(self) -> Report:
        """The report. What is missing in it, or of another type, raises `AttributeError` where it is asked for."""
        return from_json(Report, self.document, [])

    @cached_property
    def base_source(self) -> Source:
        """Where the base lies: in the directory itself, wherever that was moved to, or where the adapter refers to."""
        adapter = self.report.adapter
        if self.report.base == "copy" or adapter is None:
            source = resolve_source(str(self.root), None)
        else:
            source = resolve_source(adapter.base, adapter.revision)
        fetch_config(source)
        if self.trust_remote_code:
            source.fetch(file.path for file in source.files if file.path.endswith(".py"))
        return source

    @cached_property
    def base(self) -> Checkpoint:
        """The headers of the base."""
        return open_checkpoint(self.base_source, allow_pickle=False)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The base's configuration."""
        with quiet_transformers():
            return load_config(self.base_source.root, overrides={}, trust_remote_code=self.trust_remote_code)[0]

    @cached_property
    def skeleton(self) -> Skeleton:
        """What transformers makes of the base's configuration and headers: none missing, unexpected or misshapen."""
        return build_skeleton(self.base, self.config, trust_remote_code=self.trust_remote_code, tokenizer_size=0)

    @property
    def adapter_file(self) -> Path:
        """The adapter's weights, where there is an adapter."""
        return self.root / "adapter" / "adapter_model.safetensors"

    @cached_property
    def adapter(self) -> dict[str, TensorMeta]:
        """The headers of the adapter's tensors; empty where there is no adapter."""
        if self.report.adapter is None:
            return {}

        def read(begin: int, end: int) -> bytes:
            with self.adapter_file.open("rb") as file:
                file.seek(begin)
                return file.read(end - begin)

        size = self.adapter_file.stat().st_size
        return {tensor.name: tensor for tensor in read_header(self.adapter_file.name, size, read)}

    @cached_property
    def trained_in_place(self) -> frozenset[str]:
        """The adapter's tensors that are parameters of the base itself: biases."""
        adapter = self.report.adapter
        if adapter is None or adapter.settings.get("bias", "none") == "none":
            return frozenset()
        saved = adapter.settings.get("modules_to_save", ())
        biases = (name for name in self.adapter if name.endswith(".bias") and ".lora_" not in name)
        return frozenset(name for name in biases if not is_match(name.removesuffix(".bias"), saved))

    @cached_property
    def tied_copies(self) -> frozenset[str]:
        """The adapter's tensors that are one with another of them: the head's, tied to the embedding's."""
        adapter, head = self.report.adapter, f"{ADAPTED}{self.skeleton.head}"
        is_tied = adapter is not None and adapter.settings.get("ensure_weight_tying") and self.report.embeddings.tied
        return frozenset((head,)) & self.adapter.keys() if is_tied else frozenset()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as it lies in the directory."""
        with quiet_transformers():
            return load_tokenizer(
                self.root, use_fast=True, trust_remote_code=self.trust_remote_code, gguf_file=None
            )  # as `load_prepared` has it


def check_report(context: Context) -> Iterator[str]:
    """Whether the report is whole and agrees with itself."""
    yield from dict.fromkeys(_against_schema(context.document))  # each missing field is reported once
    parameters, adapter = context.report.parameters, context.report.adapter
    total, trainable = parameters.total, parameters.trainable
    context.found = f"{context.report.strategy}, {total:,} parameters, {trainable:,} trainable"
    if trainable + parameters.frozen != total:
        yield "trainable and frozen parameters are not the total"
    for section in ("by_dtype", "in_training", "by_component"):
        if sum(row.parameters for row in getattr(parameters, section).values()) != total:
            yield f"the parameters of `{section}` are not the total"
    if adapter and trainable != adapter.parameters:
        yield "the trainable parameters are not the adapter's"


def _against_schema(document: Mapping[str, Any]) -> Iterator[str]:
    """What the published schema does not allow; a later version may have added fields."""
    from jsonschema import Draft202012Validator

    for error in Draft202012Validator(published_schema()).iter_errors(document):
        place = ".".join(map(str, error.absolute_path))
        if error.validator == "required":
            for name in error.validator_value:
                if name not in error.instance:
                    yield f"`{place}{'.' if place else ''}{name}` is missing"
        elif error.validator != "additionalProperties":
            value, allowed = json.dumps(error.instance), json.dumps(error.validator_value)
            yield f"`{place}` is `{shorten(value, 80)}`, its {error.validator} is `{allowed}`"


def check_files(context: Context) -> Iterator[str]:
    """Every file's size and sha256, and that there are no others."""
    listed = {file.path: file for file in context.report.files}
    hashes = hash_files({context.root / name: file.bytes for name, file in listed.items()}, context.progress)
    for (name, file), (path, digest) in zip(listed.items(), hashes.items(), strict=True):
        if not path.is_file():
            yield f"`{name}` is missing"
        elif path.stat().st_size != file.bytes:
            yield f"`{name}` has {path.stat().st_size} bytes, not {file.bytes}"
        elif digest is None:
            yield f"`{name}` can't be read"
        elif digest != file.sha256:
            yield f"`{name}` is not what was written: its sha256 differs"
    for path in sorted(context.root.rglob("*")):
        name = path.relative_to(context.root).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_file() and can_have_a_part(name) and not hidden and name not in (*listed, REPORT_FILE):
            yield f"`{name}` is not in the report"
    context.found = f"{len(listed)} files, {sum(file.bytes for file in listed.values()):,} bytes"


def check_tensors(context: Context) -> Iterator[str]:
    """Counts and dtypes, taken again from the headers, and the statistics of packed weights."""
    counted: dict[str, dict[str, int]] = {}
    for tensor in (*_base_tensors(context), *context.adapter.values()):
        row = counted.setdefault(tensor.counted_as, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += tensor.stored_bytes
    context.found = ", ".join(f"{row['tensors']:,} {dtype}" for dtype, row in sorted(counted.items()))
    reported = context.report.parameters.by_dtype
    for dtype in sorted({*counted, *reported}):
        found, expected = counted.get(dtype, {}), reported.get(dtype)
        for what in ("tensors", "bytes"):
            number = 0 if expected is None else getattr(expected, what)
            if found.get(what, 0) != number:
                yield f"{found.get(what, 0):,} {what} of {dtype}, the report says {number:,}"
    if context.base_source.kind != "hub":  # there, each would have to be asked for
        for tensor in context.base.packed:
            yield from tensor.problems(context.base.values)


def _base_tensors(context: Context) -> Iterable[TensorMeta]:
    """The base's tensors: all that were written, or of another's checkpoint those that the model takes."""
    if context.report.base == "copy":
        return context.base.tensors.values()
    # rotary frequencies and the head of a tied model may lie there too, and are not the model's
    return (meta for tensor in context.skeleton.tensors if tensor.conversion is None for meta in tensor.sources)


_QUANTIZATION_KEYS = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "storage_dtype": "bnb_4bit_quant_storage",
}


def check_config(context: Context) -> Iterator[str]:
    """Whether config.json describes what the report does, and the weights that are there."""
    source, expected = context.report.source, context.report.quantization
    rows = context.report.embeddings.rows_after
    context.found = f"{source.architecture}, {rows:,} rows"
    text: Any = context.config.get_text_config()
    # where nothing was added it is as it came: Mllama's embeddings have 8 rows more
    if context.report.embeddings.resized and text.vocab_size != rows:
        yield f"`vocab_size` is {text.vocab_size}, the embeddings have {rows} rows"
    if context.config.model_type != source.model_type:
        yield f"the model is a `{context.config.model_type}`, the report says `{source.model_type}`"
    load_generation_config(context.base_source.root)
    for name, digest in context.report.configuration.items():
        if settings_hash(context.base_source.root / name) != digest:
            yield f"`{name}` has other settings than when this was prepared"
    yield from _check_copied_config(context)
    stored: Any = getattr(context.config, "quantization_config", None)
    if (stored is None) != (expected is None):
        yield "`quantization_config` is " + ("missing" if stored is None else "there, the report knows of none")
        return
    if stored is not None and expected is not None:
        settings = stored if isinstance(stored, dict) else stored.to_dict()
        differing = [
            f"`{name}` is {settings[name]}, the report says {getattr(expected, key)}"
            for key, name in _QUANTIZATION_KEYS.items()
            if name in settings and settings[name] != getattr(expected, key)
        ]
        yield from differing
        if differing:
            return
    skeleton = context.skeleton
    if context.report.base == "copy" and expected is None and context.config.dtype != skeleton.model.dtype:
        yield f"`dtype` is {context.config.dtype}, what was written is {skeleton.model.dtype}"
    if skeleton.rows_before != rows:
        yield f"the embeddings have {skeleton.rows_before} rows, the report says {rows}"
    if skeleton.tied != context.report.embeddings.tied:
        yield "embeddings and head are " + ("" if skeleton.tied else "not ") + "tied, the report says otherwise"
    if type(skeleton.model).__name__ != source.architecture:
        yield f"the model is a `{type(skeleton.model).__name__}`, the report says `{source.architecture}`"
    yield from _check_parameters(context)


def _check_copied_config(context: Context) -> Iterator[str]:
    """Whether config.json is the configuration of the base that lies elsewhere, with the tokenizer's padding."""
    if context.report.base == "copy" or "config.json" not in {file.path for file in context.report.files}:
        return  # reports of 0.1 know of none
    expected, pad = deepcopy(context.config), context.report.embeddings.pad_token_id
    if pad is not None:
        set_padding(expected, pad)
    with quiet_transformers():
        config, _ = load_config(context.root, overrides={}, trust_remote_code=context.trust_remote_code)
    for name in differing_settings(config, expected):
        found, other = getattr(config, name, None), getattr(expected, name, None)
        yield f"`{name}` of config.json is `{found}`, the base has `{other}`"


def _check_parameters(context: Context) -> Iterator[str]:
    """Logical parameters by stored dtype: the model tells them from its buffers. And how many are never trained."""
    if context.report.adapter is None:
        model = context.skeleton.model
        frozen = sum(model.get_parameter(name).numel() for name in context.skeleton.never_trained)
        if frozen != context.report.parameters.frozen:
            yield f"{frozen:,} parameters are frozen, the report says {context.report.parameters.frozen:,}"
    buffers = {meta.name for tensor in context.skeleton.tensors if tensor.buffer for meta in tensor.sources}
    counted: Counter[str] = Counter()
    for tensor in (*_base_tensors(context), *context.adapter.values()):
        if tensor.name not in buffers | context.trained_in_place | context.tied_copies:
            counted[tensor.counted_as] += tensor.parameters
    reported = context.report.parameters.by_dtype
    for dtype in sorted({*counted, *reported}):
        expected = reported[dtype].parameters if dtype in reported else 0
        if counted[dtype] != expected:
            yield f"{counted[dtype]:,} parameters of {dtype}, the report says {expected:,}"
