"""What `--help` prints: the usage, what a command does, examples, and panels of names with their help.

typer's own help breaks paragraphs where the source does, cuts off long names at 80 columns, gives flags that stand
alone a type, and takes half a second for a hundred options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDEST = 120
"""Columns beyond which lines of help are no easier to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One flag, argument or command."""

    name: str
    type: str = ""
    help: str
    note: str = ""
    """What stands behind the help in brackets: the default, or that it is required."""


def print_help(
    usage: str,
    text: str,
    panels: Mapping[str, Sequence[Row]],
    *,
    notes: Sequence[str] = (),
    examples: Sequence[str] = (),
) -> None:
    """Print help as wide as the terminal; `text` is a docstring, `panels` are by their titles."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    blocks = [
        Text.assemble(("Usage: ", "yellow"), (usage, "bold")),
        *paragraphs,
        *(Text(note, "dim") for note in notes),
    ]
    if examples:
        blocks.append(Text("\n".join(examples), "cyan"))
    for block in blocks:
        console.print(Padding(block, (1, 1, 0, 1)), markup=False)
    console.print()
    for title, rows in panels.items():
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(style="bold cyan", no_wrap=True, width=max(len(row.name) for row in rows))  # never cut off
        if width := max(len(row.type) for row in rows):
            table.add_column(style="yellow", no_wrap=True, width=width)
        table.add_column(ratio=1)
        for row in rows:
            help = Text.assemble(row.help, (row.note and f" [{row.note}]", "dim"))
            table.add_row(*(Text(cell) for cell in (row.name, row.type)[: 2 if width else 1]), help)
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))
