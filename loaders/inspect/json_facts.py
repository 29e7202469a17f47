"""What the JSON files of a checkpoint say of it: the architecture, an adapter, ftload's own report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..adapter.in_words import settings_of
from ..adapter.targets import in_order
from ..checkpoint.json_files import read_json
from ..report.outputs import as_report
from ..source.file_names import REPORT_FILE
from ..source.source import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What config.json, or a GGUF file's metadata, says of the model; None where it says nothing."""

    name: str | None
    """The class, such as `LlamaForCausalLM`."""
    model_type: str | None
    dtype: str | None
    layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    heads: int | None
    key_value_heads: int | None
    experts: int | None
    experts_per_token: int | None
    context: int | None
    vocabulary: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFacts:
    """What adapter_config.json says."""

    type: str | None
    r: int | None
    alpha: float | None
    dropout: float | None
    targets: tuple[str, ...]
    parameters: tuple[str, ...]
    """What is adapted of parameters that are no layer's weight: fused experts."""
    ranks: Mapping[str, int]
    """Ranks other than `r`, by pattern."""
    settings: Mapping[str, Any]
    """Other fields of PEFT's `LoraConfig` where they are not the default, by name; of those, what ftload prepares."""
    base: str | None
    revision: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What the report of a prepared directory says."""

    strategy: str
    model: str
    commit: str | None
    base: str
    """`copy` where the base lies here, `reference` where the adapter points elsewhere."""
    created: str
    ftload_version: str


def config_value(config: Mapping[str, Any], *names: str) -> Any:
    """The first of the keys that has a value, in the configuration or in that of its text model."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for name in names:
            if section.get(name) is not None:
                return section[name]
    return None


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    value = config_value(config, *names)
    return value if type(value) is int else None


def _text(values: Mapping[str, Any], *names: str) -> str | None:
    value = config_value(values, *names)
    return value if isinstance(value, str) else None


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The facts of a config.json, under the names that the architectures give them."""
    names = config.get("architectures")
    return Architecture(
        name=str(names[0]) if isinstance(names, list) and names else None,
        model_type=_text(config, "model_type"),
        dtype=_text(config, "dtype", "torch_dtype"),
        layers=_number(config, "num_hidden_layers", "n_layer", "n_layers"),
        hidden_size=_number(config, "hidden_size", "n_embd", "d_model"),
        intermediate_size=_number(config, "intermediate_size", "n_inner", "ffn_dim"),
        heads=_number(config, "num_attention_heads", "n_head", "n_heads"),
        key_value_heads=_number(config, "num_key_value_heads"),
        experts=_number(config, "num_local_experts", "num_experts", "n_routed_experts"),
        experts_per_token=_number(config, "num_experts_per_tok"),
        context=_number(config, "max_position_embeddings", "n_positions"),
        vocabulary=_number(config, "vocab_size"),
    )


def adapter_facts(config: Mapping[str, Any]) -> AdapterFacts:
    """The facts of an adapter_config.json."""
    found = config.get("rank_pattern")
    ranks: dict[str, Any] = found if isinstance(found, dict) else {}
    alpha, dropout = config.get("lora_alpha"), config.get("lora_dropout")
    shown = {"r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "rank_pattern"}
    return AdapterFacts(
        type=_text(config, "peft_type"),
        r=_number(config, "r"),
        alpha=alpha if isinstance(alpha, int | float) else None,
        dropout=dropout if isinstance(dropout, int | float) else None,
        targets=in_order(_texts(config.get("target_modules"))),
        parameters=in_order(_texts(config.get("target_parameters"))),
        ranks={name: ranks[name] for name in in_order(ranks) if type(ranks[name]) is int},
        settings={name: value for name, value in settings_of(config).items() if name not in shown},
        base=_text(config, "base_model_name_or_path"),
        revision=_text(config, "revision"),
    )


def _texts(found: Any) -> tuple[str, ...]:
    return tuple(map(str, [found] if isinstance(found, str) else found if isinstance(found, list) else []))


def read_prepared(source: Source) -> Prepared:
    """The facts of the report. Raises `CheckpointError` for one that this version does not understand."""
    report = as_report(read_json(source, REPORT_FILE), REPORT_FILE)
    return Prepared(
        strategy=report.strategy,
        model=report.source.model,
        commit=report.source.commit,
        base=report.base,
        created=report.created,
        ftload_version=report.ftload_version,
    )
