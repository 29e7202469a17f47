"""`ftload doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..loaders.errors import UsageError
from .options import AsJson, Debug
from .show.output import Output


def _strategies() -> list[str]:
    from ..loaders.strategy import STRATEGIES

    return list(STRATEGIES)


def doctor(
    wanted: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="STRATEGY",
            autocompletion=_strategies,
            help="Exit with 5 unless it can be prepared and trained here; several with commas, or given again.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try nothing: show what is installed.")] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show what this machine can do, why it can't do the rest, and the command that fixes it.

    Every library is really used, in a process of its own, which takes as long as importing them all.
    """
    with Output.from_flags({"json": json, "debug": debug}) as output:
        from ..loaders.doctor.diagnosis import examine
        from ..loaders.strategy import STRATEGIES

        names = [name.strip() for words in wanted or () for name in words.split(",")]
        for name in names:
            if name not in STRATEGIES:
                raise UsageError(f"`--for`: there is no strategy `{name}`", hint=f"one of {', '.join(STRATEGIES)}")
        with output.waiting("trying what is installed"):
            diagnosis = examine(quick=quick, wanted=names)
        return output.diagnosis(diagnosis)
