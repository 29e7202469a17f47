"""From the words of a command line, and a YAML file if the first of them is one, to `Arguments`.

What HfArgumentParser accepts is accepted and means the same, abbreviated flags aside; tests compare the two.
Every problem found is reported in one error, so that a run is corrected in one go.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .arguments import (
    Arguments,
    Flag,
    FlatArguments,
    Origin,
    OwnOptions,
    PlanOptions,
    TokenizerConfig,
    all_flags,
    mask_credentials,
    parse_size,
    plan_flags,
)
from .errors import UsageError

if TYPE_CHECKING:
    import yaml

ALIASES = {"model": "model_name_or_path"}
"""Short names of flags, on the command line and in YAML."""
MOST_PROBLEMS = 50
"""Problems to list in one error."""
MOST_GPUS = 100_000
"""More than any that train one model; a larger number is a slip."""
YAML_BYTES = 1 << 17
YAML_NODES = 10_000
"""The most values in a YAML file whose aliases are expanded: without a bound, ten lines can mean billions."""

_BOOLEANS: dict[str, bool] = dict.fromkeys(("true", "yes", "t", "y", "1"), True)
_BOOLEANS |= dict.fromkeys(("false", "no", "f", "n", "0"), False)
_EXPECTED = {
    "bool": "true or false",
    "int": "an int",
    "float": "a float",
    "str": "a string",
    "list": "a list of strings",
    "str or list": "a string or a list of strings",
    "json": "a JSON object",
}
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(
    _TAG + name for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "seq", "map")
)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read `[run.yaml] [--flag [value ...]]...`; a flag overrides the file.

    Raises:
        UsageError: names every unknown flag and key, every bad value and every misplaced word.
    """
    problems = _Problems(all_flags())
    return _arguments(*_read(argv, problems), problems)


def parse_plan_arguments(argv: Sequence[str]) -> tuple[Arguments, PlanOptions]:
    """Read what `ftload plan` takes: the words of `parse_arguments`, and among the flags its own.

    Raises:
        UsageError: as `parse_arguments`.
    """
    problems = _Problems({**all_flags(), **plan_flags()})
    from_yaml, from_cli = _read(argv, problems)
    own = {name: from_cli.pop(name) for name in plan_flags() if name in from_cli}
    fsdp, zero, gpus = (own.get(name) for name in ("fsdp", "zero", "gpus"))
    if fsdp is not None and zero is not None:
        problems.add("`--fsdp` and `--zero` are two ways to divide the same: give one")
    if zero is not None and zero not in (1, 2, 3):
        problems.add(f"`--zero` has the stages 1, 2 and 3, not {zero}")
    if gpus is not None and "zero" not in own:
        problems.add("`--gpus` goes with `--zero`", "`--fsdp` takes the number itself: `--fsdp 8`")
    for name, count in (("fsdp", fsdp), ("gpus", gpus)):
        if count is not None and not 2 <= count <= MOST_GPUS:
            problems.add(f"`--{name}` is a number of GPUs, 2 to {MOST_GPUS:,}, not {count}")
    return _arguments(from_yaml, from_cli, problems), PlanOptions(**own)


