"""The JSON files of a checkpoint, read with bounds."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ..errors import CheckpointError, SourceError
from ..source.file_names import config_file_names
from ..source.source import Source

MAX_JSON_BYTES = 25_000_000
"""The limit for a configuration or an index; the largest known ones have 9 MB."""


def fetch_config(source: Source) -> None:
    """Fetch `config.json` and `generation_config.json`, and check that they are JSON with plausible sizes.

    Raises `CheckpointError` where there is no `config.json`, or where one of them fails the check.
    """
    names = {file.path: file for file in source.files}
    if "config.json" not in names:
        hint = "a model directory holds config.json, a tokenizer and *.safetensors"
        gguf = sorted(name for name in names if name.endswith(".gguf") and not name.startswith("mmproj"))
        if "adapter_config.json" in names:
            hint = "this is an adapter: give the model that it was trained on"
        elif gguf and source.kind == "hub":
            hint = f"download one of its GGUF files, as `{gguf[0]}`, and give that file"
        elif gguf:
            hint = f"give a GGUF file itself: `{gguf[0]}`"
        raise absent_error(source, f"`{source.model}` holds no `config.json`", hint)
    found = config_file_names(source.files)
    source.fetch(found)
    for name in found:
        size = names[name].bytes
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"`{source.root / name}` is {size} bytes long")
        check_sizes(parse_json(source.read(name, 0, size), str(source.root / name)), str(source.root / name))


_MOST = {
    re.compile(r"(layers?|cycles)$"): 2_000,
    re.compile(r"labels$"): 100_000,
    re.compile(r"(dim|size|heads|experts|embd|inner)$"): 10_000_000,
}
"""Keys of a configuration, and their largest plausible value: ten times that of the largest models.

Without a bound, a number of a few digits makes transformers build modules, or lists of them, until memory runs out."""


def check_sizes(document: Any, file: str) -> None:
    """Raise `CheckpointError` where a configuration asks for more than any real model has; `file` is named."""
    waiting = [document]
    while waiting:
        place = waiting.pop()
        if isinstance(place, list):
            waiting += place
        elif isinstance(place, dict):
            waiting += place.values()
            for key, value in place.items():
                for pattern, most in _MOST.items():
                    if isinstance(value, int | float) and pattern.search(key) and value > most:
                        raise CheckpointError(f"`{file}`: `{key}` is more than the {most:,} of any real model")


TRUNCATED = "the file is incomplete or of another kind: download it again"


def lfs_pointer_error(raw: bytes, file: str) -> CheckpointError | None:
    """The error for a file that was never downloaded, if `raw`, its beginning, is that of a Git LFS pointer."""
    if not raw.startswith(b"version https://git-lfs"):
        return None
    return CheckpointError(f"`{file}` is a Git LFS pointer, not the file itself", hint="run `git lfs pull`")


def absent_error(source: Source, message: str, hint: str) -> CheckpointError | SourceError:
    """The error for a missing file: the checkpoint's fault, unless only the cache could be asked."""
    if source.from_cache:
        return SourceError(f"{message} in the cache", hint="go online and run it again")
    return CheckpointError(message, hint=hint)


def read_json(source: Source, name: str, *, most_bytes: int = MAX_JSON_BYTES, fetched: bool = False) -> dict[str, Any]:
    """The object in one of the source's JSON files. Raises `CheckpointError`, naming the file, for anything else.

    With `fetched`, it is in the cache afterwards.
    """
    size = next(file.bytes for file in source.files if file.path == name)
    if size > most_bytes:
        raise CheckpointError(f"`{name}` is {size} bytes long")
    if fetched:
        source.fetch([name])
    return parse_json(source.read(name, 0, size), name)


def parse_json(raw: bytes, file: str, *, strict: bool = False) -> dict[str, Any]:
    """Parse a JSON object without repeated keys.

    `strict`: as safetensors headers are, that is by RFC 8259, and with integers for all numbers. Otherwise what
    Python's parser takes. Raises `CheckpointError`, naming the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"`{file}` names a key twice")
        return result

    try:
        if strict:
            text = raw.decode()
            value = json.loads(
                text, object_pairs_hook=unique, parse_constant=_refuse, parse_float=_refuse, parse_int=_integer
            )
            if "\\u" in text:
                json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        else:
            value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        invalid = CheckpointError(f"`{file}` is not valid JSON", hint=TRUNCATED)
        raise lfs_pointer_error(raw, file) or invalid from error
    if not isinstance(value, dict):
        raise CheckpointError(f"`{file}` is not a JSON object", hint=TRUNCATED)
    return value


def _integer(literal: str) -> int:
    """Parse an integer of a header; the safetensors library takes no more digits than a float has."""
    return int(literal) if len(literal) <= 300 else _refuse(literal)


def _refuse(literal: str) -> NoReturn:
    """Refuse a number that no header holds: a fraction, NaN or infinity."""
    raise ValueError(literal)
