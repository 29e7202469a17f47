"""What the flags of `prepare` mean for a run, whichever trainer it is told to."""

from __future__ import annotations

from typing import Any

from .interface import Handover


def mixed_precision(handover: Handover) -> str:
    """accelerate's word for the run's dtype: that of 4-bit layers, else bfloat16 as in Open Instruct's scripts."""
    return {"bfloat16": "bf16", "float16": "fp16"}.get(handover.compute_dtype or "bfloat16", "no")


def optimizer(handover: Handover) -> str:
    """Open Instruct's, by transformers' name: bitsandbytes' paged AdamW for QLoRA, torch's for all else."""
    if handover.quantised:
        return "paged_adamw_8bit" if handover.flags.use_8bit_optimizer else "paged_adamw_32bit"
    return "adamw_torch_fused" if handover.flags.fused_optimizer else "adamw_torch"


def asks_for_flash(handover: Handover) -> bool:
    """Whether the machine that trains may have what the one that prepared had not."""
    return handover.attention_asked == "flash_attention_2" != handover.attention


def is_file(name: str) -> bool:
    """Whether a data set is a file of conversations: else a hub id."""
    return name.endswith((".json", ".jsonl"))


def mixture(handover: Handover) -> list[tuple[str, str, float | int]]:
    """Each data set with its split, and its share (a float) or number of rows (an int), as Open Instruct reads it."""
    flags = handover.flags
    if flags.dataset_name is not None:
        shares: list[float | int] = [1.0]
    elif flags.dataset_mixer is not None:
        shares = [_share(value) for value in flags.dataset_mixer.values()]
    else:
        shares = [_share(value) for value in flags.dataset_mixer_list[1::2]]
    splits = flags.dataset_mixer_list_splits or ["train"]
    splits = splits if len(splits) == len(handover.data) else splits[:1] * len(handover.data)
    shares += [1.0] * (len(handover.data) - len(shares))
    return list(zip(handover.data, splits, shares, strict=False))


def saving(handover: Handover) -> dict[str, Any]:
    """transformers' settings of when to save, beside the end: names and values."""
    when = handover.flags.checkpointing_steps
    if when is None:
        return {"save_strategy": "no"}
    settings: dict[str, Any] = {"save_strategy": "epoch" if when == "epoch" else "steps"}
    if when.isdecimal():
        settings["save_steps"] = int(when)
    if handover.flags.keep_last_n_checkpoints > 0:
        settings["save_total_limit"] = handover.flags.keep_last_n_checkpoints
    return settings


def left_out(handover: Handover) -> tuple[str, ...]:
    """Notes on flags that no trainer but Open Instruct's own has anything for."""
    flags, notes = handover.flags, []
    if flags.final_lr_ratio is not None:
        notes.append("final_lr_ratio is not taken over: the learning rate falls to zero.")
    if flags.sequence_parallel_size > 1:
        notes.append("sequence_parallel_size is not taken over: each device has whole sequences.")
    return tuple(notes)


def _share(value: Any) -> float | int:
    text = str(value)
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return 1.0
