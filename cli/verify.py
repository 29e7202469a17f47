"""`ftload verify`."""

from __future__ import annotations

from pathlib import Path

import typer

from .show.output import OUTPUT


def verify(
    directory: Path = typer.Argument(help="What `ftload prepare` wrote."),  # noqa: B008
    quick: bool = typer.Option(False, "--quick", help="Leave out loading the model and the training step."),
    trust_remote_code: bool = typer.Option(
        False, "--trust_remote_code", "--trust-remote-code", help="Run code that came with the model."
    ),
    json: bool = typer.Option(False, "--json", help="Print exactly one JSON document on stdout."),
    quiet: bool = typer.Option(False, "--quiet", help="Show nothing but errors."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback with errors."),
) -> None:
    """Prove that a prepared directory is what its report says, and that it trains.

    Hashes, headers, configuration, tokenizer, template and adapter are checked against the report; then the model is
    loaded and takes one training step. Exit code 7 if anything failed.
    """
    from ..loaders.verify.verify import verify as run

    OUTPUT.configure(as_json=json, quiet=quiet, debug=debug)
    with OUTPUT.progress() as progress:
        verification = run(directory, quick=quick, trust_remote_code=trust_remote_code, progress=progress)
    raise typer.Exit(OUTPUT.verification(verification))
