"""The training memory of `ftload plan`, for people: what fills it, why, and what fits where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from .tables import UNBOUNDED, format_bytes, harmless, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ...loaders.memory.training_memory import Fit, NoEstimate, TrainingMemory

PART_COLOURS = ("blue", "cyan", "magenta", "yellow", "green", "red", "white", "bright_black")
_BAR_WIDTH = 60


def print_training_memory(console: Console, methods: Sequence[TrainingMemory | NoEstimate]) -> None:
    """Full fine-tuning, LoRA and QLoRA side by side."""
    known = estimated(methods)
    if known:
        drawn = console.is_terminal and console.encoding.startswith("utf")
        console.print()
        print_table(console, _parts(known, drawn=drawn))
        if drawn:
            print_table(console, _bars(known))
        console.print()
        print_table(console, _fits(console, known))
        print_line(console, f"[dim]{how_to_read(known[0])}[/]")
        for name, origin in origins(known):
            print_line(console, f"[dim]{name}: {harmless(origin)}[/]")
    for one in without_estimate(methods):
        print_line(console, f"[dim]{one.method}: no estimate: {harmless(one.reason)}[/]")


def estimated(methods: Iterable[TrainingMemory | NoEstimate]) -> list[TrainingMemory]:
    """Those of which the memory is known."""
    from ...loaders.memory.training_memory import TrainingMemory

    return [method for method in methods if isinstance(method, TrainingMemory)]


def without_estimate(methods: Iterable[TrainingMemory | NoEstimate]) -> list[NoEstimate]:
    """The others."""
    from ...loaders.memory.training_memory import NoEstimate

    return [method for method in methods if isinstance(method, NoEstimate)]


def setting(method: TrainingMemory) -> str:
    """What is trained on, and on how many GPUs."""
    words = f"{method.batch_size} × {method.length:,} tokens"
    sharding = method.sharding
    if sharding is None:
        return words
    kind = "FSDP" if sharding.method == "fsdp" else f"ZeRO-{sharding.stage}"
    return f"{words}, {kind} on {sharding.gpus:,} GPUs"


def part_names(methods: list[TrainingMemory]) -> list[str]:
    """The parts that any of the methods has, in their order."""
    names = dict.fromkeys(part.name for method in methods for part in method.parts)
    return [name for name in names if any(part_bytes(method, name) for method in methods)]


def part_bytes(method: TrainingMemory, name: str) -> int:
    """The bytes of a part; 0 if the method has none."""
    return sum(part.bytes for part in method.parts if part.name == name)


def what_fits(fit: Fit) -> str:
    """The largest batch and the longest sequence that fit on one GPU, in words.

    They begin with `only` where what was asked for does not fit, and are empty where nothing does.
    """
    batch = f"batch {fit.largest_batch:,}" if fit.largest_batch else ""
    length = f"{fit.largest_length:,} tokens" if fit.largest_length else ""
    words = " or ".join(filter(None, (batch, length)))
    return f"only {words}" if words and not fit.fits else words


def how_to_read(method: TrainingMemory) -> str:
    """What the columns of the GPUs mean."""
    return (
        f"the largest batch of {method.length:,} tokens each, or the longest sequences in a batch of "
        f"{method.batch_size}; per GPU, at the peak of a step. sequence length: {method.length_origin}"
    )


def origins(methods: list[TrainingMemory]) -> list[tuple[str, str]]:
    """Where each part's number comes from; where methods differ, for each of them."""
    found = []
    for name in part_names(methods):
        by_origin: dict[str, list[str]] = {}
        for method in methods:
            for part in method.parts:
                if part.name == name and part.bytes:
                    by_origin.setdefault(part.origin, []).append(method.method)
        for origin, users in by_origin.items():
            found.append((name if len(by_origin) == 1 else f"{name} ({', '.join(users)})", origin))
    return found


def _parts(methods: list[TrainingMemory], *, drawn: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"training, {setting(methods[0])}")
    for method in methods:
        table.add_column(method.method, justify="right", no_wrap=True)
    for number, name in enumerate(part_names(methods)):
        mark = Text("■ ", PART_COLOURS[number]) if drawn else Text()
        sizes = (part_bytes(method, name) for method in methods)
        table.add_row(mark + Text(name), *(format_bytes(size) if size else "" for size in sizes))
    table.add_row("total", *(format_bytes(method.total) for method in methods), style="bold")
    return table


def _bars(methods: list[TrainingMemory]) -> Table:
    """A bar for each method, all on one scale, of what fills the memory."""
    largest = max(method.total for method in methods)
    table = Table(box=None, pad_edge=False, show_header=False)
    for method in methods:
        bar, end = Text(), 0.0
        for colour, name in zip(PART_COLOURS, part_names(methods), strict=False):
            begin, end = end, end + part_bytes(method, name) / largest * _BAR_WIDTH
            bar.append("█" * (round(end) - round(begin)), colour)
        table.add_row(method.method, bar, format_bytes(method.total))
    return table


def _fits(console: Console, methods: list[TrainingMemory]) -> Table:
    """What fits on each GPU: the methods side by side, or below each other where that is too wide for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("fits", justify="right", no_wrap=True)
    for method in methods:
        table.add_column(method.method, no_wrap=True)
    for fits in zip(*(method.fits for method in methods), strict=True):
        table.add_row(f"{fits[0].gigabytes} GB", *map(_fit_words, fits))
    if console.measure(table, options=console.options.update(width=UNBOUNDED)).maximum <= console.width:
        return table
    stacked = Table(box=None, pad_edge=False, show_header=False)
    stacked.add_column(style="bold", no_wrap=True)
    stacked.add_column(justify="right", no_wrap=True)
    stacked.add_column(overflow="fold")
    for method in methods:
        stacked.add_row(method.method, "[bold]fits[/]")
        for fit in method.fits:
            stacked.add_row("", f"{fit.gigabytes} GB", _fit_words(fit))
    return stacked


def _fit_words(fit: Fit) -> Text:
    words = what_fits(fit)
    return Text(f"yes: {words}", "green") if fit.fits else Text(words or "no", "dim")
