"""What is in a checkpoint, an adapter, a prepared directory or a GGUF file, from headers and JSON files alone.

Neither torch nor transformers is imported, and no weight is read. What a parameter is for is told by its name, since
the modules are not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE, SINGLE_FILE
from ..checkpoint.gguf_header import GgufHeader, read_gguf_header
from ..checkpoint.json_files import read_json
from ..checkpoint.safetensors_header import read_header
from ..errors import CheckpointError
from ..model.components import component_of
from ..report.document import StoredTotals
from ..report.json_values import to_json
from ..source.file_names import ADAPTER_FILE, REPORT_FILE
from ..source.resolve import resolve_source
from ..source.source import Source, SourceFile
from ..steps.coverage import is_matrix, measure_coverage
from .inventory import StoredTensor, Sum, grouped, natural_key, open_tensors, stored_tensors, sum_of
from .json_facts import (
    AdapterFacts,
    Architecture,
    Prepared,
    adapter_facts,
    config_value,
    read_architecture,
    read_prepared,
)
from .tokenizer_facts import TokenizerFacts, gguf_tokenizer_facts, read_tokenizer_facts

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """The input embedding, and whether the head is a matrix of its own."""

    rows: int
    declared_tied: bool | None
    """`tie_word_embeddings` of config.json; None where it is left to the architecture."""
    head_stored: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How weights are packed."""

    method: str
    coverage_percent: float | None
    """Of the parameters of weight matrices outside embeddings and head, those that are packed; None for methods that
    ftload does not know."""
    not_quantized: Mapping[str, Sum]
    """Component to its matrices that are not packed."""
    kind: str | None
    """What packed weights are called, such as `4-bit`; None for methods that ftload does not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Everything that was found."""

    model: str
    """As the user gave it."""
    kind: Literal["model", "adapter", "prepared", "gguf", "file"]
    commit: str | None
    files: tuple[SourceFile, ...]
    """Those with tensors."""
    tensors: tuple[StoredTensor, ...]
    """In the order of their names, numbers by value."""
    architecture: Architecture | None
    embeddings: Embeddings | None
    quantization: Quantization | None
    tokenizer: TokenizerFacts | None
    adapter: AdapterFacts | None
    prepared: Prepared | None
    notes: tuple[str, ...]
    """What the user should be told."""

    @property
    def total(self) -> Sum:
        """Of all tensors."""
        return sum_of(self.tensors)

    def by(self, attribute: Literal["dtype", "component"]) -> dict[str, Sum]:
        """Sums by one of the tensors' attributes, in the order of its values."""
        return {value: sum_of(group) for value, group in grouped(self.tensors, attribute).items()}

    def adapter_kinds(self) -> dict[str, Sum]:
        """Sums of an adapter's tensors by what they are."""
        kinds: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            if tensor.component == "adapter":
                kinds.setdefault(kind_in_adapter(tensor.name), []).append(tensor)
        return {kind: sum_of(kinds[kind]) for kind in sorted(kinds)}

    def stored(self) -> list[StoredTotals]:
        """Sums by component and, in each, by dtype."""
        return [
            StoredTotals(component=component, dtype=dtype, **asdict(sum_of(group)))
            for component, tensors in grouped(self.tensors, "component").items()
            for dtype, group in grouped(tensors, "dtype").items()
        ]

    def to_json(self, tensors: Iterable[StoredTensor] | None) -> dict[str, Any]:
        """As JSON values, with the details of some tensors or without."""
        document = {
            "model": self.model,
            "kind": self.kind,
            "commit": self.commit,
            "files": [{"path": file.path, "bytes": file.bytes} for file in self.files],
            "total": asdict(self.total),
            "by_dtype": {dtype: asdict(found) for dtype, found in self.by("dtype").items()},
            "by_component": {component: asdict(found) for component, found in self.by("component").items()},
            "stored": to_json(self.stored()),
            "adapter_kinds": {kind: asdict(found) for kind, found in self.adapter_kinds().items()},
            **{
                key: None if value is None else asdict(value)
                for key in ("architecture", "embeddings", "quantization", "tokenizer", "adapter", "prepared")
                for value in (getattr(self, key),)
            },
            "notes": list(self.notes),
        }
        if tensors is not None:
            fields = ("name", "dtype", "shape", "parameters", "bytes", "file", "component")
            document["tensors"] = [{field: getattr(tensor, field) for field in fields} for tensor in tensors]
        return document


