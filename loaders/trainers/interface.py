"""What is handed over to a trainer, and what is known of one.

Each trainer's file answers what it does with a prepared directory; `ftload recipe`, the model card and docs/trainers.md
are made from those answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from ..flags.declared import FlatArguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """A prepared directory, as a trainer is told of it."""

    directory: str
    """Where it is: an absolute path."""
    model: str
    """What a trainer loads as the model: the directory, or, by reference, the original's hub id or absolute path."""
    revision: str | None
    """Commit of an original on a hub."""
    adapter: str | None
    """The directory of the prepared adapter."""
    strategy: str
    by_reference: bool
    """Whether the base is not in the directory."""
    quantised: bool
    quantised_experts: bool
    """Whether fused experts are 4-bit, which transformers loads only after `import ftload.register`."""
    storage_dtype: str | None
    """Of the packed codes, where the base is 4-bit: torch's name."""
    compute_dtype: str | None
    """Of the matrix products of 4-bit layers: torch's name."""
    lora_targets: tuple[str, ...]
    """Patterns of the layers that are adapted; empty where there is no adapter."""
    expert_adapters: bool
    """Whether experts have adapters of their own."""
    saved_modules: tuple[str, ...]
    """Modules of the base that are trained whole beside the adapter: PEFT's `modules_to_save`."""
    saves_tied: bool
    """Whether one of them is an embedding or a head, and both are tied."""
    rows_of_head: bool
    """Whether rows of the head are trained: its own, or those of an embedding that it is tied to."""
    gradient_checkpointing: bool
    attention: str
    """The implementation in effect where it was prepared: `flash_attention_2`, `sdpa` or `eager`."""
    attention_asked: str
    """The one that was asked for."""
    never_trained: tuple[str, ...]
    """Parameters that the model's class makes without a gradient, where there is no adapter."""
    liger: bool
    """Whether Liger's kernels were asked for and Liger has some for this model."""
    trust_remote_code: bool
    max_length: int | None
    """Tokens of a sequence: `--max_seq_length`, else what the tokenizer says; None where neither does."""
    data: tuple[str, ...]
    """Data sets of conversations: hub ids, or absolute paths of .json and .jsonl files."""
    messages: str
    """The column that holds a conversation: a list of `{"role", "content"}`."""
    output_dir: str
    """Where training writes."""
    flags: FlatArguments
    """All of Open Instruct's flags, as they were given to `prepare`."""
    given: frozenset[str]
    """Names of those that were given, on the command line or in YAML; the rest are defaults."""
    ftload_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a trainer can't take a directory."""

    reason: str
    """To go on after `TRAINER can't train DIRECTORY: `."""
    hint: str | None = None
    """What to do instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """How a trainer runs one step of what `ftload recipe` tells it, where memory depends on it."""

    loss: Literal["model", "chunks"] = "model"
    """`model`: the model's own, of all logits at once. `chunks`: the trainer's own, which never holds all logits."""
    keeps_outputs: bool = False
    """Whether the model's outputs, logits included, live until the backward pass is over."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of an adapter's weights and gradients."""
    unquantised_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of what is not quantised of a 4-bit base; `float32` is what k-bit preparation makes of it."""
    embedding_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of norms, embeddings and head where all is trained; with FlashAttention 2 they are bfloat16 in any case."""
    autocast: Literal["always", "adapters", "never"] = "always"
    """What is trained under autocast, where precision is mixed. `never`: FSDP2 gathers all weights in bfloat16."""
    quantised_liger: bool = True
    """Whether Liger's kernels, where they are asked for, run on a 4-bit base too."""
    named_optimizer: bool = True
    """Whether a 4-bit base's adapter has bitsandbytes' paged AdamW; else it is torch's, and `use_8bit_optimizer` is not
    taken over."""
    reentrant: bool = False
    """Whether gradient checkpointing of a 4-bit base is re-entrant, as k-bit preparation leaves it."""


class Trainer(Protocol):
    """What is known of one trainer, by running it."""

    name: str
    """As `--for` says it."""
    title: str
    """As people write it."""
    tested: Mapping[str, str]
    """Distribution to version: what the answers were found with."""
    file_name: str
    """Of the recipe: its suffix says what kind of file it is."""
    language: str
    """Of the recipe, as fenced code in Markdown names it."""
    step: TrainingStep
    """How it runs one step."""

    def refusal(self, handover: Handover) -> Refusal | None:
        """Why this combination can't work; None where it can."""
        ...

    def notes(self, handover: Handover) -> tuple[str, ...]:
        """What this trainer does otherwise than planned, or must be known before it is run: a sentence or two each."""
        ...

    def launch(self, handover: Handover, file: str) -> str:
        """The command line that runs the recipe, which lies in `file`."""
        ...

    def body(self, handover: Handover) -> str:
        """The recipe after its head of comments: complete, runnable, with a newline at its end."""
        ...

    def essentials(self, handover: Handover) -> str:
        """The lines of `body` without which it goes wrong: for the model card."""
        ...
