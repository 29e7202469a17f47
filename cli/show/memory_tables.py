"""The training memory of `ftload plan`, for people: what fills it, why, and what fits where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from .tables import UNBOUNDED, format_bytes, harmless, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ...loaders.memory.chosen_gpu import ChosenGpu
    from ...loaders.memory.training_memory import Fit, NoEstimate, TrainingMemory

_BACKWARD = "backward pass of layer "
_LINE = "│"
_OVER = "red"


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How a part is drawn: red is for what exceeds a GPU alone."""

    letter: str
    terminal: str
    """A colour of 256, which are the same on every terminal: legible on black and on white."""
    page: str
    """The same for a page, light or dark."""
    ink: str
    """Of the letter on it, in the page."""


LOOKS = {
    "weights": Look(letter="W", terminal="color(26)", page="#2a6fc0", ink="#fff"),
    "adapter": Look(letter="D", terminal="color(133)", page="#b0559a", ink="#fff"),
    "optimizer states": Look(letter="O", terminal="color(136)", page="#a87b00", ink="#000"),
    "CUDA context": Look(letter="C", terminal="color(244)", page="#7d8590", ink="#000"),
    "gradients": Look(letter="G", terminal="color(28)", page="#3f8f3a", ink="#000"),
    "activations": Look(letter="A", terminal="color(31)", page="#168aa5", ink="#000"),
    "logits and loss": Look(letter="L", terminal="color(94)", page="#946e38", ink="#fff"),
    "temporary buffers": Look(letter="T", terminal="color(98)", page="#8a4fc0", ink="#fff"),
}
"""By the part's name. Neighbours differ for people who don't tell red from green, too."""
MOST_GPUS = 3
"""Bars are cut where they need more than so many times the GPU's memory: beyond that, nothing else would be seen."""


def print_training_memory(
    console: Console, methods: Sequence[TrainingMemory | NoEstimate], asked: str, gpu: ChosenGpu | None
) -> None:
    """Full fine-tuning, LoRA and QLoRA side by side against one GPU, where the method `asked` for is to be trained."""
    known = estimated(methods)
    if gpu is not None:
        drawn = console.is_terminal and console.encoding.startswith("utf")
        console.print()
        print_table(console, _parts(known, drawn=drawn))
        console.print()
        print_line(console, f"against a GPU of [bold]{gpu_size(gpu)}[/], {harmless(gpu.reason)}")
        print_table(console, _against(console, known, gpu, asked, drawn=drawn))
        console.print()
        print_table(console, _fits(console, known, gpu))
        for words in excess_words(known):
            print_line(console, words)
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
    kind = "FSDP" if sharding.is_fsdp else f"ZeRO-{sharding.stage}"
    return f"{words}, {kind} on {sharding.gpus:,} GPUs"


def part_names(methods: list[TrainingMemory]) -> list[str]:
    """The parts that any of the methods has, in their order."""
    names = dict.fromkeys(part.name for method in methods for part in method.parts)
    return [name for name in names if any(part_bytes(method, name) for method in methods)]


def part_bytes(method: TrainingMemory, name: str) -> int:
    """The bytes of a part; 0 if the method has none."""
    return sum(part.bytes for part in method.parts if part.name == name)


def gpu_size(gpu: ChosenGpu) -> str:
    """`80 GB`, or `85.03 GB`."""
    gigabytes, rest = divmod(gpu.bytes, 10**9)
    return format_bytes(gpu.bytes) if rest else f"{gigabytes:,} GB"


def bar_scale(methods: Iterable[TrainingMemory], gpu: ChosenGpu) -> int:
    """The bytes that the whole width of a bar stands for: the GPU's line is at the same place in each."""
    return min(max(gpu.bytes, *(method.total for method in methods)), MOST_GPUS * gpu.bytes)


def room_words(method: TrainingMemory, gpu: ChosenGpu) -> str:
    """How much is too much, or free."""
    left = gpu.bytes - method.total
    room = f"{format_bytes(left)} free" if left >= 0 else f"{format_bytes(-left)} too much"
    if method.total > MOST_GPUS * gpu.bytes:
        room += f", {method.total / gpu.bytes:,.1f} times the GPU"
    return room


def moment_words(method: TrainingMemory) -> str:
    """When memory is highest."""
    layer = method.moment.removeprefix(_BACKWARD)
    if layer != method.moment:
        layers = sum(moment.name.startswith(_BACKWARD) for moment in method.moments)
        return f"in the backward pass of layer {int(layer):,} of {layers:,}"
    loss = "at the loss, when all logits exist" if method.all_logits else "at the loss, which is computed in pieces"
    return {
        "loss": loss,
        "end of the backward pass": "at the end of the backward pass, when all gradients exist",
        "optimizer step": "in the optimizer's step",
    }[method.moment]


def summary_rows(methods: list[TrainingMemory]) -> list[tuple[str, list[str]]]:
    """Below the parts: what they add up to, and on which GPU that fits; then the same with gradient checkpointing."""
    rows = [
        ("total", [format_bytes(method.total) for method in methods]),
        ("smallest GPU", [_smallest(method.total) for method in methods]),
    ]
    if any(method.with_checkpointing is not None for method in methods):
        sizes = [method.with_checkpointing for method in methods]
        rows += [
            ("with gradient checkpointing", ["" if size is None else format_bytes(size) for size in sizes]),
            ("smallest GPU then", ["" if size is None else _smallest(size) for size in sizes]),
        ]
    return rows


def _smallest(total: int) -> str:
    from ...loaders.memory.chosen_gpu import smallest_gpu
    from ...loaders.memory.what_fits import GPU_GIGABYTES

    size = smallest_gpu(total)
    return f"> {GPU_GIGABYTES[-1]} GB" if size is None else f"{size} GB"


