"""A prepared directory as a trainer is told of it, from its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter.in_words import settings_of
from ..flags.declared import FlatArguments, all_flags
from ..model.components import component_of
from ..trainers.interface import Handover
from ..trainers.run_settings import is_file
from .document import Report
from .recorded_flags import recorded_flags

_UNKNOWN_LENGTH = 10**9
"""Tokens; transformers has 10^30 where a tokenizer says nothing."""


def hand_over(report: Report, directory: str, *, data: str | None = None) -> Handover:
    """What trainers are told of `directory`, which is not looked at.

    `data` is a data set in the place of those in the recorded flags: a hub id, or a .json or .jsonl file. Raises
    `CheckpointError` where the report's flags are not what they were declared as.
    """
    flags = recorded_flags(report)
    if data is not None:
        data = str(Path(data).expanduser().absolute()) if is_file(data) else data
        flags = dataclasses.replace(flags, dataset_mixer_list=[data, "1.0"], dataset_name=None, dataset_mixer=None)
    adapter, quantization, base = report.adapter, report.quantization, report.base
    settings = {} if adapter is None else settings_of(adapter.settings)
    by_reference = adapter is not None and base == "reference"
    length = report.tokenizer.model_max_length
    return Handover(
        directory=directory,
        model=adapter.base if adapter is not None and by_reference else directory,
        revision=adapter.revision if adapter is not None and by_reference else None,
        adapter=None if adapter is None else f"{directory}/adapter",
        strategy=report.strategy,
        by_reference=by_reference,
        quantised=quantization is not None,
        quantised_experts=quantization is not None and quantization.experts > 0,
        storage_dtype=None if quantization is None else quantization.storage_dtype,
        compute_dtype=None if quantization is None else quantization.compute_dtype,
        lora_targets=() if adapter is None else tuple(adapter.targets),
        expert_adapters=adapter is not None and adapter.experts_r is not None,
        saved_modules=tuple(settings.get("modules_to_save", ())),
        saves_tied=report.embeddings.tied
        and any(
            component_of(f"{name}.weight") in ("embedding", "head") for name in settings.get("modules_to_save", ())
        ),
        rows_of_head=_trains_rows_of_head(settings, tied=report.embeddings.tied),
        gradient_checkpointing=report.gradient_checkpointing,
        attention=report.attention.effective,
        attention_asked=report.attention.requested,
        never_trained=() if adapter is not None else report.parameters.never_trained,
        liger=report.kernels is not None and report.kernels.liger.supported,
        trust_remote_code=_value(report, "trust_remote_code") is True,
        max_length=flags.max_seq_length or (length if length is not None and length < _UNKNOWN_LENGTH else None),
        data=_data_sets(flags),
        messages=str(_value(report, "sft_messages_key")),
        output_dir=f"{directory}-trained",
        flags=flags,
        given=frozenset(name for name, argument in report.arguments.items() if argument.origin != "default"),
        ftload_version=report.ftload_version,
    )


def _trains_rows_of_head(settings: Mapping[str, Any], *, tied: bool) -> bool:
    rows = settings.get("trainable_token_indices")
    return rows is not None and (tied or any(name.endswith("lm_head") for name in rows if isinstance(name, str)))


def _value(report: Report, name: str) -> Any:
    """A flag as it was given; its default where the report is of a version before it."""
    argument = report.arguments.get(name)
    return all_flags()[name].default if argument is None else argument.value


def _data_sets(flags: FlatArguments) -> tuple[str, ...]:
    if flags.dataset_name is not None:
        return (flags.dataset_name,)
    if flags.dataset_mixer is not None:
        return tuple(map(str, flags.dataset_mixer))
    return tuple(map(str, flags.dataset_mixer_list[::2]))
