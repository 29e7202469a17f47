"""`--strict`: what is done otherwise than asked is an error, which says what to ask for."""

from __future__ import annotations

from collections.abc import Iterable

from ..decision import Decision
from ..errors import MissingRequirementError

_PASS = {
    "add_bos": "--add_bos false",
    "attention": "--use_flash_attn false",
    "base": "--base {effective}",
    "base_dtype": "--base copy",
    "lora_targets": "--lora_target_modules {effective}",
    "use_fast": "--use_fast true",
    "use_liger_kernel": "--use_liger_kernel false",
    "use_lora": "--use_lora",
}
"""The flags with which what a decision came to, or what is possible everywhere, is what was asked for."""


_LEAVE_OUT = frozenset(
    (
        "chat_template_name",
        "model_revision",
        "push_to_hub",
        "save_to_hub",
        "hf_entity",
        "hf_repo_id",
        "hf_repo_revision",
    )
)
"""Flags that had no effect."""


def check_strict(decisions: Iterable[Decision]) -> None:
    """Raise `MissingRequirementError` when anything is done otherwise than it was asked for."""
    other = [decision for decision in decisions if decision.effective != decision.requested]
    if not other:
        return
    listed = "; ".join(f"{d.what}: {d.requested} → {d.effective} ({d.reason})" for d in other)
    ways = list(dict.fromkeys(filter(None, map(_way_out, other))))
    raise MissingRequirementError(
        f"`--strict`: not as requested: {listed}",
        hint=", ".join([*(ways or ["ask for what is possible here"]), "or leave out --strict"]),
    )


def _way_out(decision: Decision) -> str | None:
    """The flags that would ask for what can be had; None if there are none."""
    if decision.what in _PASS:
        return f"pass `{_PASS[decision.what].format(effective=decision.effective)}`"
    flags = decision.what.split()
    if _LEAVE_OUT.issuperset(flags):
        return f"leave out `{' '.join(f'--{flag}' for flag in flags)}`"
    return None
