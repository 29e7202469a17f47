"""`ftload merge` and `ftload fuse`."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from ..loaders.errors import UsageError
from ..loaders.flags.command_line import read_command_line
from .options import AsJson, Debug
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


def fuse(
    adapter: Annotated[str, typer.Argument(help="A trained adapter: a directory, or a repository on the hub.")],
    model: Annotated[str, typer.Option("--model", help="The 16-bit model: a hub id or a directory.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", "--output-dir", help="Where the new adapter is written.")],
    json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    debug: Debug = False,
) -> None:
    """Write an adapter that was trained on 4-bit experts for the same model in 16 bits.

    There, all experts of a layer are one parameter: PEFT's `target_parameters`. The weights are the same, and nothing
    is merged; `ftload merge` does that.
    """
    with Output.from_flags({"json": json, "quiet": quiet, "debug": debug}) as output:
        from ..loaders.fuse import fuse as run

        with output.progress() as progress:
            fused = run(adapter, model, output_dir.expanduser().absolute(), progress)
        output.fused(fused)
