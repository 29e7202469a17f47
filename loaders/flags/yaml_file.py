"""YAML files: that of a run, every key's value by the flag's name, and others.

Their nodes are read, not Python values: a string is kept as it was written (`model_revision: 0123`, not 83), and what
is unsafe is found before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .declared import Flag, all_flags
from .values import ALIASES, BadValue, Problems, from_text, is_null, printable

if TYPE_CHECKING:
    import yaml


YAML_BYTES = 1 << 17
YAML_NODES = 10_000
"""The most values in a YAML file whose aliases are expanded: without a bound, ten lines can mean billions."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(
    _TAG + name for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "seq", "map")
)


def read_yaml(name: str, problems: Problems) -> dict[str, Any]:
    """Return the value of every key in the file, by the flag's name; a key that is wrong is added to `problems`.

    Raises:
        UsageError: the file can't be read, is no mapping, or holds what is not accepted in any value.
    """
    return _from_mapping(_read_mapping(name, "flag", holds="the flags of a run"), label_of(name), problems)


def read_values(name: str, *, holds: str) -> dict[str, Any]:
    """Return the Python value of every key in a YAML file, as `yaml.safe_load` does, except that times stay strings.

    `holds` says for messages what the file holds.

    Raises:
        UsageError: as `read_yaml` does; or a key has two values.
    """
    try:
        return _plain_mapping(_read_mapping(name, "field", holds=holds))
    except (ValueError, OverflowError, IndexError) as error:
        what = str(error) if isinstance(error, BadValue) else "a value that its tag does not allow"
        raise UsageError(f"{label_of(name)} holds {what}") from error


def label_of(name: str) -> str:
    """Return a file's name for messages."""
    return f"`{printable(name, 1000)}`"  # a path that is cut can't be found


def _read_mapping(name: str, key: str, *, holds: str) -> yaml.MappingNode:
    """Return the root of a file of `key: value` lines."""
    import yaml

    file_label = label_of(name)
    text = read_text(name, most_bytes=YAML_BYTES, holds=holds)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{file_label} must hold `{key}: value` lines")
        _check_nodes(root, file_label)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{file_label}{line} is not YAML: {what}") from error
    except RecursionError:
        raise UsageError(f"{file_label} is nested too deeply") from None
    return root


def read_text(name: str, *, most_bytes: int, holds: str) -> str:
    """Return the text of a file that `holds` what is said.

    Raises `UsageError` where it can't be read, is too large for that, or is not UTF-8.
    """
    file_label = label_of(name)
    try:
        with Path(name).open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise UsageError(f"{file_label} can't be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError:  # a null byte
        raise UsageError(f"{file_label} can't be read: not a path") from None
    if len(data) > most_bytes:
        raise UsageError(f"{file_label} is larger than {most_bytes >> 10} KiB, too large for {holds}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file_label} is not UTF-8 text: byte {error.start} can't be decoded") from error


def _check_nodes(root: yaml.MappingNode, file_label: str) -> None:
    """Refuse tags that would build objects, merge keys, and aliases that expand without bound."""
    waiting: list[Any] = [root]
    seen = 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > YAML_NODES:
            raise UsageError(f"{file_label} holds more than {YAML_NODES} values, counting what its aliases repeat")
        if node.tag not in _PLAIN_TAGS:
            what = "a merge key (`<<`)" if node.tag == f"{_TAG}merge" else f"the tag `{printable(node.tag)}`"
            raise UsageError(f"{file_label}, line {node.start_mark.line + 1} holds {what}, which is not accepted")
        if isinstance(node.value, list):
            for child in node.value:
                waiting.extend(child if isinstance(child, tuple) else (child,))


def _from_mapping(root: yaml.MappingNode, file_label: str, problems: Problems) -> dict[str, Any]:
    values: dict[str, Any] = {}
    seen: dict[str, tuple[str, int]] = {}
    for key_node, node in root.value:
        key = key_node.value if isinstance(key_node.value, str) else "?"
        name = key.replace("-", "_")
        flag = all_flags().get(ALIASES.get(name, name))
        if flag is None:
            problems.add_unknown("key", key, f" in {file_label}")
            continue
        label = f"`{printable(key)}`"
        try:
            value = _from_node(flag, node)
        except (ValueError, OverflowError, IndexError) as error:
            written = node.value if isinstance(node.value, str) else "..."
            problems.add_bad_value(f"{label} in {file_label}", flag, error, written)
            continue
        line = key_node.start_mark.line + 1
        if flag.name in values and not _equal(value, values[flag.name]):
            first, first_line = seen[flag.name]
            have = "has" if first == label else f"and {label} have"
            problems.add(f"{first} {have} two values in {file_label}, on lines {first_line} and {line}")
        values.setdefault(flag.name, value)
        seen.setdefault(flag.name, (label, line))
    return values


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same: unlike in Python, `true` is not 1, and `nan` is `nan`."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _from_node(flag: Flag, node: yaml.Node) -> Any:
    """Return the value of `flag` that a node means; `ValueError`, `OverflowError` or `IndexError` if none."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        if flag.kind == "json":
            return _plain(node)
        raise BadValue("a mapping")
    if isinstance(node, yaml.SequenceNode):
        if flag.kind in ("list", "str or list"):
            return [_as_written(item) for item in node.value]
        raise BadValue("a list")
    if flag.optional and (node.tag == f"{_TAG}null" or is_null(node.value)):
        return None
    if node.tag == f"{_TAG}null":
        raise BadValue("null")
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
        return from_text(flag, node.value)
    if flag.kind == "bool or str" and node.tag == f"{_TAG}bool":
        return _plain(node)
    text = _as_written(node)
    return [text] if flag.kind == "list" else from_text(flag, text)


def _as_written(node: yaml.Node) -> str:
    """Return a string as the file spells it; one that YAML takes for a boolean or null must be quoted."""
    if not isinstance(node.value, str):
        raise BadValue("a list or mapping inside a list")
    if node.tag == f"{_TAG}null":
        raise BadValue("null")
    if node.tag == f"{_TAG}bool":
        raise BadValue(f"the boolean `{node.value}`: quote it if it is a string")
    return node.value


def _plain(node: yaml.Node) -> Any:
    """Return the Python value of a node, as `yaml.safe_load` does, except that times stay strings."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node)
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


def _plain_mapping(node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, value, line = _as_written(key_node), _plain(value_node), key_node.start_mark.line + 1
        if not _equal(value, values.setdefault(key, value)):
            what = f"an object in which `{printable(key)}` has two values, on lines {lines[key]} and {line}"
            raise BadValue(what)
        lines.setdefault(key, line)
    return values