def _read(argv: Sequence[str], problems: _Problems) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of the YAML file, if there is one, and those of the flags."""
    words = list(argv)
    from_yaml: dict[str, Any] = {}
    if words and not _is_flag(words[0]):
        try:
            from_yaml = _read_yaml(words.pop(0), problems)
        except UsageError as error:
            problems.add(error.message, error.hint)
    return from_yaml, _read_flags(words, problems)


def _arguments(from_yaml: dict[str, Any], from_cli: dict[str, Any], problems: _Problems) -> Arguments:
    values = from_yaml | from_cli
    origins: dict[str, Origin] = {}
    for name in all_flags():
        origins[name] = "cli" if name in from_cli else "yaml" if name in from_yaml else "default"
    _check_ranges(values, problems)
    problems.raise_if_any()

    def group(kind: type) -> Any:
        return kind(**{name: value for name, value in values.items() if all_flags()[name].group == kind.__name__})

    return Arguments(
        flat=group(FlatArguments), tokenizer=group(TokenizerConfig), own=group(OwnOptions), origins=origins
    )


class _Problems:
    """What is wrong so far, and the first hint that came with it; `flags` are those that are known."""

    def __init__(self, flags: Mapping[str, Flag]) -> None:
        self.flags = flags
        self.messages: list[str] = []
        self.hint: str | None = None

    def add(self, message: str, hint: str | None = None) -> None:
        self.messages.append(message)
        self.hint = self.hint or hint

    def add_unknown(self, kind: str, typed: str, place: str = "") -> None:
        dashes = "--" if kind == "flag" else ""
        name = typed.lstrip("-").replace("-", "_").lower()
        near = difflib.get_close_matches(name, [*self.flags, *ALIASES], n=2)
        nearest = " or ".join(f"`{dashes}{found}`" for found in near)
        self.add(
            f"unknown {kind} `{_shown(typed)}`{place}{nearest and f' (nearest: {nearest})'}",
            "`--help` lists every flag",
        )

    def add_bad_value(self, label: str, flag: Flag, error: Exception, value: str | None) -> None:
        expected = "one of " + ", ".join(flag.choices) if flag.choices else _EXPECTED[flag.kind]
        got = str(error) if isinstance(error, _BadValue) else f"`{_shown(value or '')}`"
        self.add(f"{label} takes {expected}, not {got}")

    def raise_if_any(self) -> None:
        if self.messages:
            more = len(self.messages) - MOST_PROBLEMS
            rest = [f"and {more} more"] if more > 0 else []
            raise UsageError("; ".join(self.messages[:MOST_PROBLEMS] + rest), hint=self.hint)


class _BadValue(ValueError):
    """A value that its flag can't take; the message says what it is instead."""


def _shown(text: str, most: int = 80) -> str:
    """Return `text` fit for one line of a message: printable, short, without credentials."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in mask_credentials(text))
    return text if len(text) <= most else text[: most - 3] + "..."


def _is_flag(word: str) -> bool:
    """Whether `word` is a flag rather than a value: `-1e-3`, `-` and `- a b` are values, as for argparse."""
    if not word.startswith("-") or word == "-" or (" " in word and not word.startswith("--")):
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _find(name: str, flags: Mapping[str, Flag]) -> Flag | None:
    name = name.replace("-", "_")
    return flags.get(ALIASES.get(name, name))


def _is_null(text: str) -> bool:
    return text.lower() in ("none", "null")


def _from_text(flag: Flag, text: str) -> Any:
    """Return the value that one word means for a flag that takes one; ValueError if it means none."""
    if flag.kind == "bool":
        if text.lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    if flag.kind == "int":
        return int(text)
    if flag.kind == "float":
        return float(text)
    if flag.kind == "json":
        try:
            value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        except RecursionError:
            raise ValueError(text) from None
        if not isinstance(value, dict):
            raise ValueError(text)
        return value
    if flag.choices and text not in flag.choices:
        raise ValueError(text)
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise _BadValue(f"an object that holds {name}, which is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise _BadValue(f"an object that holds `{_shown(name)}` twice")
        unique[name] = value
    return unique


# The command line


def _read_flags(words: list[str], problems: _Problems) -> dict[str, Any]:
    """Return the value of every flag among `words`, by the flag's name."""
    values: dict[str, Any] = {}
    model_spellings: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if not _is_flag(word):
            _add_stray(word, problems)
            continue
        name, equals, attached = word.partition("=")
        given = [attached] if equals else []
        while not equals and words and not _is_flag(words[0]):
            given.append(words.pop(0))

        spelled = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        flag = _find(spelled, problems.flags)
        negated = _find(spelled.removeprefix("no_"), problems.flags) if spelled.startswith("no_") else None
        if flag is not None:
            value = _from_words(flag, name, given, bool(equals), words, problems)
        elif negated is not None and negated.kind == "bool":
            flag, value = negated, False
            if given:
                problems.add(f"`{name}` takes no value, but `{_shown(given[0])}` follows it")
        else:
            problems.add_unknown("flag", name)
            continue
        if flag.name in ALIASES.values() and isinstance(value, str):
            model_spellings[spelled] = value
        values[flag.name] = value
    if len(set(model_spellings.values())) > 1:
        both = " and ".join(f"`--{name} {_shown(value)}`" for name, value in model_spellings.items())
        problems.add(f"{both} name different models")
    return values


