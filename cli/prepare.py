"""`ftload prepare`."""

from __future__ import annotations

import typer

from .options import with_flags
from .output import Output


@with_flags
def prepare(ctx: typer.Context) -> None:
    """Turn a pretrained causal language model into a directory that training can start from."""
    from ..loaders.command_line import parse_arguments
    from ..loaders.prepare import prepare as run

    arguments = parse_arguments(ctx.obj)
    output = Output(as_json=arguments.own.json, quiet=arguments.own.quiet)
    with output.progress() as progress:
        report = run(arguments, progress)
    output.report(report, arguments.flat.output_dir)