_KINDS = {
    ".lora_B.bias": "bias of B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_": "low-rank",
    ".token_adapter.": "token rows",
    ".bias": "bias",
}
"""What a tensor of an adapter is, by the first of these that its name holds."""


def kind_in_adapter(name: str) -> str:
    """What a tensor of an adapter is, by PEFT's name: a copy of one of the base's, if nothing else."""
    return next((kind for part, kind in _KINDS.items() if part in name), "saved module")


def inspect(model: str, *, revision: str | None = None) -> Inspection:
    """Find out what `model` is: a directory, a `.safetensors` or `.gguf` file, or a repository on the hub.

    Of a repository, JSON files and headers alone travel, and nothing is kept. Raises `SourceError` where there is
    nothing, `CheckpointError` for weights or JSON files that are malformed and for pickled weights.
    """
    file = _weights_file(model)
    source = resolve_source(model, revision) if file is None else file
    if source.gguf_file is not None:
        return _inspect_gguf(source, read_gguf_header(source.root / source.gguf_file))
    names = {file.path: file for file in source.files}
    metas, warnings = open_tensors(source)
    tensors = stored_tensors(source, metas.values())
    report = read_prepared(source) if REPORT_FILE in names else None
    places = [(source, "")]
    if report is not None and (source.root / "adapter").is_dir():
        places.append((resolve_source(str(source.root / "adapter"), None), "adapter/"))
    adapter = None
    files = [names[file] for file in dict.fromkeys(part.file for meta in metas.values() for part in meta.stored_in)]
    for place, prefix in places:
        found = {file.path: file for file in place.files}
        if ADAPTER_CONFIG in found:
            adapter = adapter_facts(read_json(place, ADAPTER_CONFIG))
        if ADAPTER_FILE in found:
            size = found[ADAPTER_FILE].bytes
            header = read_header(ADAPTER_FILE, size, lambda b, e, p=place: p.read(ADAPTER_FILE, b, e))
            # copies of the base's tensors may be there too, and are trained
            tensors += stored_tensors(place, header, prefix=prefix, component="adapter")
            files.append(SourceFile(path=prefix + ADAPTER_FILE, bytes=size, sha256=None))
    if not files and report is None:
        raise _no_weights(source, names)
    config = read_json(source, "config.json") if "config.json" in names else {}
    embeddings = None if file is not None else _embeddings(tensors, config)
    quantization = _quantization(tensors, config)
    tokenizer = read_tokenizer_facts(source)
    notes = [*source.notes, *warnings, *_advice(config, embeddings, tokenizer)]
    if ADAPTER_FILE in names and metas:
        notes.append("base and adapter share this directory: trainers that find both may train nothing")
    if quantization is not None and quantization.coverage_percent is None:
        notes.append(f"weights are packed by {quantization.method}: parameters are counted as stored elements")
    return Inspection(
        model=model,
        kind="file" if file else "prepared" if report else "adapter" if adapter and not metas else "model",
        commit=source.commit,
        files=tuple(files),
        tensors=tuple(sorted(tensors, key=lambda tensor: natural_key(tensor.name))),
        architecture=read_architecture(config) if config else None,
        embeddings=embeddings,
        quantization=quantization,
        tokenizer=tokenizer,
        adapter=adapter,
        prepared=report,
        notes=tuple(notes),
    )


def _weights_file(model: str) -> Source | None:
    """A `.safetensors` file as a source of its own; None where `model` is anything else."""
    try:
        path = Path(model).expanduser()
        if path.suffix != ".safetensors" or not path.is_file():
            return None
        file = SourceFile(path=path.name, bytes=path.stat().st_size, sha256=None)
    except (OSError, RuntimeError, ValueError):  # resolve_source says what is wrong with it
        return None
    return Source(model=model, kind="local", revision=None, commit=None, root=path.parent.resolve(), files=(file,))


