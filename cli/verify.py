"""`ftload verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Debug
from .show.output import Output


def verify(
    directory: Annotated[Path, typer.Argument(help="What `ftload prepare` wrote.")],
    quick: Annotated[bool, typer.Option("--quick", help="Leave out loading the model and the training step.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", "--trust-remote-code", help="Run code that came with the model.")
    ] = False,
    json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    debug: Debug = False,
) -> int:
    """Prove that a prepared directory is what its report says, and that it trains.

    Hashes, headers, configuration, tokenizer, template and adapter are checked against the report; then the model is
    loaded and takes one training step. Exit code 7 if anything failed.
    """
    with Output.from_flags({"json": json, "quiet": quiet, "debug": debug}) as output:
        from ..loaders.verify.verify import verify as run

        with output.progress() as progress:
            verification = run(directory, quick=quick, trust_remote_code=trust_remote_code, progress=progress)
        return output.verification(verification)
