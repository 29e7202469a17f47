"""Tables and numbers for people, at a terminal or in a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...loaders.system.safe_text import one_line

UNBOUNDED = 10_000
"""Columns: more than any line has."""


def make_console() -> Console:
    """A console on stdout, as wide as the terminal. In a pipe no line is folded, so that `grep` finds whole ones."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        return Console(highlight=False, emoji=False, width=UNBOUNDED)
    if "COLUMNS" not in os.environ:
        # rich asks descriptors 0 to 2 for a width, and stdout has been moved to another (see cli/app.py)
        with contextlib.suppress(OSError):
            console.width = os.get_terminal_size(sys.stdout.fileno()).columns or console.width
    return console


def print_table(console: Console, table: Table) -> None:
    """Print a table; in a pipe without trailing blanks."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(line.rstrip(), markup=False, soft_wrap=True)


def print_line(console: Console, line: str) -> None:
    """Print a line of rich's markup, at a terminal folded between words.

    One with a word that is longer than the terminal is wide is left to the terminal: a path can still be copied.
    """
    text = Text.from_markup(line, emoji=False)
    longest = max(map(cell_len, text.plain.split()), default=0)
    console.print(text, soft_wrap=not console.is_terminal or longest > console.width)


def print_labelled(console: Console, label: str, text: str, style: str = "yellow") -> None:
    """Print a line from outside with a label before it, at a terminal folded beside that."""
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(style=style, no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(label, harmless(text))
    print_table(console, line)


def print_details(console: Console, details: Iterable[tuple[str, str]]) -> None:
    """Print a line for each name and value."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in details:
        table.add_row(name, harmless(value))
    print_table(console, table)


def harmless(text: str) -> str:
    """Text from a file or a library, made safe for a terminal and for rich's markup."""
    return escape(one_line(text))


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and downloads are sold: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_count(count: int) -> str:
    """A count of parameters, in the units in which models are named: `8.03 B`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
