"""`--strict`: anything that is not done as asked is an error, which names the flags to pass instead."""

from __future__ import annotations

from collections.abc import Iterable

from ..decision import Decision
from ..errors import MissingRequirementError

_PASS = {
    "add_bos": "--add_bos false",
    "attention": "--use_flash_attn false",
    "base": "--base {effective}",
    "dtype of the base": "--base copy",
    "source_cache": "--base copy",
    "lora_dropout": "--lora_dropout {effective}",
    "LoRA targets": "--lora_target_modules {effective}",
    "use_fast": "--use_fast true",
    "use_liger_kernel": "--use_liger_kernel false",
    "use_lora": "--use_lora",
}
"""By what a decision is about: the flags that ask for what it came to, or for what is possible everywhere."""
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
"""Flags that can have no effect."""
_NOT_ASKED = frozenset(("bos token", "eos token", "unk token", "pad token", "pad token of the model", "lora_config"))
"""What no flag asks for: the function that sets up the tokenizer decides it, or a flag goes before a file."""


def check_strict(decisions: Iterable[Decision]) -> None:
    """Raise `MissingRequirementError` if anything is not done as it was asked for."""
    other = [d for d in decisions if d.effective != d.requested and d.what not in _NOT_ASKED]
    if not other:
        return
    listed = "; ".join(f"{d.news} ({d.reason})" for d in other)
    ways = list(dict.fromkeys(filter(None, map(_way_out, other))))
    raise MissingRequirementError(
        f"`--strict`: not as requested: {listed}",
        hint=", ".join([*(ways or ["ask for what is possible here"]), "or leave out --strict"]),
    )


def _way_out(decision: Decision) -> str | None:
    """What to do so that the decision's result is what was asked for; None if nothing is known."""
    if decision.what in _PASS:
        return f"pass `{_PASS[decision.what].format(effective=decision.effective)}`"
    flags = decision.what.split()
    if _LEAVE_OUT.issuperset(flags):
        return f"leave out `{' '.join(f'--{flag}' for flag in flags)}`"
    return None
