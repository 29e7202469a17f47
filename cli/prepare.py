"""`ftload prepare`."""

from __future__ import annotations

import typer

from ..loaders.flags.command_line import CommandLine, read_command_line
from .show.output import Output


def prepare(ctx: typer.Context) -> None:
    """Turn a pretrained causal language model into a directory that training can start from."""
    run_prepare(read_command_line(ctx.obj))


def run_prepare(given: CommandLine) -> None:
    """Prepare what a command line asks for, and show what was done."""
    with Output.from_flags(given.values) as output:
        arguments = given.arguments()
        from ..loaders.prepare import prepare as run

        with output.progress() as progress:
            outcome = run(arguments, progress)
        if outcome is not None:
            output.outcome(outcome, arguments.flat.output_dir)
