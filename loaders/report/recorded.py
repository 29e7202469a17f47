"""Flags that are only recorded: where nothing else changed, an output stays as it is and its report tells of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..flags.declared import FlatArguments, all_flags
from ..flags.request import Request, resolve_request
from ..plan.output_files import REPORT_FILE
from ..write.staging import Staging
from .metadata_files import CARD_FILE, json_text
from .model_card import model_card


def record(report: Mapping[str, Any], request: Request) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """The report of an output that is up to date as the flags are now, and the flags whose values it did not tell.

    The latter by name, with the old value and the new one. What the flags alone decide and warn of changes with them;
    all that was found while the output was made stays. ftload's own flags do too: they say how it was made.
    """
    arguments = request.arguments
    then, now = report["arguments"], arguments.report()
    names = [field.name for field in dataclasses.fields(FlatArguments)]
    changed = {
        name: (then[name]["value"], now[name]["value"]) for name in names if then[name]["value"] != now[name]["value"]
    }
    if not changed:
        return dict(report), {}
    before = resolve_request(
        dataclasses.replace(
            arguments,
            flat=dataclasses.replace(arguments.flat, **{name: _value(name, old) for name, (old, _) in changed.items()}),
            origins={**arguments.origins, **{name: then[name]["origin"] for name in names}},
        )
    )
    return {
        **report,
        "arguments": {**then, **{name: now[name] for name in names}},
        "decisions": _exchanged(report["decisions"], _values(before), _values(request)),
        "warnings": _exchanged(report["warnings"], before.warnings, request.warnings),
    }, changed


def _values(request: Request) -> list[dict[str, Any]]:
    return [dataclasses.asdict(decision) for decision in request.decisions]


def _exchanged(items: Sequence[Any], old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """`items` with `new` in the place of `old`."""
    place = next((index for index, item in enumerate(items) if item in old), len(items))
    return [*items[:place], *new, *(item for item in items[place:] if item not in old)]


def _value(name: str, recorded: Any) -> Any:
    """A flag's value from its place in a report, where infinity and NaN are strings."""
    return float(recorded) if all_flags()[name].kind == "float" and isinstance(recorded, str) else recorded


def rewrite(report: Mapping[str, Any], staging: Staging) -> dict[str, Any]:
    """Replace the output's report, and the model card where it tells of what changed; returns the report as written."""
    card = model_card(report)
    data = card.encode()
    entry = {"path": CARD_FILE, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files = [entry if file["path"] == CARD_FILE else file for file in report["files"]]
    texts = {} if files == report["files"] else {CARD_FILE: card}
    report = {**report, "files": files}
    staging.replace({**texts, REPORT_FILE: json_text(report)})
    return report
