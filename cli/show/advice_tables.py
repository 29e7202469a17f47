"""The advice of `ftload plan --fit`, for people: whether it fits, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from .tables import format_bytes, harmless, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ...loaders.memory.advice import Advice


def print_advice(console: Console, advice: Iterable[Advice]) -> None:
    """For each kind of GPU a line, and below it the changes, what each saves, and the flags to append."""
    for one in advice:
        console.print()
        style = "green" if one.fits_as_given else "yellow" if one.fits else "red"
        print_line(console, f"[bold]fit {one.gpus}[/]: [{style}]{harmless(verdict(one))}[/]")
        if one.changes:
            table = Table(box=None, pad_edge=False, header_style="bold")
            table.add_column("change")
            table.add_column("saves", justify="right", no_wrap=True)
            table.add_column("then", justify="right", no_wrap=True)
            for words, saves, total in change_rows(one):
                table.add_row(words, saves, total)
            print_table(console, table)
            # never folded: it is to be copied
            console.print(f"[bold]{harmless(one.command_line)}[/]", soft_wrap=True)


def advice_rows(advice: Iterable[Advice]) -> list[tuple[str, str, str, str]]:
    """The same as rows of one table: the GPU, what there is to say, what that saves, and the peak then."""
    rows = []
    for one in advice:
        rows.append((one.gpus, verdict(one), "", "" if one.total_bytes is None else format_bytes(one.total_bytes)))
        rows += [("", *row) for row in change_rows(one)]
        if one.changes:
            rows.append(("", one.command_line, "", ""))
    return rows


def verdict(advice: Advice) -> str:
    """Whether it fits, in a sentence."""
    if advice.total_bytes is None:
        return f"{advice.method}: no estimate: {advice.reason}"
    each = " on each" if advice.gpu_count > 1 else ""
    taken = f"{advice.method} takes {format_bytes(advice.total_bytes)}{each}"
    if advice.fits_as_given:
        return f"yes, {taken}"
    if advice.changes:
        count = len(advice.changes)
        return f"no, {taken}; it fits with {count} change{'s' if count > 1 else ''}"
    left = f"; with all that can be changed, {format_bytes(advice.smallest_bytes)}" if advice.smallest_bytes else ""
    return f"no, {taken}{left}"


def change_rows(advice: Advice) -> list[tuple[str, str, str]]:
    """Each change in words, what it saves, and the peak after it."""
    return [
        (
            change.words,
            format_bytes(change.saves_bytes) if change.saves_bytes >= 0 else f"-{format_bytes(-change.saves_bytes)}",
            format_bytes(change.total_bytes),
        )
        for change in advice.changes
    ]
