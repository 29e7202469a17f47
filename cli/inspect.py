"""`ftload inspect`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer

from ..loaders.errors import UsageError
from .options import AsJson, Debug, OptionsCommand
from .show.output import Output


class InspectCommand(OptionsCommand):
    """Lets `--tensors` stand alone, which typer's options can't: it lists every tensor then."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a `--tensors` that is last, or followed by another option, the pattern `*`."""
        followed = zip(args, (*args[1:], "--"), strict=False)
        words = (f"{word}=*" if word == "--tensors" and then.startswith("-") else word for word, then in followed)
        return super().parse_args(ctx, list(words))


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A directory, a .safetensors or .gguf file, an adapter, or a repository on the hub.",
            show_default=False,
        ),
    ],
    other: Annotated[str | None, typer.Argument(help="Another one: show what differs.", show_default=False)] = None,
    tensors: Annotated[
        str | None,
        typer.Option(
            "--tensors", metavar="[GLOB]", help="List the tensors, or those whose names match.", show_default=False
        ),
    ] = None,
    bytes: Annotated[
        bool, typer.Option("--bytes", help="Compare the contents of two checkpoints too, by sha256.")
    ] = False,
    html: Annotated[
        str | None,
        typer.Option(
            "--html", metavar="FILE", help="Write a page too, without scripts or network.", show_default=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what is in a checkpoint, from its headers alone.

    No weight is read or downloaded unless --bytes compares two. The exit code is 0 whether they differ or not: --json
    says so in `equal`.
    """
    with Output.from_flags({"json": json, "debug": debug}) as output:
        if other is None:
            if bytes:
                raise UsageError("`--bytes` compares two checkpoints", hint="give another one")
            _show_one(output, checkpoint, revision, tensors, html)
            return
        for option, value, what in (("--tensors", tensors, "lists those"), ("--html", html, "is a page")):
            if value is not None:
                raise UsageError(f"`{option}` {what} of one checkpoint", hint="leave out the other one")
        _compare(output, checkpoint, other, revision, contents=bytes)


def _show_one(output: Output, checkpoint: str, revision: str | None, pattern: str | None, html: str | None) -> None:
    from ..loaders.inspect.inspection import inspect

    if html is not None:
        from .show.page import check_place

        check_place(html)
    found = inspect(checkpoint, revision=revision)
    listed = None
    if pattern is not None:
        listed = tuple(tensor for tensor in found.tensors if fnmatchcase(tensor.name, pattern))
    if html is not None:
        from .show.page import inspection_page, write_page

        write_page(html, inspection_page(found, listed))
    output.inspection(found, listed)


def _compare(output: Output, checkpoint: str, other: str, revision: str | None, *, contents: bool) -> None:
    from ..loaders.inspect.comparison import compare
    from ..loaders.inspect.inspection import inspect

    first, second = (inspect(model, revision=revision) for model in (checkpoint, other))
    output.comparison(compare(first, second, contents=contents))
