"""`ftload plan`."""

from __future__ import annotations

import typer

from ..loaders.flags.command_line import read_command_line
from ..loaders.flags.declared import plan_flags
from .show.output import Output


def plan(ctx: typer.Context) -> int:
    """Show what `prepare` would write with these flags, what that takes, and what training takes then.

    Reads headers, no weights (but all of a .gguf file), and writes nothing but the page of --html.
    """
    given = read_command_line(ctx.obj, plan_flags())
    with Output.from_flags(given.values) as output:
        arguments, options = given.arguments(), given.plan_options()
        from ..loaders.prepare import plan_only

        if options.html is not None:
            from .show.page import check_place

            check_place(options.html)
        with output.progress() as progress:
            outcome = plan_only(arguments, options, progress)
        if options.html is not None:
            from .show.page import plan_page, write_page

            write_page(options.html, plan_page(outcome))
        return output.plan(outcome, arguments.flat.output_dir)
