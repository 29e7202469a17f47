"""`ftload recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..loaders.trainers.registry import TRAINERS
from .options import AsJson, Debug
from .show.output import Output


def recipe(
    directory: Annotated[Path, typer.Argument(help="What `ftload prepare` wrote.")],
    trainer: Annotated[
        str,
        typer.Option(
            "--for", metavar="TRAINER", autocompletion=lambda: list(TRAINERS), help=f"One of {', '.join(TRAINERS)}."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Conversations to train on, instead of the recorded ones: a .json or .jsonl file, or a hub id.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write it there, not to stdout.", show_default=False),
    ] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the file with which a trainer takes a prepared directory.

    It trains the prepared adapter on the prepared base, with the flags that `prepare` was given. Its first lines say
    how to run it, what it was tested with, and what that trainer does otherwise than planned.
    """
    with Output.from_flags({"json": json, "debug": debug}) as output:
        from ..loaders.recipe.recipe import make_recipe

        made = make_recipe(directory, trainer, data=data, output=None if file is None else file.expanduser())
        output.recipe(made, written=file is not None)
