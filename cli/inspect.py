"""`ftload inspect`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import typer
from typer.core import TyperCommand

from .show.output import OUTPUT


class InspectCommand(TyperCommand):
    """Lets `--tensors` stand alone, which typer's options can't: it lists every tensor then."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a `--tensors` that is last, or followed by another option, the pattern `*`."""
        followed = zip(args, (*args[1:], "--"), strict=False)
        words = (f"{word}=*" if word == "--tensors" and then.startswith("-") else word for word, then in followed)
        return super().parse_args(ctx, list(words))


def inspect(
    checkpoint: str = typer.Argument(
        help="A directory, a .safetensors or .gguf file, an adapter, or a repository on the hub.", show_default=False
    ),
    other: str | None = typer.Argument(None, help="Another one: show what differs.", show_default=False),
    tensors: str | None = typer.Option(
        None, "--tensors", metavar="[GLOB]", help="List the tensors, or those whose names match.", show_default=False
    ),
    bytes: bool = typer.Option(False, "--bytes", help="Compare the contents of two checkpoints too, by sha256."),
    html: str | None = typer.Option(
        None, "--html", metavar="FILE", help="Write a page too, without scripts or network.", show_default=False
    ),
    revision: str | None = typer.Option(None, "--revision", help="Branch, tag or commit on the hub."),
    json: bool = typer.Option(False, "--json", help="Print exactly one JSON document on stdout."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback with errors."),
) -> None:
    """Show what is in a checkpoint, from its headers alone.

    No weight is read or downloaded unless --bytes compares two. The exit code is 0 whether they differ or not: --json
    says so in `equal`.
    """
    from ..loaders.errors import UsageError
    from ..loaders.inspect.comparison import compare
    from ..loaders.inspect.inspection import inspect as run

    OUTPUT.configure(as_json=json, quiet=False, debug=debug)
    if other is None:
        if bytes:
            raise UsageError("`--bytes` compares two checkpoints", hint="give another one")
        if html is not None:
            from .show.page import check_place

            check_place(html)
        found = run(checkpoint, revision=revision)
        listed = None
        if tensors is not None:
            listed = tuple(tensor for tensor in found.tensors if fnmatchcase(tensor.name, tensors))
        if html is not None:
            from .show.page import inspection_page, write_page

            write_page(html, inspection_page(found, listed))
        OUTPUT.inspection(found, listed)
        return
    for option, value, what in (("--tensors", tensors, "lists those"), ("--html", html, "is a page")):
        if value is not None:
            raise UsageError(f"`{option}` {what} of one checkpoint", hint="leave out the other one")
    first, second = (run(model, revision=revision) for model in (checkpoint, other))
    OUTPUT.comparison(compare(first, second, contents=bytes))