def what_fits(fit: Fit) -> str:
    """The largest batch and the longest sequence that fit on one GPU, in words.

    They begin with `only` where what was asked for does not fit, and are empty where nothing does.
    """
    batch = f"batch {fit.largest_batch:,}" if fit.largest_batch else ""
    length = f"{fit.largest_length:,} tokens" if fit.largest_length else ""
    words = " or ".join(filter(None, (batch, length)))
    return f"only {words}" if words and not fit.fits else words


def excess_words(methods: Iterable[TrainingMemory]) -> list[str]:
    """What is to blame where a method takes more than the one before it."""
    from ...loaders.memory.training_memory import excesses

    return [
        f"{one.method} takes {format_bytes(one.bytes)} more than {one.other}, for its {one.part}: "
        f"{format_bytes(one.part_bytes)} instead of {format_bytes(one.other_bytes)}"
        for one in excesses(methods)
    ]


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
    for name in part_names(methods):
        look = LOOKS[name]
        mark = Text.assemble((look.letter, f"bold reverse {look.terminal}"), " ") if drawn else Text()
        sizes = (part_bytes(method, name) for method in methods)
        table.add_row(mark + Text(name), *(format_bytes(size) if size else "" for size in sizes))
    for number, (name, values) in enumerate(summary_rows(methods)):
        table.add_row(name, *values, style="" if number % 2 else "bold")
    return table


def _against(console: Console, methods: list[TrainingMemory], gpu: ChosenGpu, asked: str, *, drawn: bool) -> Table:
    """For each method its total beside the GPU's memory: in words, and where it can be drawn, as a bar."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    totals = [format_bytes(method.total) for method in methods]
    widest = max(map(len, totals))
    # what the names, the totals, and the space between leave
    width = min(100, console.width) - max(len(method.method) for method in methods) - widest - 4
    scale = bar_scale(methods, gpu)
    if drawn and width > len(gpu_size(gpu)) + 2:
        begin = memory_bar(methods[0], gpu.bytes, scale, width).plain.index(_LINE)
        label = f"{gpu_size(gpu)} ┐"
        label = label.rjust(begin + 1) if len(label) <= begin + 1 else f"{' ' * begin}┌ {gpu_size(gpu)}"
        table.add_row("", Text(label, "bold", no_wrap=True))
    for method, total in zip(methods, totals, strict=True):
        name = Text(method.method, "bold" if method.method == asked else "")
        words = Text(room_words(method, gpu), "" if method.total <= gpu.bytes else _OVER)
        words.append(f"; peak {moment_words(method)}", "default")
        if drawn and width > len(gpu_size(gpu)) + 2:
            bar = memory_bar(method, gpu.bytes, scale, width)
            table.add_row(name, bar + Text(f"  {total:>{widest}}", no_wrap=True))
            name = Text()
        else:
            words = Text(f"{total}: ") + words
        table.add_row(name, words)
    return table


def memory_bar(method: TrainingMemory, gpu: int, scale: int, width: int) -> Text:
    """A bar of `width` cells for `scale` bytes, one of them the line at the GPU's memory of `gpu` bytes.

    Each part begins with its letter. Beyond the line all is drawn as overflow; a bar that is cut ends with `»`.
    """
    width -= 1
    line = width if scale == gpu else gpu * width // scale
    filled = min(round(method.total / scale * width), width)
    filled = min(filled, line) if method.total <= gpu else max(filled, line + 1)
    cells = [(" ", "")] * width
    begin = total = 0
    for part in method.parts:
        look = LOOKS[part.name]
        total += part.bytes
        end = filled if total == method.total else min(round(total / scale * width), filled)
        for cell in range(begin, end):
            inside = cell < line
            if cell == begin:
                cells[cell] = (look.letter, f"bold reverse {look.terminal}" if inside else f"bold reverse {_OVER}")
            else:
                cells[cell] = ("█", look.terminal) if inside else ("▒", _OVER)
        begin = end
    if method.total > scale:
        cells[-1] = ("»", f"bold {_OVER}")
    return Text.assemble(*cells[:line], (_LINE, "bold"), *cells[line:], no_wrap=True)


def _fits(console: Console, methods: list[TrainingMemory], gpu: ChosenGpu) -> Table:
    """What fits on each GPU: the methods side by side, or below each other where that is too wide for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("fits", justify="right", no_wrap=True)
    for method in methods:
        table.add_column(method.method, no_wrap=True)
    for fits in zip(*(method.fits for method in methods), strict=True):
        table.add_row(_size(fits[0], gpu), *map(_fit_words, fits), style=_row(fits[0], gpu))
    if console.measure(table, options=console.options.update(width=UNBOUNDED)).maximum <= console.width:
        return table
    stacked = Table(box=None, pad_edge=False, show_header=False)
    stacked.add_column(style="bold", no_wrap=True)
    stacked.add_column(justify="right", no_wrap=True)
    stacked.add_column(overflow="fold")
    for method in methods:
        stacked.add_row(method.method, "[bold]fits[/]")
        for fit in method.fits:
            stacked.add_row("", _size(fit, gpu), _fit_words(fit), style=_row(fit, gpu))
    return stacked


def _size(fit: Fit, gpu: ChosenGpu) -> str:
    mark = "* " if fit.gigabytes == gpu.gigabytes else ""
    return f"{mark}{fit.gigabytes} GB"


def _row(fit: Fit, gpu: ChosenGpu) -> str:
    return "bold" if fit.gigabytes == gpu.gigabytes else ""


def _fit_words(fit: Fit) -> Text:
    words = what_fits(fit)
    return Text(f"yes: {words}", "green") if fit.fits else Text(words or "no", "dim")
