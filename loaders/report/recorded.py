"""Flags that are only recorded: where nothing else changed, an output stays as it is and its report tells of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

from ..flags.declared import FlatArguments
from ..flags.request import Request, resolve_request
from ..source.file_names import REPORT_FILE
from ..source.license import CARD_FILE
from ..write.staging import Staging
from .document import Report, WrittenFile
from .json_values import to_json
from .metadata_files import json_text
from .model_card import model_card
from .recorded_flags import recorded_value
from .report import reported_arguments

T = TypeVar("T")


def record(report: Report, request: Request) -> tuple[Report, dict[str, tuple[Any, Any]]]:
    """The report of an output that is up to date as the flags are now, and the flags whose values it did not tell.

    The latter by name, with the old value and the new one. What the flags alone decide and warn of changes with them;
    all that was found while the output was made stays. ftload's own flags do too: they say how it was made.
    """
    arguments = request.arguments
    then, now = report.arguments, reported_arguments(arguments)
    names = [field.name for field in dataclasses.fields(FlatArguments)]
    changed = {name: (then[name].value, now[name].value) for name in names if then[name].value != now[name].value}
    if not changed:
        return report, {}
    before = resolve_request(
        dataclasses.replace(
            arguments,
            flat=dataclasses.replace(
                arguments.flat, **{name: recorded_value(name, old) for name, (old, _) in changed.items()}
            ),
            origins={**arguments.origins, **{name: then[name].origin for name in names}},
        )
    )
    return dataclasses.replace(
        report,
        arguments={**then, **{name: now[name] for name in names}},
        decisions=_exchanged(report.decisions, before.decisions, request.decisions),
        warnings=_exchanged(report.warnings, before.warnings, request.warnings),
    ), changed


def _exchanged(items: tuple[T, ...], old: Sequence[T], new: Sequence[T]) -> tuple[T, ...]:
    """`items` with `new` in the place of `old`."""
    place = next((index for index, item in enumerate(items) if item in old), len(items))
    return (*items[:place], *new, *(item for item in items[place:] if item not in old))


def rewrite(report: Report, staging: Staging) -> Report:
    """Replace the output's report, and the model card where it tells of what changed; returns the report as written."""
    card = model_card(report)
    data = card.encode()
    entry = WrittenFile(path=CARD_FILE, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    files = tuple(entry if file.path == CARD_FILE else file for file in report.files)
    texts = {} if files == report.files else {CARD_FILE: card}
    report = dataclasses.replace(report, files=files)
    staging.replace({**texts, REPORT_FILE: json_text(to_json(report))})
    return report
