"""What of PEFT's `LoraConfig` is asked for by flags, and what can't be honoured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import UsageError
from .values import printable

if TYPE_CHECKING:
    from .declared import Arguments

INITIALISATIONS = ("true", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")
"""Values of `--init_lora_weights`; any number goes in the place of 16."""
NEW_TOKENS = "new"
"""In the place of `trainable_token_indices`: the rows that are added to the embeddings."""
_OF_PISSA = re.compile(r"pissa(_niter_[0-9]{1,4})?")
_NEEDS = {
    "eva": "EVA starts from the activations of data, and ftload reads none",
    "corda": "CorDA starts from the activations of data, and ftload reads none",
    "lora_ga": "LoRA-GA starts from the gradients of data, and ftload reads none",
    "loftq": "PEFT computes LoftQ on a GPU, and without double quantisation",
    "mica": "MiCA trains A alone, and ftload's adapters train both matrices",
}
"""Initialisations of PEFT that can't be had, and why."""


def initialisation_problem(value: bool | str) -> str | None:
    """What is wrong with a value of `init_lora_weights`, to go on after its name; None if nothing."""
    if isinstance(value, bool) or value in ("gaussian", "orthogonal", "olora"):
        return None
    if _OF_PISSA.fullmatch(value):
        return None
    if value in _NEEDS:
        return f"can't be `{value}`: {_NEEDS[value]}"
    return f"is true, gaussian, orthogonal, pissa, pissa_niter_N (N up to 9999) or olora, not `{printable(value)}`"


def changes_base(initialisation: bool | str) -> bool:
    """Whether PEFT takes from the base's weights what this value of `init_lora_weights` puts into the adapter."""
    return isinstance(initialisation, str) and initialisation.startswith(("pissa", "olora"))


def token_ids(texts: list[str]) -> list[int] | str:
    """The value of `--trainable_token_indices`: ids, or `new`. Raises `ValueError`: what is wrong, after its name."""
    if texts == [NEW_TOKENS]:
        return NEW_TOKENS
    ids = []
    for text in texts:
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ValueError(f"takes the ids of tokens, or `new` alone, not `{printable(text)}`")
        ids.append(int(text))
    if not ids:
        raise ValueError("must name at least one token")
    twice = next((one for one in ids if ids.count(one) > 1), None) if len(ids) != len({*ids}) else None
    if twice is not None:
        raise ValueError(f"names token {twice} twice")
    return ids


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRequest:
    """The adapter that is asked for."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | None
    settings: Mapping[str, Any]
    """By PEFT's names of them, in the order of these: what a plain adapter does not have."""
    decisions: tuple[Decision, ...]


_FLAGS = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
    "init_lora_weights": "init_lora_weights",
}
"""By PEFT's name: the flag that asks for the same."""
_DEFAULTS: Mapping[str, Any] = {"use_dora": False, "use_rslora": False, "init_lora_weights": True}
"""PEFT's, where it is not None."""


def resolve_lora(arguments: Arguments) -> LoraRequest:
    """The adapter that flags ask for. Raises `UsageError` where they ask for what PEFT refuses."""
    flat, own = arguments.flat, arguments.own
    fields = {field: getattr(flat if hasattr(flat, flag) else own, flag) for field, flag in _FLAGS.items()}
    if fields["trainable_token_indices"] is not None:
        fields["trainable_token_indices"] = token_ids(fields["trainable_token_indices"])
    _check(fields, arguments)
    rank, alpha, dropout, targets = (fields.pop(name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules"))
    return LoraRequest(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=None if targets is None else tuple(targets),
        settings={name: value for name, value in sorted(fields.items()) if value != _DEFAULTS.get(name)},
        decisions=(),
    )


def _check(fields: Mapping[str, Any], arguments: Arguments) -> None:
    """Raise `UsageError` where fields contradict each other or a flag: in PEFT's words where it has some."""
    initialisation, rank = fields["init_lora_weights"], fields["r"]
    if initialisation == "orthogonal" and rank % 2:
        raise UsageError(
            f"`init_lora_weights`: PEFT's orthogonal initialization requires the LoRA rank to be even, got {rank}",
            hint=f"pass --lora_rank {rank + 1}",
        )
    if changes_base(initialisation) and arguments.own.base == "reference":
        raise UsageError(
            f"`--base reference` can't be had with `init_lora_weights` {initialisation}, which changes the base",
            hint="leave out `--base`",
        )
    if not fields["target_parameters"]:
        return
    if arguments.own.lora_experts is not None:
        raise UsageError(
            "`--lora_experts` and `target_parameters` are two ways of naming what is adapted",
            hint="give --lora_experts RANK to adapt all experts, or --lora_target_parameters to name them",
        )
    if fields["use_dora"]:
        raise UsageError(
            "`target_parameters`: PEFT's `lora.ParamWrapper does not work with use_dora=True.`",
            hint="leave out one of them",
        )
