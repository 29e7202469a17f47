"""`ftload doctor`."""

from __future__ import annotations

import typer

from .show.output import OUTPUT


def doctor(
    wanted: list[str] | None = typer.Option(  # noqa: B008
        None,
        "--for",
        metavar="STRATEGY",
        help="Exit with 5 unless it can be prepared and trained here; several with commas, or given again.",
        show_default=False,
    ),
    quick: bool = typer.Option(False, "--quick", help="Try nothing: show what is installed."),
    json: bool = typer.Option(False, "--json", help="Print exactly one JSON document on stdout."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback with errors."),
) -> None:
    """Show what this machine can do, why it can't do the rest, and the command that mends it.

    Every library is really used, in a process of its own: that takes as long as importing them.
    """
    from ..loaders.doctor.diagnosis import examine
    from ..loaders.errors import UsageError
    from ..loaders.strategy import STRATEGIES

    OUTPUT.configure(as_json=json, quiet=False, debug=debug)
    names = [name.strip() for words in wanted or () for name in words.split(",")]
    for name in names:
        if name not in STRATEGIES:
            raise UsageError(f"`--for`: there is no strategy `{name}`", hint=f"one of {', '.join(STRATEGIES)}")
    with OUTPUT.waiting("trying what is installed"):
        diagnosis = examine(quick=quick, wanted=names)
    raise typer.Exit(OUTPUT.diagnosis(diagnosis))
