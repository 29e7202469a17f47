"""`ftload merge`."""

from __future__ import annotations

from itertools import takewhile

import typer

from ..loaders.errors import UsageError
from ..loaders.flags.command_line import read_command_line
from .prepare import run_prepare
from .show.output import Output


def merge(ctx: typer.Context) -> None:
    """Write a base and its trained adapters as one model: `prepare --merge_adapter ADAPTER …` in short.

    Adapters, by directory or hub id, are merged in this order. The base is the one that the first of them names, unless
    --model names another. All other flags are those of `prepare`; without any, the model is a plain bfloat16 one.
    """
    words = tuple(ctx.obj)
    if not any(True for _ in takewhile(lambda word: not word.startswith("-"), words)):
        with Output.from_flags(read_command_line(words).values):
            raise UsageError("no adapter is given", hint="ftload merge ADAPTER --output_dir DIRECTORY")
    run_prepare(("--merge_adapter", *words))
