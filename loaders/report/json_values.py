"""Dataclasses as JSON values, and back: one reader and one writer for all that ftload writes down.

A dataclass is an object with a key for each field, in their order; a key that is a word of Python has an underscore
behind it in the field's name. `Mapping` is an object, `tuple[X, ...]` an array, `Annotated[X, Keyword(…)]` an X.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Keyword(NamedTuple):
    """A keyword of JSON Schema that narrows a type. Only the schema has it: reading does not check it."""

    name: str
    value: Any
    """Or a function that gives it, where that takes imports that reading a report does without."""


def absent_before(version: str) -> Any:
    """A field that reports of earlier versions don't have: None then, and left out where it is written again."""
    return dataclasses.field(default=None, metadata={"absent_before": version})


class Field(NamedTuple):
    """One field of a dataclass, as JSON has it."""

    name: str
    """Of the dataclass."""
    key: str
    """In JSON."""
    type: Any
    required: bool
    absent_before: str | None


@functools.cache
def fields(kind: type) -> tuple[Field, ...]:
    """The fields of a dataclass, in their order; those of its bases come first."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        Field(
            name=field.name,
            key=field.name.removesuffix("_"),
            type=hints[field.name],
            required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            absent_before=field.metadata.get("absent_before"),
        )
        for field in dataclasses.fields(kind)
    )


def to_json(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON values; what is in them already stays as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.key: to_json(inner)
            for field in fields(type(value))
            if (inner := getattr(value, field.name)) is not None or field.absent_before is None
        }
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(inner) for inner in value]
    return value


def from_json(kind: type[T], value: Mapping[str, Any], problems: list[str]) -> T:
    """A dataclass from a JSON object: missing fields have their defaults, unknown keys are passed over.

    Types are checked, allowed values and ranges are not. What is missing without a default, or of another type, is
    reported in `problems` and left unset: whoever asks for it gets an `AttributeError`.
    """
    return _read_object(kind, value, "", problems)


def optional(kind: Any) -> tuple[Any, bool]:
    """A type without its `None`, and whether it had one."""
    if get_origin(kind) not in (Union, UnionType):
        return kind, False
    (inner,) = (one for one in get_args(kind) if one is not NoneType)
    return inner, True


class _Malformed(Exception):
    pass


def _read_object(kind: type[T], value: Mapping[str, Any], place: str, problems: list[str]) -> T:
    read = object.__new__(kind)
    defaults = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for field in fields(kind):
        if field.key in value:
            try:
                found = _read(field.type, value[field.key], f"{place}{field.key}", problems)
            except _Malformed as error:
                problems.append(str(error))
                continue
        elif field.required:
            problems.append(f"`{place}{field.key}` is missing")
            continue
        else:
            declared = defaults[field.name]
            found = declared.default if declared.default_factory is dataclasses.MISSING else declared.default_factory()
        object.__setattr__(read, field.name, found)  # the dataclass is frozen
    return read


def _read(kind: Any, value: Any, place: str, problems: list[str]) -> Any:
    kind, may_be_none = optional(kind)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if value is None and may_be_none:
        return None
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_object(kind, value, f"{place}.", problems)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Mapping and isinstance(value, dict):
        return {key: _read(arguments[1], inner, f"{place}.{key}", problems) for key, inner in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], inner, f"{place}[{n}]", problems) for n, inner in enumerate(value))
    if not _is_of(value, kind):
        raise _Malformed(f"`{place}` is of another type")
    return value


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON that holds no others is of this type."""
    if kind is Any:
        return True
    kinds = {type(one) for one in get_args(kind)} if get_origin(kind) is Literal else {kind}
    if isinstance(value, bool) or value is None:
        return type(value) in kinds
    if isinstance(value, float):
        return float in kinds or (int in kinds and value.is_integer())
    return (type(value) in kinds) or (isinstance(value, int) and float in kinds)
