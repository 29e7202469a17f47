"""Plans as `ftload plan` makes them."""

from __future__ import annotations

from pathlib import Path

from ftload.loaders.arguments import FlatArguments
from ftload.loaders.command_line import parse_arguments
from ftload.loaders.plan import Plan
from ftload.loaders.ready import Timings, make_ready, resolve_sources
from ftload.loaders.request import resolve_request
from ftload.loaders.stream import Silent


def make_plan(model: Path, work: Path, *flags: str) -> tuple[Plan, FlatArguments]:
    """The plan for a model, and the training script's arguments that it was asked with."""
    arguments = parse_arguments(["--model", str(model), "--output_dir", str(work / "out"), *flags])
    request = resolve_request(arguments)
    sources = resolve_sources(request, arguments.tokenizer)
    return make_ready(arguments, request, sources, work, Timings(Silent())).plan, arguments.flat
