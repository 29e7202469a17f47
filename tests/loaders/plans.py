"""Plans as `ftload plan` makes them."""

from __future__ import annotations

from pathlib import Path

from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.declared import FlatArguments
from ftload.loaders.flags.request import resolve_request
from ftload.loaders.plan.plan import Plan
from ftload.loaders.plan.sources import resolve_sources
from ftload.loaders.prepare import read_and_plan
from ftload.loaders.progress import Silent, Stopwatch


def make_plan(model: Path, work: Path, *flags: str) -> tuple[Plan, FlatArguments]:
    """The plan for a model, and the training script's arguments that it was asked with."""
    arguments = parse_arguments(["--model", str(model), "--output_dir", str(work / "out"), *flags])
    request = resolve_request(arguments)
    return read_and_plan(request, resolve_sources(request), Stopwatch(Silent())), arguments.flat
