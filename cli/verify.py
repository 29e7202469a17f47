"""`ftload verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..loaders.errors import UsageError
from .options import AsJson, Debug
from .show.output import Output


def verify(
    directory: Annotated[Path, typer.Argument(help="What `ftload prepare` wrote.")],
    quick: Annotated[bool, typer.Option("--quick", help="Leave out loading the model and the training step.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", "--trust-remote-code", help="Run code that came with the model.")
    ] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Have the adapter name the directory's present place as its base, then check.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="ORG/NAME[@COMMIT]", help="With --fix: a repository on a hub, in place of that."
        ),
    ] = None,
    json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    debug: Debug = False,
) -> int:
    """Prove that a prepared directory is what its report says, and that it trains.

    Hashes, headers, configuration, tokenizer, template and adapter are checked against the report; then the model is
    loaded and takes one training step. Exit code 7 if anything failed.
    """
    with Output.from_flags({"json": json, "quiet": quiet, "debug": debug}) as output:
        from ..loaders.report.rebased import hub_base, name_base
        from ..loaders.verify.verify import verify as run

        if base is not None and not fix:
            raise UsageError("`--base` is what `--fix` writes", hint="pass --fix too")
        with output.progress() as progress:
            rebased = name_base(directory, None if base is None else hub_base(base)) if fix else None
            verification = run(directory, quick=quick, trust_remote_code=trust_remote_code, progress=progress)
        return output.verification(verification, rebased)
