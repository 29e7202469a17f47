"""Outputs that exist: whether they are finished, whose they are, and their reports."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError, SourceError
from ..progress import Stopwatch
from ..source.file_names import REPORT_FILE
from ..system.durable import disk_errors, hash_files
from .document import SCHEMA_VERSION, Report
from .json_values import from_json


def find_finished(output: Path, fingerprint: str, watch: Stopwatch, *, overwrite: bool) -> Report | None:
    """The report of an output that is just what would be made, and intact; None if it is absent or another one.

    Raises `OutputError` when it is the right one, but damaged, and may not be replaced.
    """
    try:
        report = read_report(output)
    except CheckpointError:
        return None
    if report.fingerprint != fingerprint:
        return None
    with watch.stage("hash"):
        hashes = hash_files({output / file.path: file.bytes for file in report.files}, watch.progress)
    damaged = [output / file.path for file in report.files if hashes[output / file.path] != file.sha256]
    if damaged and overwrite:
        return None
    if damaged:
        raise OutputError(
            f"`{output}` was prepared, but `{damaged[0].relative_to(output)}` is not as it was written",
            hint="pass --overwrite to prepare it again",
        )
    return report


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` unless something can be put at `output`."""
    with disk_errors(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise OutputError(f"`{output}` exists and is not a directory", hint="choose another --output_dir")
        if not output.exists() or not any(output.iterdir()):
            return
        if not overwrite:
            raise OutputError(
                f"`{output}` exists and is not empty", hint="choose another --output_dir, or pass --overwrite"
            )
        if not (output / REPORT_FILE).exists():
            raise OutputError(
                f"`{output}` was not written by ftload: it holds no `{REPORT_FILE}`",
                hint="--overwrite deletes only what ftload wrote: remove the directory yourself",
            )
        foreign = next(_foreign_files(output), None)
        if foreign is not None:
            raise OutputError(
                f"`{output}` holds `{foreign}`, which ftload did not write",
                hint="move it away: --overwrite deletes only what ftload wrote",
            )


def _foreign_files(output: Path) -> Iterator[str]:
    """What a prepared directory holds beside what its report lists, and it holds nothing else when it is written."""
    written = {REPORT_FILE}
    with contextlib.suppress(CheckpointError, AttributeError):
        written |= {file.path for file in from_json(Report, read_document(output), []).files}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name not in written:
            yield name


def prepared_root(directory: Path) -> Path:
    """The directory, without links in its path. Raises `SourceError` where there is none."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise SourceError(f"`{directory}` {what}", hint="give a directory that `ftload prepare` wrote")
    return directory.resolve()


def read_document(directory: Path) -> dict[str, Any]:
    """The report of a prepared directory as JSON values, whatever else is in it than its version.

    Raises `CheckpointError` where there is none that can be understood.
    """
    path = directory / REPORT_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"`{directory}` holds no `{REPORT_FILE}`", hint="give a directory that `ftload prepare` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` can't be read") from error
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(f"`{path}` is not a report of schema version {SCHEMA_VERSION}")
    return document


def read_report(directory: Path) -> Report:
    """The report of a prepared directory. Raises `CheckpointError` where there is none that can be understood."""
    return as_report(read_document(directory), str(directory / REPORT_FILE))


def as_report(document: Mapping[str, Any], file: str) -> Report:
    """The report that a file holds. Raises `CheckpointError` unless it is one that this version understands."""
    problems: list[str] = []
    if document.get("schema_version") == SCHEMA_VERSION:
        report = from_json(Report, document, problems)
        if not problems:
            return report
    why = f": {problems[0]}" if problems else ""
    raise CheckpointError(f"`{file}` is not a report of schema version {SCHEMA_VERSION}{why}")
