"""Whether two runs would write the same: the request, the sources and the versions in one hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..flags.request import Request
from ..source.file_names import ADAPTER_FILE
from ..source.source import Source
from ..system.versions import ftload_version, versions

_NO_PART_IN_THE_RESULT = frozenset(
    {"arguments", "decisions", "max_memory_bytes", "overwrite", "source_cache", "strict", "tokenizer", "warnings"}
)
_SUFFIXES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".tiktoken", ".jinja", ".py")
"""Files of a model that can have a part in what is written."""


def fingerprint(request: Request, sources: tuple[Source, ...]) -> str:
    """A sha256 that changes with whatever has a part in the result.

    Local files are known by path, size and time of modification (ns), a repository's by their commit.
    """
    values: dict[str, Any] = {
        "ftload": ftload_version(),
        "versions": versions(),
        "request": {
            field.name: str(getattr(request, field.name))
            for field in dataclasses.fields(request)
            if field.name not in _NO_PART_IN_THE_RESULT
        },
        "tokenizer": dataclasses.asdict(request.tokenizer),
        "sources": [[source.model, source.commit] if source.commit else _local(source) for source in sources],
        "chat_template": _contents(request.tokenizer.chat_template_name),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def can_have_a_part(path: str) -> bool:
    """Whether a file of a model's directory is one that something could load."""
    return path.endswith(_SUFFIXES)


def _local(source: Source) -> list[Any]:
    told = [] if source.license is None else [dataclasses.asdict(source.license)]
    return [*_files(source), *told]


def _files(source: Source) -> Iterator[tuple[str, int, int]]:
    names = [file.path for file in source.files if can_have_a_part(file.path)]
    # whether an adapter was trained is a decision (`trained_adapter.py`)
    names += [Path(config).with_name(ADAPTER_FILE).as_posix() for config in source.adapters]
    for path in (source.root / name for name in dict.fromkeys(names)):
        if path.exists():
            found = path.stat()
            yield str(path), found.st_size, found.st_mtime_ns


def _contents(chat_template_name: str | None) -> str | None:
    """A chat template that is a file, whole."""
    path = Path(chat_template_name or "").expanduser()
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
