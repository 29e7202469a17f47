"""Tables for people, at a terminal or in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import one_line

_UNBOUNDED = 10_000
"""Columns."""


def make_console() -> Console:
    """A console on stdout: as wide as the terminal; in a pipe, where lines are for `grep`, nothing is folded."""
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=_UNBOUNDED)


def print_table(console: Console, table: Table) -> None:
    """Print a table; in a pipe without the blanks that fill its lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(line.rstrip(), markup=False, soft_wrap=True)


def harmless(text: str) -> str:
    """Text of a file or a library that neither a terminal nor rich takes for an instruction."""
    return escape(one_line(text))
