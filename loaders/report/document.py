"""The report and the document of `ftload plan`, as values: what every reader of them reads.

Fields are only added within a schema version. One that was added has a default, so that reports of before are read;
`schema.py` makes the published schema from these classes, descriptions from the docstrings below the fields included.
Counts of parameters are logical: 4-bit weights unpacked, tied weights once, the adapter included, buffers not at all.
The file is long because every field of both is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, get_args

from ..decision import Decision
from ..flags.declared import Origin
from ..model.components import Component
from ..source.license import License
from ..system.attention import Attention
from .json_values import Keyword, absent_before

SCHEMA_VERSION = "1"
ComponentName: TypeAlias = Annotated[str, Keyword("enum", get_args(Component))]


def _strategies() -> tuple[str, ...]:
    from ..strategy import STRATEGIES

    return tuple(STRATEGIES)


def _quantisation_tags() -> tuple[str, ...]:
    from ..strategy import STRATEGIES

    return tuple({tag: None for s in STRATEGIES.values() if s.quantisation is not None for tag in s.quantisation.tags})


StrategyName: TypeAlias = Annotated[str, Keyword("enum", _strategies)]
QuantisationTag: TypeAlias = Annotated[str, Keyword("enum", _quantisation_tags)]
Count: TypeAlias = Annotated[int, Keyword("minimum", 0)]
AtLeastOne: TypeAlias = Annotated[int, Keyword("minimum", 1)]
Percent: TypeAlias = Annotated[float, Keyword("minimum", 0), Keyword("maximum", 100)]
Seconds: TypeAlias = Annotated[float, Keyword("minimum", 0)]
Sha256: TypeAlias = Annotated[str, Keyword("pattern", "^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file of the model that was used."""

    path: str
    bytes: Count
    sha256: Sha256 | None
    """Where the hub states it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTotals:
    """How the checkpoint stored the tensors of one component, and what those add up to."""

    component: ComponentName
    format: str | None
    """What they were packed in, such as `bitsandbytes 4-bit`; None for what is stored as it is."""
    dtype: str
    """As it was stored: torch's name, or the format's own."""
    tensors: Count
    """As the model knows them: what one is packed in counts once."""
    parameters: Count
    bytes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedAdapter:
    """A trained adapter that was merged into the model."""

    adapter: str
    """As it was given."""
    path: str | None
    """Absolute, of a local one."""
    commit: Annotated[str, Keyword("pattern", "^[0-9a-f]{40}$")] | None
    """On a hub."""
    base: str | None
    """The model that it names as its base."""
    base_revision: str | None
    tensors: Count
    """Of the model, that it changed or replaced."""
    file: SourceFile
    """Its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the model came from."""

    model: str
    """As it was given."""
    kind: Literal["local", "hub", "gguf"]
    revision: str | None
    """As it was asked for."""
    commit: Annotated[str, Keyword("pattern", "^[0-9a-f]{40}$")] | None
    """What the revision was, on a hub."""
    path: str | None
    """Absolute, of a local model."""
    architecture: str
    """The class, such as `LlamaForCausalLM`."""
    model_type: str
    files: tuple[SourceFile, ...]
    """The files that were used."""
    stored: tuple[SourceTotals, ...] | None = absent_before("0.2")
    """How it was stored, by component."""
    license: License | None = None
    """As its model card tells it. Since 0.2."""
    merged: tuple[MergedAdapter, ...] = ()
    """Trained adapters that were merged into it, in order. Since 0.2."""
    cache: Annotated[str, Keyword("enum", ("hub", "none"))] | None = None
    """Whether weights on a hub were read in its cache, or (none) by ranges where they were not there already; null for
    a local model, and where no weight was read. Since 0.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """A flag's value, and where it came from."""

    value: Any
    """As JSON has it: infinity and NaN are strings."""
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorTotals:
    """How many tensors there are, and what they add up to."""

    tensors: Count
    """A 4-bit weight is one."""
    parameters: Count
    bytes: Count
    """Of the tensors' data; the JSON states of 4-bit weights count as overhead of their file, like headers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentTotals:
    """What the tensors of one component add up to."""

    parameters: Count
    bytes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """All parameters, counted in several ways."""

    total: Count
    trainable: Count
    frozen: Count
    trainable_percent: Percent
    never_trained: tuple[str, ...] = ()
    """Parameters that the model's class makes without a gradient, and `load_prepared` freezes; empty where an adapter
    is trained. Since 0.2."""
    by_dtype: Mapping[str, TensorTotals]
    """As stored; the base's own files where it is referenced."""
    in_training: Mapping[str, TensorTotals]
    """As `load_prepared` returns it."""
    by_component: Mapping[ComponentName, ComponentTotals]
    towers: Mapping[str, Count] = field(default_factory=dict)
    """Parameters of the base that text gives no gradient to, by the modules that they are in: vision and audio towers.
    Since 0.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """The rows of the embeddings, and what they are for."""

    tokenizer_size: Count
    rows_before: Count
    rows_after: Count
    resized: bool
    tied: bool
    """Whether input and output embedding are one tensor."""
    init: Annotated[str, Keyword("enum", ("mean", "reference"))] | None
    """How new rows were made."""
    pad_token_id: int | None = None
    """In config.json and generation_config.json, or set by `load_prepared` where the base is another's; null where they
    are as they were. Since 0.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotQuantized:
    """The weight matrices of one component that stay as they are."""

    component: str
    tensors: Count
    parameters: Count
    bytes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How the base is quantised."""

    method: Literal["bitsandbytes"]
    quant_type: QuantisationTag
    double_quant: bool
    block_size: Count
    compute_dtype: str
    storage_dtype: str
    coverage_percent: Percent
    """Of the parameters of all weight matrices outside embeddings and head."""
    not_quantized: tuple[NotQuantized, ...]
    """The rest of those, by component."""
    experts: Count = 0
    """Fused parameters of experts that are 4-bit: `load_prepared` loads them, and transformers after
    `import ftload.register`. Since 0.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The adapter as it was initialised."""

    r: AtLeastOne
    alpha: float
    dropout: Annotated[float, Keyword("minimum", 0), Keyword("exclusiveMaximum", 1)]
    targets: Mapping[str, AtLeastOne]
    """Target pattern to the number of linear layers that it matches."""
    experts_r: AtLeastOne | None = None
    """Rank of the adapters of fused experts; null where they are not trained. Since 0.2."""
    target_parameters: Mapping[str, AtLeastOne] = field(default_factory=dict)
    """Pattern of fused parameters, which are adapted as a whole, to the number that it matches. Since 0.2."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of PEFT's `LoraConfig` where they are not the default: `use_dora`, `bias` … Since 0.2."""
    changes_base: bool = False
    """Whether it starts from a part of the base, which lacks it: the base alone is not the original. Since 0.2."""
    parameters: Count
    dtype: str
    """Of what is low-rank; what of the base is trained beside it has the dtype that the base has in training, and rows
    of tokens are float32."""
    base: str
    """Hub id or absolute path."""
    revision: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LigerKernels:
    """What Liger has for the model."""

    supported: bool
    """Whether Liger has kernels for this architecture."""
    applied: tuple[str, ...]
    """What `load_prepared` applies where there is a GPU."""
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Kernels that were asked for."""

    liger: LigerKernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """The tokenizer that is saved with the model."""

    class_: str
    size: Count
    """Of all tokens, added ones too."""
    pad_token: str | None
    pad_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    bos_token: str | None
    padding_side: Literal["left", "right"] | None = absent_before("0.2")
    model_max_length: int | None = absent_before("0.2")
    """In tokens; transformers has 10^30 where nothing is known."""
    chat_template_sha256: Sha256 | None
    chat_template_name: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What is known before anything is written: the part that the report and the document of `ftload plan` share."""

    schema_version: Literal["1"]
    ftload_version: str
    strategy: StrategyName
    source: Source
    arguments: Mapping[str, Argument]
    """Every flag, by name."""
    base: Literal["copy", "reference"]
    """Whether the base model is in this directory, or is the original that the adapter points at."""
    base_scanned: bool | None = absent_before("0.2")
    """Whether every value of the base was read, and none was NaN or infinite; a base that is only referred to is not
    read."""
    parameters: Parameters
    embeddings: Embeddings
    quantization: Quantization | None
    adapter: Adapter | None
    gradient_checkpointing: bool
    """Whether `load_prepared` turns it on."""
    attention: Attention
    """On the machine that prepared it; `load_prepared` resolves it anew."""
    kernels: Kernels | None
    tokenizer: Tokenizer
    decisions: tuple[Decision, ...]
    """Everything that is otherwise than asked, or was chosen where nothing was asked."""
    warnings: tuple[str, ...]
    versions: Annotated[Mapping[str, str], Keyword("required", ("python",))]
    """Of Python and of every installed distribution that has a part in the result."""
    memory_budget_bytes: Count
    """`--max_memory`: for tensors in flight; interpreter and libraries come on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file of the output."""

    path: str
    """Relative to the output, with `/`."""
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Seconds that the workers spent on each kind of work."""

    read: Seconds
    convert: Seconds
    write: Seconds
    hash: Seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """Weights that were read on a hub and never lay on this disk."""

    bytes: Count
    """That travelled in this run while it wrote: more than there are where weights are needed twice."""
    compared: tuple[str, ...]
    """The files that were read whole, whose sha256 was therefore compared with the hub's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report(Described):
    """What `ftload prepare` wrote: ftload_report.json, and stdout with `--json`."""

    created: Annotated[str, Keyword("format", "date-time")]
    """UTC."""
    fingerprint: Sha256
    """Changes with whatever has a part in the result: the request, the sources, the versions."""
    configuration: Mapping[str, Sha256 | None] = field(default_factory=dict)
    """sha256 of the base's settings, by file: of its JSON with sorted keys, without versions, paths and dtypes; null
    where there is no such file. Since 0.2."""
    files: tuple[WrittenFile, ...]
    """Everything that was written, this report aside."""
    timings: Mapping[str, Seconds]
    """Seconds by stage."""
    work: Work
    """Seconds that the workers spent, added up over all of them, within the stage `write`."""
    ranges: Ranges | None = None
    """What weights were read by ranges, with `--source_cache none`; null where none were. Since 0.2."""
    peak_anonymous_bytes: Count
    """Of the whole process, libraries included, while it wrote."""
    peak_rss_bytes: Count
    """The same with file-backed pages, since the process began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTotals:
    """What the tensors of one component in one dtype add up to."""

    component: ComponentName
    dtype: str
    tensors: Count
    parameters: Count
    bytes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFile:
    """A safetensors file that would be written."""

    path: str
    bytes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What writing takes."""

    disk_bytes: Count
    """Of the output's weights."""
    fetch_bytes: Count
    """What the hub's cache takes beside that with `--source_cache hub`: weights that it lacks; nothing with `none`."""
    cached_bytes: Count
    """Weights that are read and in the hub's cache already."""
    memory_bytes: Count
    """For tensors, beside interpreter and libraries."""
    read_bytes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanDocument(Described):
    """What `ftload plan` says of the output, before the memory of training."""

    stored: tuple[StoredTotals, ...]
    files: tuple[PlannedFile, ...]
    needs: Needs
