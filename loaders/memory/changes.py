"""What can be changed of a run's flags so that training takes less memory.

`ORDER` is the one order of changes, from what alters the result of training least to what alters it most; it decides
between lists of changes that are equally long.

- `checkpointing`: the same numbers, for about a third more time.
- `storage`: the same numbers; 4-bit codes lie under a dtype that FSDP divides, so that the base must be written anew.
- `batch`: smaller batches, accumulated: as many sequences for each update, each batch's loss a mean of its own.
- `liger`: Liger's kernels, and its loss that never holds all logits: the same formulas, rounded elsewhere.
- `8-bit optimizer`: its states are rounded to 8 bits. Open Instruct has it for QLoRA alone.
- `lora`: an adapter is trained in place of all weights.
- `qlora`: and the base is rounded to 4 bits.
- `length`: sequences are cut, so that data is lost. That is the last resort: it is advised only where no list of other
  changes fits, and to less than half only where no list that leaves half does.

bitsandbytes' paged optimizer is no change: under QLoRA, Open Instruct's is paged already.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..flags.declared import FlatArguments, all_flags
from ..liger import resolve_kernels

if TYPE_CHECKING:
    from ..flags.declared import Arguments
    from ..plan.plan import Plan
    from .sharding import Sharding

Kind: TypeAlias = Literal["checkpointing", "storage", "batch", "liger", "8-bit optimizer", "lora", "qlora", "length"]
ORDER: tuple[Kind, ...] = (
    "checkpointing", "storage", "batch", "liger", "8-bit optimizer", "lora", "qlora", "length",
)  # fmt: skip
_OF_4_BITS: frozenset[Kind] = frozenset(("storage", "8-bit optimizer"))
"""Those that have a meaning for QLoRA alone."""
LENGTH_STEP = 128
"""Tokens: lengths that are advised are multiples of it."""
_LARGEST_BATCH, _LARGEST_LENGTH = 4096, 2**20
"""Of those that are tried: a larger one is a slip of who typed it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of a run's flags."""

    kind: Kind
    words: str
    """What it is, for people."""
    flags: Mapping[str, Any]
    """The new values of flags, by name."""


def possible_changes(
    plan: Plan, arguments: Arguments, *, length: int, sharding: Sharding | None
) -> dict[Kind, tuple[Change, ...]]:
    """All changes of each kind, the least one first; `length` is that of a sequence with these arguments."""
    flat, own = arguments.flat, arguments.own
    quantised, adapted = plan.strategy.quantisation is not None, plan.adapter is not None
    method = "LoRA" if adapted else "full fine-tuning"
    found: dict[Kind, list[tuple[str, dict[str, Any]]]] = {kind: [] for kind in ORDER}
    if not flat.gradient_checkpointing and plan.skeleton.model.supports_gradient_checkpointing:
        found["checkpointing"].append(("gradient checkpointing", {"gradient_checkpointing": True}))
    if sharding is not None and sharding.is_fsdp and own.bnb_4bit_quant_storage in (None, "uint8"):
        found["storage"].append(("4-bit weights as bfloat16, divided", {"bnb_4bit_quant_storage": "bfloat16"}))
    size, accumulated = flat.per_device_train_batch_size, flat.gradient_accumulation_steps
    for smaller in range(min(size - 1, _LARGEST_BATCH), 0, -1):
        if size % smaller == 0 and accumulated >= 1:
            steps = accumulated * size // smaller
            flags = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": steps}
            found["batch"].append((f"batch {size} → {smaller}, accumulation {accumulated} → {steps}", flags))
    if not flat.use_liger_kernel and resolve_kernels(plan.skeleton.config.model_type).supported:
        found["liger"].append(("Liger's kernels and fused loss", {"use_liger_kernel": True}))
    if not flat.use_8bit_optimizer:
        found["8-bit optimizer"].append(("8-bit optimizer", {"use_8bit_optimizer": True}))
    if not adapted:
        found["lora"].append((f"LoRA in place of {method}", {"use_lora": True}))
    if not quantised:
        flags = {} if flat.use_lora else {"use_lora": True}  # Open Instruct looks for both
        flags |= {"use_qlora": True} | ({"base": "auto"} if own.base == "reference" else {})
        found["qlora"].append((f"QLoRA in place of {method}", flags))
    longest = min(length - 1, _LARGEST_LENGTH) // LENGTH_STEP * LENGTH_STEP
    for shorter in range(longest, 0, -LENGTH_STEP):
        found["length"].append((f"length {length:,} → {shorter:,} tokens", {"max_seq_length": shorter}))
    return {
        kind: tuple(Change(kind=kind, words=words, flags=flags) for words, flags in ways)
        for kind, ways in found.items()
        if ways
    }


def go_together(kinds: Iterable[Kind], *, quantised: bool) -> bool:
    """Whether each of the kinds has an effect beside the others; `quantised` says whether the run is QLoRA as it is."""
    chosen = frozenset(kinds)
    return not chosen.issuperset(("lora", "qlora")) and (
        quantised or "qlora" in chosen or chosen.isdisjoint(_OF_4_BITS)
    )


def harm(kinds: Iterable[Kind]) -> tuple[int, ...]:
    """How much a list alters the result of training: lists compare by their worst change, then by the next one."""
    return tuple(sorted(map(ORDER.index, kinds), reverse=True))


def in_order(changes: Iterable[Change]) -> tuple[Change, ...]:
    """The mildest first, but what is for QLoRA alone not before QLoRA."""
    changes = tuple(changes)
    asks_for_qlora = any(change.kind == "qlora" for change in changes)

    def place(change: Change) -> tuple[int, bool, int]:
        number = ORDER.index(change.kind)
        waits = asks_for_qlora and change.kind in _OF_4_BITS
        return ORDER.index("qlora") if waits else number, waits, number

    return tuple(sorted(changes, key=place))


def changed(arguments: Arguments, changes: Iterable[Change]) -> Arguments:
    """The arguments with these changes, as if they were typed at the end of the command line."""
    values = flags_of(changes)
    training = {name for name in values if all_flags()[name].group == FlatArguments.__name__}
    return replace(
        arguments,
        flat=replace(arguments.flat, **{name: values[name] for name in values if name in training}),
        own=replace(arguments.own, **{name: values[name] for name in values if name not in training}),
        origins={**arguments.origins, **dict.fromkeys(values, "cli")},
    )


def flags_of(changes: Iterable[Change]) -> dict[str, Any]:
    """The new values of all flags that are changed, by name."""
    return {name: value for change in changes for name, value in change.flags.items()}


def typed(flags: Mapping[str, Any]) -> str:
    """Flags as they are typed."""
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in flags.items()]
    return shlex.join(word for pair in words for word in pair)
