"""`ftload merge`."""

from __future__ import annotations

from itertools import takewhile

import typer

from ..loaders.errors import UsageError
from ..loaders.flags.command_line import CommandLine, read_command_line
from ..loaders.flags.declared import merge_flags
from .prepare import run_prepare
from .show.output import Output


def merge(ctx: typer.Context) -> None:
    """Write a base and its trained adapters as one model: `prepare --merge_adapter ADAPTER …` in short.

    Adapters, by directory or hub id, are merged in this order. The base is the one that the first of them names, unless
    --model names another. All other flags are those of `prepare`; without any, the model is a plain bfloat16 one.
    """
    words = tuple(ctx.obj)
    given = read_command_line(("--merge_adapter", *words), merge_flags())
    if not any(True for _ in takewhile(lambda word: not word.startswith("-"), words)):
        with Output.from_flags(given.values):
            raise UsageError("no adapter is given", hint="ftload merge ADAPTER --output_dir DIRECTORY")
    if given.values.get("adapter_only"):
        _write_adapter(given)
    else:
        run_prepare(given)


def _write_adapter(given: CommandLine) -> None:
    with Output.from_flags(given.values) as output:
        from ..loaders.flags.request import resolve_request
        from ..loaders.fuse import fuse

        request = resolve_request(given.arguments())
        assert request.model is not None
        with output.progress() as progress:
            fused = fuse(request.merge_adapters[0], request.model, request.revision, request.output, progress)
        output.fused(fused)
