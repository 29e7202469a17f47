"""The JSON Schema of the report (draft 2020-12), made from the dataclasses of `document.py`.

`report.schema.json` holds what `schema` gives; a test compares the two. Reading the classes' sources takes time that
only the test has: whoever checks a report reads the file.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from .document import Report
from .json_values import fields, optional

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def published_schema() -> dict[str, Any]:
    """The schema as it is installed with ftload."""
    return json.loads(Path(__file__).with_name("report.schema.json").read_text(encoding="utf-8"))


def schema() -> dict[str, Any]:
    """The schema as the dataclasses have it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ftload report",
        "description": "What `ftload prepare` wrote. Counts of parameters are logical: 4-bit weights unpacked, tied "
        "weights once, the adapter included, buffers not at all.",
        **_of(Report),
    }


def _of(kind: Any) -> dict[str, Any]:
    kind, may_be_null = optional(kind)
    found = _without_null(kind)
    if may_be_null:
        # the other keywords are of objects, strings or numbers alone: null passes them
        found["type"] = [found["type"], "null"]
        if "enum" in found:
            found["enum"] = [*found["enum"], None]
    return found


def _without_null(kind: Any) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _of_object(kind)
    if origin is Annotated:
        keywords = {keyword.name: keyword.value for keyword in arguments[1:]}
        return {**_of(arguments[0]), **{name: v() if callable(v) else v for name, v in keywords.items()}}
    if origin is Literal:
        return {"type": _NAMES[type(arguments[0])], "enum": list(arguments)}
    if origin is Mapping:
        keys = {} if arguments[0] is str else {"propertyNames": _of(arguments[0])}
        return {"type": "object", **keys, "additionalProperties": _of(arguments[1])}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0])}
    return {} if kind is Any else {"type": _NAMES[kind]}


def _of_object(kind: type) -> dict[str, Any]:
    described = _docstrings(kind)
    properties = {}
    for field in fields(kind):
        # a key that may be left out is never null
        found = _of(field.type) if field.absent_before is None else _of(optional(field.type)[0])
        words = [described[field.name]] if field.name in described else []
        words += [f"Since {field.absent_before}."] if field.absent_before is not None else []
        properties[field.key] = {**found, **({"description": " ".join(words)} if words else {})}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [field.key for field in fields(kind) if field.required],
        "properties": properties,
    }


def _docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field that has one, by the field's name."""
    found = {}
    for declaring in reversed(kind.__mro__[:-1]):
        (declaration,) = ast.parse(textwrap.dedent(inspect.getsource(declaring))).body
        assert isinstance(declaration, ast.ClassDef)
        for statement, following in zip(declaration.body, declaration.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    return found