def _from_words(flag: Flag, label: str, given: list[str], attached: bool, ahead: list[str], problems: _Problems) -> Any:
    """Return the value of `flag` from the words up to the next flag, which is the first of those `ahead`."""
    shown = f"`{label}`"
    takes_list = flag.kind in ("list", "str or list")
    if not given:
        if flag.kind == "bool":
            return True
        dashed = ahead and not ahead[0].startswith("--")
        hint = f"write `{label}={_shown(ahead[0])}` if that is the value" if dashed else None
        problems.add(f"{shown} needs a value: {_EXPECTED[flag.kind]}", hint)
        return None
    if flag.optional and flag.type != "str | None" and len(given) == 1 and _is_null(given[0]):
        return None
    if takes_list:
        return given
    if flag.kind == "bool" and not attached and given[0].lower() not in _BOOLEANS:
        _add_stray(given[0], problems, after=label, hint=f"`{label}` stands alone, or takes true or false")
        return None
    for word in given[1:]:
        _add_stray(word, problems, after=f"{label} {_shown(given[0])}")
    try:
        return _from_text(flag, given[0])
    except ValueError as error:
        problems.add_bad_value(shown, flag, error, given[0])
        return None


def _add_stray(word: str, problems: _Problems, after: str = "", hint: str | None = None) -> None:
    """Record a word that no flag takes."""
    place = f" after `{after}`" if after else ""
    if word.endswith((".yaml", ".yml")):
        problems.add(f"`{_shown(word)}`{place} is out of place: one YAML file can be given, before the flags")
    else:
        problems.add(f"`{_shown(word)}`{place} belongs to no flag", hint)


# The YAML file. Its nodes are read rather than Python values, because a string is wanted as it was written
# (`model_revision: 0123`, not 83) and because what is unsafe shows in the nodes before anything is built


def _read_yaml(name: str, problems: _Problems) -> dict[str, Any]:
    """Return the value of every key in the file, by the flag's name."""
    import yaml

    if not name.endswith((".yaml", ".yml")):
        looks_like_model = Path(name).exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?|.*[/\\].*", name)
        problems.add(
            f"`{_shown(name)}` is not a YAML file (.yaml or .yml); nothing else can come before the flags",
            f"name the model with `--model {_shown(name)}`" if looks_like_model else None,
        )
        return {}
    shown = f"`{_shown(name, 1000)}`"  # a path that is cut can't be found
    text = _read_text(name, shown)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{shown} must hold `flag: value` lines")
        _check_nodes(root, shown)
        return _from_mapping(root, shown, problems)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{shown}{line} is not YAML: {what}") from error
    except RecursionError:
        raise UsageError(f"{shown} is nested too deeply") from None


def _read_text(name: str, shown: str) -> str:
    try:
        with Path(name).open("rb") as file:
            data = file.read(YAML_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{shown} can't be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError:  # a null byte
        raise UsageError(f"{shown} can't be read: not a path") from None
    if len(data) > YAML_BYTES:
        raise UsageError(f"{shown} is larger than 128 KiB, too large for the flags of a run")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown} is not UTF-8 text: byte {error.start} can't be decoded") from error


def _check_nodes(root: yaml.MappingNode, shown: str) -> None:
    """Refuse tags that would build objects, merge keys, and aliases that expand without measure."""
    waiting: list[Any] = [root]
    seen = 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > YAML_NODES:
            raise UsageError(f"{shown} holds more than {YAML_NODES} values, counting what its aliases repeat")
        if node.tag not in _PLAIN_TAGS:
            what = "a merge key (`<<`)" if node.tag == f"{_TAG}merge" else f"the tag `{_shown(node.tag)}`"
            raise UsageError(f"{shown}, line {node.start_mark.line + 1} holds {what}, which is not accepted")
        if isinstance(node.value, list):
            for child in node.value:
                waiting.extend(child if isinstance(child, tuple) else (child,))