def _no_weights(source: Source, names: Iterable[str]) -> CheckpointError:
    names = set(names)
    if names & {PICKLE_FILE, PICKLE_INDEX_FILE, "adapter_model.bin"}:
        hint = "a pickle has no header that could be read alone: convert it to safetensors"
        return CheckpointError(f"`{source.model}` has only pickled weights", hint=hint)
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return CheckpointError(f"`{source.model}` holds no safetensors", hint=f"give a GGUF file itself: `{gguf[0]}`")
    return CheckpointError(f"`{source.model}` holds no weights", hint=f"looked for {SINGLE_FILE} and {INDEX_FILE}")


def _embeddings(tensors: Iterable[StoredTensor], config: Mapping[str, Any]) -> Embeddings | None:
    rows = [
        tensor.shape[0]
        for tensor in tensors
        if tensor.component == "embedding" and tensor.shape and not re.search("wpe|position", tensor.name)
    ]
    if not rows:
        return None
    declared = config_value(config, "tie_word_embeddings")
    return Embeddings(
        rows=max(rows),
        declared_tied=declared if isinstance(declared, bool) else None,
        head_stored=any(tensor.component == "head" for tensor in tensors),
    )


def _quantization(tensors: list[StoredTensor], config: Mapping[str, Any]) -> Quantization | None:
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    matrices = [tensor for tensor in tensors if is_matrix(tensor.shape, tensor.component)]
    packed = next((tensor.format for tensor in matrices if tensor.format is not None), None)
    if packed is None:
        return Quantization(method=str(method), coverage_percent=None, not_quantized={}, kind=None) if method else None
    coverage = measure_coverage(matrices, lambda tensor: tensor.format is not None)
    return Quantization(
        method=packed.method,
        coverage_percent=round(coverage.percent, 4),
        not_quantized={component: sum_of(group) for component, group in coverage.left_by_component().items()},
        kind=packed.kind,
    )


def _advice(
    config: Mapping[str, Any], embeddings: Embeddings | None, tokenizer: TokenizerFacts | None
) -> Iterable[str]:
    """What in the files of a model does not go together."""
    if tokenizer is not None and tokenizer.pad_is_eos:
        yield f"the pad token is the end-of-sequence token, `{tokenizer.eos_token}`"
    if embeddings is None:
        return
    if tokenizer is not None and (tokenizer.rows_needed or 0) > embeddings.rows:
        yield f"the tokenizer needs {tokenizer.rows_needed:,} rows, the embedding has {embeddings.rows:,}"
    if embeddings.head_stored and embeddings.declared_tied:
        yield "config.json ties the head to the embedding, but a head is stored: where it differs, it is used"
    vocabulary = config_value(config, "vocab_size")
    if isinstance(vocabulary, int) and vocabulary != embeddings.rows:
        yield f"config.json says {vocabulary:,} tokens, the embedding has {embeddings.rows:,} rows"


def _inspect_gguf(source: Source, header: GgufHeader) -> Inspection:
    path = source.root / str(source.gguf_file)
    metadata = header.metadata
    family = str(metadata.get("general.architecture"))
    tensors = [
        StoredTensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            bytes=tensor.nbytes,
            file=path.name,
            component=component_of(tensor.name),
            parts=((path, tensor.begin, tensor.begin + tensor.nbytes),),
        )
        for tensor in header.tensors
    ]

    def number(key: str) -> int | None:
        value = metadata.get(f"{family}.{key}")
        return value if type(value) is int else None

    architecture = Architecture(
        name=None,
        model_type=family,
        dtype=None,
        layers=number("block_count"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        heads=number("attention.head_count"),
        key_value_heads=number("attention.head_count_kv"),
        experts=number("expert_count"),
        experts_per_token=number("expert_used_count"),
        context=number("context_length"),
        vocabulary=number("vocab_size"),
    )
    embeddings, tokenizer = _embeddings(tensors, {}), gguf_tokenizer_facts(metadata)
    parts = metadata.get("split.count")
    return Inspection(
        model=source.model,
        kind="gguf",
        commit=None,
        files=source.files,
        tensors=tuple(sorted(tensors, key=lambda tensor: natural_key(tensor.name))),
        architecture=architecture,
        embeddings=embeddings,
        quantization=None,
        tokenizer=tokenizer,
        adapter=None,
        prepared=None,
        notes=(
            *_advice({}, embeddings, tokenizer),
            *((f"this is one of {parts} files",) if type(parts) is int and parts > 1 else ()),
        ),
    )
