"""`ftload prepare`."""

from __future__ import annotations

import typer

from .show.output import OUTPUT, is_first_process


def prepare(ctx: typer.Context) -> None:
    """Turn a pretrained causal language model into a directory that training can start from."""
    from ..loaders.flags.command_line import parse_arguments
    from ..loaders.prepare import prepare as run

    arguments = parse_arguments(ctx.obj)
    first = is_first_process()
    OUTPUT.configure(
        as_json=arguments.own.json and first, quiet=arguments.own.quiet or not first, debug=arguments.own.debug
    )
    with OUTPUT.progress() as progress:
        outcome = run(arguments, progress)
    if outcome is not None:
        OUTPUT.outcome(outcome, arguments.flat.output_dir)
