"""`ftload plan`."""

from __future__ import annotations

import typer

from .output import OUTPUT


def plan(ctx: typer.Context) -> None:
    """Show what `prepare` would write with these flags, and what that takes. Reads headers, writes nothing."""
    from ..loaders.command_line import parse_arguments
    from ..loaders.prepare import plan_only

    arguments = parse_arguments(ctx.obj)
    OUTPUT.configure(as_json=arguments.own.json, quiet=arguments.own.quiet, debug=arguments.own.debug)
    with OUTPUT.progress() as progress:
        found = plan_only(arguments, progress)
    OUTPUT.plan(found, arguments.flat.output_dir)
