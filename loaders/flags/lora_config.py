"""What of PEFT's `LoraConfig` is asked for, by flags and by the file of `--lora_config`, and what can't be honoured.

A flag that is given goes before the file; what neither says is as without a file. Every field of `LoraConfig` (PEFT
0.21, tuners/lora/config.py) is in one of three groups, `HONOURED`, `LEFT_ALONE` and `REFUSED`: tests ask PEFT, which
is not imported here, whether one is missing. The file is long because there are 42 of them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import UsageError
from .values import BadValue, Problems, from_json, printable
from .yaml_file import label_of, read_text, read_values

if TYPE_CHECKING:
    from .declared import Arguments

JSON_BYTES = 1 << 22
"""The largest adapter_config.json that is read: every layer of a large mixture by its whole name takes a quarter."""
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""
_HOLDS = "the configuration of an adapter"
INITIALISATIONS = ("true", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")
"""Values of `--init_lora_weights`; any number goes in the place of 16."""
NEW_TOKENS = "new"
"""In the place of `trainable_token_indices`: the rows that are added to the embeddings."""

_READS_DATA = "starts from {} of data, and ftload reads none"
_EVA = f"EVA {_READS_DATA.format('the activations')}"
_CORDA = f"CorDA {_READS_DATA.format('the activations')}"
_LORA_GA = f"LoRA-GA {_READS_DATA.format('the gradients')}"
_LOFTQ = "PEFT computes LoftQ on a GPU, and without double quantisation"
_MEGATRON = "Megatron's layers are no part of a model of transformers"
_QALORA = "QALoRA is for GPTQ alone"

NO_INITIALISATIONS: Mapping[str, str] = {
    "eva": _EVA,
    "corda": _CORDA,
    "lora_ga": _LORA_GA,
    "loftq": _LOFTQ,
    "mica": "MiCA trains A alone, and an adapter of ftload both matrices",
}
"""Values of `init_lora_weights` that PEFT has and ftload can't honour, and why."""
LEFT_ALONE = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # PEFT sets it by layer
        "inference_mode",
        "peft_type",  # LORA is checked, and so is CAUSAL_LM
        "peft_version",
        "revision",
        "task_type",
    )
)
"""Fields that say where a file comes from, or that are the same for every adapter of a causal language model."""


@dataclass(frozen=True, slots=True)
class Honoured:
    """A field that is honoured."""

    default: Any
    """PEFT's."""
    takes: str
    """What its values are, in words."""
    accepts: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that can't be honoured, unless it has its default."""

    default: Any
    """PEFT's."""
    reason: str


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


