"""What an adapter has that a plain one has not, for people: of fields of PEFT's `LoraConfig`, by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..flags.lora_config import HONOURED

_SHOWN = 4
"""Of the names or numbers in a list."""


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an adapter_config.json that are not PEFT's default; what no such field can be is left out."""
    return {
        name: config[name]
        for name, field in HONOURED.items()
        if config.get(name) not in (None, field.default) and field.accepts(config[name])
    }


def in_words(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """A few words for each of the fields; rank, alpha and dropout, and which layers are adapted, are told elsewhere."""
    settings, words = settings_of(settings), []
    if settings.get("use_dora"):
        words.append("DoRA")
    if settings.get("use_rslora"):
        words.append("rsLoRA")
    initialisation = settings.get("init_lora_weights", True)
    if initialisation is not True:
        words.append(f"initialised by {initialisation}" if initialisation else "B random")
    words += (f"rank {rank} on {pattern}" for pattern, rank in settings.get("rank_pattern", {}).items())
    words += (f"alpha {alpha:g} on {pattern}" for pattern, alpha in settings.get("alpha_pattern", {}).items())
    for name, said in _LISTS.items():
        if name in settings:
            value = settings[name]
            words.append(f"{said} {_some(value if isinstance(value, list) else [value])}")
    if "modules_to_save" in settings:
        words.append(f"{_some(settings['modules_to_save'])} trained whole")
    indices = settings.get("trainable_token_indices", {})
    for module, rows in (indices if isinstance(indices, Mapping) else {"": indices}).items():
        of = f" of {module}" if module else ""
        words.append(f"row{'' if len(rows) == 1 else 's'}{of} {_some(rows)} trained")
    if settings.get("bias", "none") != "none":
        words.append("all biases trained" if settings["bias"] == "all" else "biases of its layers trained")
    if settings.get("lora_bias"):
        words.append("B with a bias")
    if settings.get("ensure_weight_tying"):
        words.append("ties kept")
    return tuple(words)


_LISTS = {
    "exclude_modules": "not on",
    "layers_to_transform": "in layers",
    "layers_pattern": "of",
}


def _some(values: Iterable[Any]) -> str:
    values = [str(value) for value in values]
    more = f" and {len(values) - _SHOWN:,} more" if len(values) > _SHOWN else ""
    return " ".join(values[:_SHOWN]) + more
