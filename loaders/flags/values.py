"""The values of flags, read from text, and the problems found on the way.

Shared by the two places where flags are given: `command_line.py` and `yaml_file.py`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import UsageError
from ..system.safe_text import escaped, masked
from .declared import Flag

ALIASES = {"model": "model_name_or_path"}
"""Short names of flags, on the command line and in YAML."""
ELSEWHERE = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bits", "quantization", "quantization_bit", "qlora"), "use_qlora"),
    "attn_implementation": "use_flash_attn",
    "use_peft": "use_lora",
}
"""Flags of other trainers, and the one that asks for the same here."""
MOST_PROBLEMS = 50
"""Problems that one error lists."""

_BOOLEANS: dict[str, bool] = dict.fromkeys(("true", "yes", "t", "y", "1"), True)
_BOOLEANS |= dict.fromkeys(("false", "no", "f", "n", "0"), False)

EXPECTED = {
    "bool": "true or false",
    "int": "an int",
    "float": "a float",
    "str": "a string",
    "bool or str": "true, false or a name",
    "list": "a list of strings",
    "str or list": "a string or a list of strings",
    "json": "a JSON object",
}
"""What each kind of flag takes, in words."""


class Problems:
    """The problems found so far, and the first hint that came with one; `flags` are those that exist, by name."""

    def __init__(self, flags: Mapping[str, Flag]) -> None:
        self.flags = flags
        self.messages: list[str] = []
        self.hint: str | None = None

    def add(self, message: str, hint: str | None = None) -> None:
        """Add a problem."""
        self.messages.append(message)
        self.hint = self.hint or hint

    def add_unknown(self, kind: str, typed: str, place: str = "") -> None:
        """Add a `flag` or `key` that does not exist, as it was typed, and those that it may have been meant to be."""
        dashes = "--" if kind == "flag" else ""
        name = typed.lstrip("-").replace("-", "_").lower()
        elsewhere = ELSEWHERE.get(name)
        near = [elsewhere] if elsewhere else difflib.get_close_matches(name, [*self.flags, *ALIASES], n=2)
        if not near:
            holders = [flag for flag in self.flags if name and f"_{name}_" in f"_{flag}_"]
            near = holders if len(holders) <= 2 else []
        nearest = " or ".join(f"`{dashes}{found}`" for found in near)
        self.add(
            f"unknown {kind} `{printable(typed)}`{place}{nearest and f' (nearest: {nearest})'}",
            "`--help` lists every flag",
        )

    def add_bad_value(self, label: str, flag: Flag, error: Exception, value: str | None) -> None:
        """Add a value that `flag`, shown to the user as `label`, can't take; a `BadValue` says what it is instead."""
        expected = "one of " + ", ".join(flag.choices) if flag.choices else EXPECTED[flag.kind]
        got = str(error) if isinstance(error, BadValue) else f"`{printable(value or '')}`"
        self.add(f"{label} takes {expected}, not {got}")

    def raise_if_any(self) -> None:
        """Raise a `UsageError` that lists them all."""
        if self.messages:
            more = len(self.messages) - MOST_PROBLEMS
            rest = [f"and {more} more"] if more > 0 else []
            raise UsageError("; ".join(self.messages[:MOST_PROBLEMS] + rest), hint=self.hint)


class BadValue(ValueError):
    """A value that its flag can't take; the message says what it is instead."""


def printable(text: str, most: int = 80) -> str:
    """Return `text` fit for one line of a message: printable, short, without credentials."""
    text = escaped(masked(text))
    return text if len(text) <= most else text[: most - 3] + "..."


def is_boolean(text: str) -> bool:
    """Whether a word is one of those for true and false."""
    return text.lower() in _BOOLEANS


def is_null(text: str) -> bool:
    """Whether a word means None, to a flag that can be None."""
    return text.lower() in ("none", "null")


def from_text(flag: Flag, text: str) -> Any:
    """Return the value of `flag` that a word means. Raises `ValueError` if it means none."""
    if flag.kind == "bool":
        if not is_boolean(text):
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    if flag.kind == "bool or str":
        return {"true": True, "false": False}.get(text.lower(), text)
    if flag.kind == "int":
        return int(text)
    if flag.kind == "float":
        return float(text)
    if flag.kind == "json":
        value = from_json(text)
        # the training script converts what is in a `dict | str`, and leaves a plain `dict` alone
        return _converted(value) if flag.type.startswith("dict | str") else value
    if flag.choices and text not in flag.choices:
        raise ValueError(text)
    return text


def from_json(text: str) -> dict[str, Any]:
    """Return the object that a text is in JSON.

    Raises `ValueError` if it is none, and `BadValue` if it holds what is not JSON, or a name twice.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if isinstance(value, dict):
            return value
    except RecursionError:
        pass
    raise ValueError(text)


def _refuse_constant(name: str) -> NoReturn:
    raise BadValue(f"an object that holds {name}, which is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise BadValue(f"an object that holds `{printable(name)}` twice")
        unique[name] = value
    return unique


def _converted(value: Any) -> Any:
    """Return `value` with the strings in it, however deep, that say a boolean or an unsigned decimal number converted.

    As transformers' `_convert_str_dict`, which Open Instruct calls: `-1` and `1e-5` stay strings, and so does
    everything in lists.
    """
    if isinstance(value, dict):
        return {name: _converted(inner) for name, inner in value.items()}
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value.isdecimal():
        return int(value)
    return float(value) if value.replace(".", "", 1).isdecimal() else value
