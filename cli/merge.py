"""`ftload merge`."""

from __future__ import annotations

import typer

from ..loaders.flags.command_line import read_command_line
from .prepare import run_prepare


def merge(ctx: typer.Context) -> None:
    """Merge trained adapters into their base, in this order, and write the model: `prepare --merge_adapter ADAPTER …`.

    The flags are those of `prepare`: with none of them, a plain bfloat16 model is written.
    """
    words = list(ctx.obj)
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    run_prepare(read_command_line(["--merge_adapter", *words] if count else words))