def _is_regex(value: Any) -> bool:
    """Whether PEFT can match the ends of modules' names with it: `get_pattern_key` puts it into a group."""
    if not _is_name(value):
        return False
    try:
        re.compile(rf"(.*\.)?({value})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_mapping(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_regex(name) and accepts(one) for name, one in value.items())


def _is_tokens(value: Any) -> bool:
    return _is_list(value, lambda token: _is_int(token, 0)) and len(value) == len({*value})


_BOOLEAN = Honoured(False, "true or false", lambda value: isinstance(value, bool))
_NAMES = Honoured(None, "a list of names", lambda value: _is_list(value, _is_name))
_NAMES_OR_REGEX = Honoured(
    None, "a list of names or a regular expression", lambda value: _is_list(value, _is_name) or _is_regex(value)
)

HONOURED: Mapping[str, Honoured] = {
    "r": Honoured(8, "an int of at least 1", lambda value: _is_int(value, 1)),
    "lora_alpha": Honoured(8, "a finite number", _is_number),
    "lora_dropout": Honoured(
        0.0, "a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1
    ),
    "target_modules": _NAMES_OR_REGEX,
    "exclude_modules": _NAMES_OR_REGEX,
    "layers_to_transform": Honoured(
        None,
        "an int of at least 0 or a list of such",
        lambda value: _is_int(value, 0) or _is_list(value, lambda one: _is_int(one, 0)),
    ),
    "layers_pattern": Honoured(
        None, "a name or a list of names", lambda value: _is_regex(value) or _is_list(value, _is_regex)
    ),
    "rank_pattern": Honoured(
        {},
        "a mapping of regular expressions to ints of at least 1",
        lambda value: _is_mapping(value, lambda rank: _is_int(rank, 1)),
    ),
    "alpha_pattern": Honoured(
        {},
        "a mapping of regular expressions to finite numbers",
        lambda value: _is_mapping(value, _is_number),
    ),
    "bias": Honoured("none", "none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    "lora_bias": _BOOLEAN,
    "use_dora": _BOOLEAN,
    "use_rslora": _BOOLEAN,
    "init_lora_weights": Honoured(True, "true, false or a name", lambda value: isinstance(value, bool | str)),
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "trainable_token_indices": Honoured(
        None,
        "a list of ids of tokens, none twice, or a mapping of names to such lists",
        lambda value: _is_tokens(value) or _is_mapping(value, _is_tokens),
    ),
    "ensure_weight_tying": _BOOLEAN,
}
"""By PEFT's name; None stands for the default of each."""
REFUSED: Mapping[str, Refused] = {
    "alora_invocation_tokens": Refused(
        None, "aLoRA acts after the tokens that invoke it, an adapter of ftload on every token"
    ),
    "arrow_config": Refused(None, "Arrow routes among adapters that are trained already"),
    "corda_config": Refused(None, _CORDA),
    "eva_config": Refused(None, _EVA),
    "kasa_config": Refused(
        None, "KaSA trains with a loss of its own, and PEFT truncates the base anew whenever it is loaded"
    ),
    "layer_replication": Refused(None, "it makes a model with other layers than those that are written"),
    "loftq_config": Refused({}, _LOFTQ),
    "lora_ga_config": Refused(None, _LORA_GA),
    "megatron_config": Refused(None, _MEGATRON),
    "megatron_core": Refused("megatron.core", _MEGATRON),
    "monteclora_config": Refused(None, "Monteclora trains with a loss of its own, from samples"),
    "qalora_group_size": Refused(16, _QALORA),
    "runtime_config": Refused({"ephemeral_gpu_offload": False}, "it is a setting of a run, which PEFT never saves"),
    "use_bdlora": Refused(None, "BD-LoRA keeps its matrices in blocks, and an adapter of ftload whole"),
    "use_qalora": Refused(False, _QALORA),
    "velora_config": Refused(None, "VeLoRA compresses activations in training, from which its projections come"),
}
"""By PEFT's name."""

_FLAGS: Mapping[str, str] = {
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
"""By PEFT's name of a field: the flag that asks for the same."""


def initialisation_problem(value: bool | str) -> str | None:
    """What is wrong with a value of `init_lora_weights`, to go on after its name; None if nothing."""
    if isinstance(value, bool) or re.fullmatch("gaussian|orthogonal|olora|pissa(_niter_[0-9]{1,4})?", value):
        return None
    if value in NO_INITIALISATIONS:
        return f"can't be `{value}`: {NO_INITIALISATIONS[value]}"
    return f"is true, gaussian, orthogonal, pissa, pissa_niter_N (N up to 9999) or olora, not `{printable(value)}`"


def token_ids(texts: list[str]) -> list[int] | str:
    """The value of `--trainable_token_indices`: ids, or `new`. Raises `ValueError`: what is wrong, after its name."""
    if texts == [NEW_TOKENS]:
        return NEW_TOKENS
    ids: dict[int, None] = {}
    for text in texts:
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ValueError(f"takes the ids of tokens, or `new` alone, not `{printable(text)}`")
        if int(text) in ids:
            raise ValueError(f"names token {int(text)} twice")
        ids[int(text)] = None
    if not ids:
        raise ValueError("must name at least one token")
    return list(ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRequest:
    """The adapter that is asked for."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | None
    """None where none are named, or by a regular expression, which is in `settings`."""
    settings: Mapping[str, Any]
    """By PEFT's names of them, in the order of these: what a plain adapter does not have."""
    decisions: tuple[Decision, ...]


def resolve_lora(arguments: Arguments) -> LoraRequest:
    """The adapter that flags and the file of `--lora_config` ask for.

    Raises `UsageError` where the file can't be read or holds what can't be honoured, and where what is asked for
    contradicts itself.
    """
    flat, own = arguments.flat, arguments.own
    fields = {} if own.lora_config is None else read_lora_config(own.lora_config)
    decisions = []
    for field, flag in _FLAGS.items():
        value = getattr(flat if hasattr(flat, flag) else own, flag)
        if field == "trainable_token_indices" and value is not None:
            value = token_ids(value)
        is_given = arguments.origins[flag] != "default"
        if is_given and field in fields and not _is_same(value, fields[field]):
            decisions.append(
                Decision(
                    what="lora_config",
                    requested=f"{field} {_words(fields[field])}",
                    effective=f"{field} {_words(value)}",
                    reason=f"`{flag}` is given beside {label_of(own.lora_config or '')}, and goes before it",
                )
            )
        if is_given or field not in fields:
            fields[field] = value
    _check(fields, arguments)
    rank, alpha, dropout, targets = (fields.pop(name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules"))
    if isinstance(targets, str):
        fields["target_modules"], targets = targets, None
    return LoraRequest(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=None if targets is None else tuple(targets),
        settings={name: value for name, value in sorted(fields.items()) if value != HONOURED[name].default},
        decisions=tuple(decisions),
    )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values ask for the same: the order of a list says nothing."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(one) == sorted(other)
    return one == other


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check(fields: Mapping[str, Any], arguments: Arguments) -> None:
    """Raise `UsageError` where fields contradict each other or a flag."""
    if refusal := _refusal_of_peft(fields):
        raise UsageError(f"PEFT refuses this adapter: {refusal}", hint="leave out or change one of them")
    if fields["target_parameters"] and arguments.own.lora_experts is not None:
        raise UsageError(
            "`--lora_experts` and `target_parameters` are two ways of naming what is adapted",
            hint="give --lora_experts RANK to adapt all experts, or --lora_target_parameters to name them",
        )
    if fields["target_modules"] == [] and not fields["target_parameters"]:
        raise UsageError(
            "`target_modules` is empty, and there are no `target_parameters`: nothing would be adapted",
            hint="name layers with --lora_target_modules",
        )


def _refusal_of_peft(fields: Mapping[str, Any]) -> str | None:
    """What PEFT says to fields that don't go together, as far as it can be told without a model; None if nothing.

    The words are those of `LoraConfig.__post_init__` and of tuners/lora/layer.py.
    """
    initialisation, use_dora, lora_bias = fields["init_lora_weights"], fields["use_dora"], fields.get("lora_bias")
    if isinstance(fields["target_modules"], str) or fields["target_modules"] == [ALL_LINEAR]:
        for name in ("layers_to_transform", "layers_pattern"):
            if name in fields:
                return f"`{name}` cannot be used when `target_modules` is a str"
    if "layers_pattern" in fields and "layers_to_transform" not in fields:
        return "When `layers_pattern` is specified, `layers_to_transform` must also be specified"
    if lora_bias and not isinstance(initialisation, bool):
        return (
            "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
            f"init_lora_weights={initialisation} instead"
        )
    if lora_bias and use_dora:
        return "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"
    if fields["target_parameters"] and (lora_bias or use_dora):
        return f"lora.ParamWrapper does not work with {'lora_bias' if lora_bias else 'use_dora'}=True"
    if initialisation == "orthogonal" and fields["r"] % 2 and "rank_pattern" not in fields:
        return f"Orthogonal initialization requires the LoRA rank to be even, got {fields['r']} instead"
    return None


def read_lora_config(name: str) -> dict[str, Any]:
    """Return the fields of an adapter_config.json, or of a YAML file, that ask for something, by PEFT's names.

    `all-linear` is a list, as the flag's value is. Raises `UsageError`, naming the file and every field at fault.
    """
    label = label_of(name)
    values = _read_json(name) if name.endswith(".json") else read_values(name, holds=_HOLDS)
    problems = Problems({})
    for field, value in values.items():
        _check_field(field, value, label, problems)
    problems.raise_if_any()
    fields = {field: value for field, value in values.items() if field in HONOURED and value not in (None, {})}
    if fields.get("target_modules") == ALL_LINEAR:
        fields["target_modules"] = [ALL_LINEAR]
    # PEFT's way to adapt parameters alone is an empty list of layers; an empty list of anything else says nothing
    return {field: value for field, value in fields.items() if value != [] or field == "target_modules"}


def _read_json(name: str) -> dict[str, Any]:
    label = label_of(name)
    try:
        return from_json(read_text(name, most_bytes=JSON_BYTES, holds=_HOLDS))
    except BadValue as error:
        raise UsageError(f"{label} holds {error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{label}, line {error.lineno} is not JSON: {error.msg}") from error
    except ValueError as error:
        raise UsageError(f"{label} is not a JSON object") from error


def _check_field(field: str, value: Any, label: str, problems: Problems) -> None:
    """Add what is wrong with one field of the file that is shown as `label`."""
    shown = f"`{printable(field)}` in {label}"
    if field in HONOURED:
        honoured = HONOURED[field]
        if value is None:
            return
        if not honoured.accepts(value):
            hint = None
            if field == "trainable_token_indices" and value == NEW_TOKENS:
                hint = "`--trainable_token_indices new` trains the rows that are added"
            problems.add(f"{shown} takes {honoured.takes}, not `{_printable(value)}`", hint)
        elif field == "init_lora_weights" and (problem := initialisation_problem(value)):
            problems.add(f"{shown} {problem}")
    elif field in REFUSED:
        if value is not None and value != REFUSED[field].default:
            problems.add(f"{shown} can't be honoured: {REFUSED[field].reason}", f"leave `{field}` out")
    elif field == "peft_type" and value not in (None, "LORA"):
        problems.add(f"{shown} is `{_printable(value)}`, and ftload prepares LORA alone")
    elif field == "task_type" and value not in (None, "CAUSAL_LM"):
        problems.add(f"{shown} is `{_printable(value)}`, and ftload prepares CAUSAL_LM alone")
    elif field not in LEFT_ALONE:
        meant = [name for name, flag in _FLAGS.items() if flag == field]
        near = meant or difflib.get_close_matches(field, [*HONOURED, *REFUSED, *LEFT_ALONE], n=2)
        nearest = " or ".join(f"`{found}`" for found in near)
        problems.add(
            f"unknown field `{printable(field)}` in {label}{nearest and f' (nearest: {nearest})'}",
            "the fields are those of PEFT's `LoraConfig`",
        )


def _printable(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
