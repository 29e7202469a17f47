"""`ftload plan`."""

from __future__ import annotations

import typer

from .show.output import OUTPUT


def plan(ctx: typer.Context) -> None:
    """Show what `prepare` would write with these flags, what that takes, and what training takes then.

    Reads headers, no weights (but all of a .gguf file), and writes nothing but the page of --html.
    """
    from ..loaders.flags.command_line import parse_plan_arguments
    from ..loaders.prepare import plan_only

    arguments, options = parse_plan_arguments(ctx.obj)
    OUTPUT.configure(as_json=arguments.own.json, quiet=arguments.own.quiet, debug=arguments.own.debug)
    if options.html is not None:
        from .show.page import check_place

        check_place(options.html)
    with OUTPUT.progress() as progress:
        found = plan_only(arguments, options, progress)
    if options.html is not None:
        from .show.page import plan_page, write_page

        write_page(options.html, plan_page(found))
    OUTPUT.plan(found, arguments.flat.output_dir)
