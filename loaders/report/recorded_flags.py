"""The flags in a report, as values again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..flags.declared import FlatArguments, all_flags
from ..source.file_names import REPORT_FILE
from .document import Report

_TYPES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list": (list,),
    "str or list": (str, list),
    "json": (str, dict),
}


def recorded_flags(report: Report) -> FlatArguments:
    """The training script's flags as they were given to `prepare`.

    Raises `CheckpointError` where a value is not what its flag takes.
    """
    values = {}
    for field in dataclasses.fields(FlatArguments):
        argument, flag = report.arguments.get(field.name), all_flags()[field.name]
        if argument is None:  # of a version before the flag
            continue
        try:
            value = recorded_value(field.name, argument.value)
        except ValueError:
            value = argument.value
        if not (isinstance(value, _TYPES[flag.kind]) or (value is None and flag.optional)):
            raise CheckpointError(f"`{REPORT_FILE}`: `{field.name}` is {value!r}, which is no {flag.kind}")
        values[field.name] = value
    return FlatArguments(**values)


def recorded_value(name: str, recorded: Any) -> Any:
    """A flag's value from its place in a report, where infinity and NaN are strings."""
    return float(recorded) if all_flags()[name].kind == "float" and isinstance(recorded, str) else recorded