def _from_mapping(root: yaml.MappingNode, shown: str, problems: _Problems) -> dict[str, Any]:
    values: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key_node, node in root.value:
        key = key_node.value if isinstance(key_node.value, str) else "?"
        label = f"`{_shown(key)}` in {shown}"
        flag = _find(key, all_flags())
        if flag is None:
            problems.add_unknown("key", key, f" in {shown}")
            continue
        try:
            value = _from_node(flag, node)
        except (ValueError, OverflowError, IndexError) as error:
            problems.add_bad_value(label, flag, error, node.value if isinstance(node.value, str) else "...")
            value = None
        if flag.name not in values:
            values[flag.name], keys[flag.name] = value, key
        elif keys[flag.name] == key or flag.name not in ALIASES.values() or value != values[flag.name]:
            problems.add(f"{label} repeats `{keys[flag.name]}`")
    return values


def _from_node(flag: Flag, node: yaml.Node) -> Any:
    """Return what a YAML value means for a flag; ValueError, OverflowError or IndexError if nothing."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        if flag.kind == "json":
            return _plain(node)
        raise _BadValue("a mapping")
    if isinstance(node, yaml.SequenceNode):
        if flag.kind in ("list", "str or list"):
            return [_as_written(item) for item in node.value]
        raise _BadValue("a list")
    if flag.optional and (node.tag == f"{_TAG}null" or _is_null(node.value)):
        return None
    if node.tag == f"{_TAG}null":
        raise _BadValue("null")
    if flag.kind in ("bool", "int", "float"):
        value = _plain(node)
        if flag.kind == "bool" and isinstance(value, bool):
            return value
        if flag.kind == "float" and type(value) in (int, float):
            return float(value)
        if flag.kind == "int" and type(value) is int:
            return value
        if flag.kind == "int" and isinstance(value, float) and value.is_integer():
            return int(value)
        return _from_text(flag, node.value)
    text = _as_written(node)
    return [text] if flag.kind == "list" else _from_text(flag, text)


def _as_written(node: yaml.Node) -> str:
    """Return a string as the file spells it; what YAML reads as a boolean or nothing must be quoted."""
    if not isinstance(node.value, str):
        raise _BadValue("a list or mapping inside a list")
    if node.tag == f"{_TAG}null":
        raise _BadValue("null")
    if node.tag == f"{_TAG}bool":
        raise _BadValue(f"the boolean `{node.value}`: quote it if it is a string")
    return node.value


def _plain(node: yaml.Node) -> Any:
    """Return the Python value of a node, as yaml.safe_load would, but for times, which stay strings."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return _unique([(_as_written(key), _plain(value)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    build = yaml.constructor.SafeConstructor()
    builders: dict[str, Callable[[Any], Any]] = {
        f"{_TAG}null": build.construct_yaml_null,
        f"{_TAG}bool": build.construct_yaml_bool,
        f"{_TAG}int": build.construct_yaml_int,
        f"{_TAG}float": build.construct_yaml_float,
    }
    return builders[node.tag](node) if node.tag in builders else node.value


def _check_ranges(values: dict[str, Any], problems: _Problems) -> None:
    """Refuse values of the right type that nothing can be prepared with; here a bad value is None."""
    rank, alpha, dropout, seed = (values.get(f) for f in ("lora_rank", "lora_alpha", "lora_dropout", "seed"))
    if rank is not None and rank < 1:
        problems.add(f"`lora_rank` must be at least 1, not {rank}")
    if alpha is not None and not math.isfinite(alpha):
        problems.add(f"`lora_alpha` must be a finite number, not {alpha}")
    if dropout is not None and not 0 <= dropout < 1:
        problems.add(f"`lora_dropout` must be at least 0 and below 1, not {dropout}")
    if seed is not None and not 0 <= seed < 2**32:
        # the bound is numpy's, which training scripts seed as well
        problems.add(f"`seed` must be at least 0 and below 2^32, not {seed}")
    least = values.get("min_quantized")
    if least is not None and not 0 <= least <= 100:
        problems.add(f"`min_quantized` is a percentage, 0 to 100, not {least}")
    if values.get("lora_target_modules") == []:
        problems.add("`lora_target_modules` must name at least one layer")
    for name in ("max_shard_size", "max_memory"):
        try:
            parse_size(values.get(name) or "1")
        except UsageError as error:
            problems.add(f"`{name}`: {error.message}", error.hint)
