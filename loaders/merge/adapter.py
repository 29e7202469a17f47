"""A trained adapter: where it lies, what its configuration says, and where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.json_files import absent_error, read_json
from ..checkpoint.plain import PlainReader
from ..checkpoint.safetensors_header import read_header
from ..checkpoint.tensors import TensorMeta
from ..errors import CheckpointError
from ..source.file_names import ADAPTER_CONFIGS, ADAPTER_FILE, REPORT_FILE
from ..source.local import resolve_directory
from ..source.resolve import resolve_source
from ..source.source import Source
from ..system.durable import hash_file

CONFIG_FILE, PREPARED_CONFIG = ADAPTER_CONFIGS
PICKLE_FILE = "adapter_model.bin"
_TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer_config.json"})


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedAdapter:
    """An adapter that PEFT saved, as its configuration describes it."""

    name: str
    """As the user gave it."""
    source: Source
    """Where its adapter_config.json lies."""
    tokenizer: Source | None
    """Where the tokenizer lies that it was trained with; None where none was saved beside it."""
    config: Mapping[str, Any]
    """adapter_config.json."""
    base: str | None
    """The model that it was trained on, as it names it: a hub id or a path."""
    base_revision: str | None


def find_adapter(name: str) -> TrainedAdapter:
    """The adapter in a directory or repository, or in `adapter/` of a directory that ftload prepared.

    The base of the latter is that directory, wherever it was moved, if it holds one. Raises `SourceError` where nothing
    is found, `CheckpointError` for what is no adapter or of a kind that can't be merged.
    """
    found = resolve_source(name, None)
    source = found
    if found.kind == "local" and CONFIG_FILE not in found.adapters and PREPARED_CONFIG in found.adapters:
        source = resolve_directory(name, None, found.root / "adapter")
    if not any(file.path == CONFIG_FILE for file in source.files):
        raise absent_error(
            source, f"`{name}` holds no `{CONFIG_FILE}`", "--merge_adapter takes the directory of a trained adapter"
        )
    source.fetch([CONFIG_FILE])
    config = read_json(source, CONFIG_FILE)
    for key in ("base_model_name_or_path", "revision", "peft_type"):
        if not isinstance(config.get(key), str | None):
            raise CheckpointError(f"`{CONFIG_FILE}` of `{name}`: `{key}` is not a text")
    _check_kind(name, config)
    base, revision = config.get("base_model_name_or_path") or None, config.get("revision") or None
    if source.kind == "local" and source.root.name == "adapter" and _is_model(source):
        base, revision = str(source.root.parent), None
    return TrainedAdapter(
        name=name,
        source=source,
        tokenizer=next((place for place in (source, found) if _has_tokenizer(place)), None),
        config=config,
        base=base,
        base_revision=revision,
    )


def _is_model(source: Source) -> bool:
    """Whether the directory above holds a base that ftload prepared."""
    place = source.root.parent
    return (place / REPORT_FILE).is_file() and any(place.glob("*.safetensors"))


def _has_tokenizer(source: Source) -> bool:
    return not _TOKENIZER_FILES.isdisjoint(file.path for file in source.files)


_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""
_OTHER_ARITHMETIC = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of PEFT's `LoraConfig` under which a merged weight is not the base plus a product of two matrices."""


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for an adapter that can't be merged as LoRA is."""
    kind = config.get("peft_type")
    if kind != "LORA":
        said = f"is of the kind `{kind}`" if kind else "does not say of which kind it is (`peft_type`)"
        raise CheckpointError(f"the adapter `{name}` {said}: ftload merges LoRA", hint="merge it with PEFT itself")
    for key in _OTHER_ARITHMETIC:
        if config.get(key):
            raise CheckpointError(
                f"the adapter `{name}` has `{key}` in its `{CONFIG_FILE}`, which ftload can't merge",
                hint="merge it with PEFT itself",
            )
    initial = config.get("init_lora_weights")
    if initial not in _KEEP_THE_BASE:
        raise CheckpointError(
            f"the adapter `{name}` was initialised by `{initial}`, which changed the base that it was trained on",
            hint="convert it: PEFT's `save_pretrained(…, path_initial_model_for_weight_conversion=…)`",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterWeights:
    """The weights of an adapter: where each of its tensors lies, and the way to read them."""

    adapter: TrainedAdapter
    file: str
    tensors: Mapping[str, TensorMeta]
    reader: PlainReader
    sha256: str | None
    """Of the file; None where only its header was read."""


def open_weights(adapter: TrainedAdapter, *, headers_only: bool) -> AdapterWeights:
    """Read the header of an adapter's weights; the file itself travels too, unless `headers_only`.

    Raises `CheckpointError` where it is missing, or not a whole safetensors file.
    """
    source = adapter.source
    sizes = {file.path: file.bytes for file in source.files}
    if ADAPTER_FILE not in sizes:
        if PICKLE_FILE in sizes:
            raise CheckpointError(
                f"the adapter `{adapter.name}` is pickled (`{PICKLE_FILE}`)",
                hint="save it again with a newer PEFT, as safetensors",
            )
        raise absent_error(
            source, f"the adapter `{adapter.name}` holds no `{ADAPTER_FILE}`", "was it saved to another directory?"
        )
    if not headers_only:
        source.fetch([ADAPTER_FILE])
    header = read_header(ADAPTER_FILE, sizes[ADAPTER_FILE], lambda begin, end: source.read(ADAPTER_FILE, begin, end))
    return AdapterWeights(
        adapter=adapter,
        file=ADAPTER_FILE,
        tensors={tensor.name: tensor for tensor in header},
        reader=PlainReader(source=source),
        sha256=None if headers_only else hash_file(source.root / ADAPTER_FILE),
    )
