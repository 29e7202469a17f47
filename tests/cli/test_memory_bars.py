"""What `plan` shows of training memory: bars on one scale against a GPU, its moment in words, and in which colours."""

from __future__ import annotations

import io
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from ftload.cli.show import memory_tables
from ftload.cli.show.memory_tables import (
    LOOKS,
    bar_scale,
    memory_bar,
    moment_words,
    print_training_memory,
    room_words,
    summary_rows,
)
from ftload.loaders.memory import chosen_gpu
from ftload.loaders.memory.chosen_gpu import ChosenGpu, choose_gpu
from ftload.loaders.memory.estimate import compare_methods
from ftload.loaders.memory.training_memory import NoEstimate, TrainingMemory
from rich.color import Color, ColorSystem
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from ..loaders.memories import LAYERS, MOMENTS, training_memory
from ..loaders.plans import make_plan

GB = 10**9
PARTS = {
    "weights": 16 * GB, "adapter": GB, "optimizer states": 2 * GB, "CUDA context": 600_000_000,
    "gradients": GB, "activations": 30 * GB, "logits and loss": 12 * GB, "temporary buffers": 400_000_000,
}  # fmt: skip
WARNING = Color.parse("red").get_truecolor(SVG_EXPORT_THEME)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_gpu, "first_gpu", lambda: None)


def of_size(gigabytes: float, method: str = "full", **more: str) -> TrainingMemory:
    """An estimate of this total, in the proportions of `PARTS`."""
    whole = sum(PARTS.values())
    parts = {name: int(size / whole * gigabytes * GB) for name, size in PARTS.items()}
    parts["weights"] += round(gigabytes * GB) - sum(parts.values())
    return training_memory(method, parts, **more)


def a_gpu(size: int) -> ChosenGpu:
    return ChosenGpu(bytes=size, gigabytes=None, reason="the one of --fit")


def lengths(bar: str) -> dict[str, int]:
    """Cells of each part, by its letter; of the line none."""
    return {cells[0]: len(cells) for cells in re.findall(r"[A-Z][█▒]*", bar.replace("│", ""))}


def test_the_parts_of_a_bar_are_as_long_as_their_bytes() -> None:
    method = training_memory("full", PARTS)  # 63 GB
    bar = memory_bar(method, 80 * GB, 80 * GB, 81).plain
    assert len(bar) == 81
    assert bar.index("│") == 80
    assert lengths(bar) == {"W": 16, "D": 1, "O": 2, "C": 1, "G": 1, "A": 30, "L": 12}
    assert bar[:63].count(" ") == 0
    assert bar[63:] == " " * 17 + "│"
    # against 48 GB on the scale of a larger one, 16 are too much
    bar = memory_bar(method, 48 * GB, 96 * GB, 97).plain
    assert bar.index("│") == 48
    assert lengths(bar) == {"W": 16, "D": 1, "O": 2, "C": 1, "G": 1, "A": 30, "L": 12}
    assert bar[49:] == "▒▒▒" + "L" + "▒" * 11 + " " * 33


def test_bars_of_any_sizes_keep_to_the_scale() -> None:
    choose = random.Random(17)
    for _ in range(2000):
        gpu = choose.choice((16, 24, 80, 192)) * GB
        parts = {name: choose.choice((0, choose.randrange(10**6), choose.randrange(2 * gpu))) for name in PARTS}
        methods = [training_memory("full", parts), of_size(choose.uniform(0.1, 500))]
        scale, width = bar_scale(methods, a_gpu(gpu)), choose.randrange(10, 101)
        assert gpu <= scale <= 3 * gpu
        lines = set()
        for method in methods:
            bar = memory_bar(method, gpu, scale, width)
            assert len(bar.plain) == width
            before, after = bar.plain.split("│")
            lines.add(len(before))
            cell = scale / (width - 1)
            assert abs(len(before) * cell - gpu) <= cell
            assert "▒" not in before
            assert "█" not in after
            if method.total > scale:
                assert (before + after)[-1] == "»"
                continue
            drawn = sum(not character.isspace() for character in before + after)
            assert abs(drawn * cell - method.total) <= cell
            assert bool(after.strip()) == (method.total > gpu)  # by however little
            assert not after.strip() or not before.endswith(" ")
            sizes = {LOOKS[part.name].letter: part.bytes for part in method.parts}
            for letter, cells in lengths(bar.plain).items():
                assert abs(cells * cell - sizes[letter]) <= 2 * cell  # one at each end
        assert len(lines) == 1  # the line is at the same place in all


@pytest.mark.parametrize(("total", "over"), [(80 * GB, False), (80 * GB + 1, True)])
def test_one_byte_too_much_is_seen(total: int, over: bool) -> None:
    method = training_memory("full", {"weights": total})
    gpu = a_gpu(80 * GB)
    bar = memory_bar(method, gpu.bytes, bar_scale([method], gpu), 61).plain
    assert bar == ("W" + "█" * 58 + "│▒" if over else "W" + "█" * 59 + "│")
    assert room_words(method, gpu) == ("1 B too much" if over else "0 B free")


def test_what_would_need_many_gpus_is_cut_and_says_so() -> None:
    small, large = of_size(20, "qlora"), of_size(500, "full")
    gpu = a_gpu(24 * GB)
    scale = bar_scale([small, large], gpu)
    assert scale == 72 * GB
    bars = [memory_bar(method, gpu.bytes, scale, 73).plain for method in (small, large)]
    assert [bar.index("│") for bar in bars] == [24, 24]
    assert bars[0].split("│")[0].endswith("█    ")
    assert bars[1].endswith("▒»")
    assert room_words(large, gpu) == "476.00 GB too much, 20.8 times the GPU"
    assert room_words(small, gpu) == "4.00 GB free"


def colours(bar: Text) -> list[str]:
    """Of each cell."""
    found = [""] * len(bar.plain)
    for span in bar.spans:
        found[span.start : span.end] = [str(span.style)] * (span.end - span.start)
    return found


def test_red_is_for_overflow_alone() -> None:
    bar = memory_bar(of_size(60), 48 * GB, 60 * GB, 61)
    line = bar.plain.index("│")
    styles = colours(bar)
    assert not any("red" in style for style in styles[: line + 1])
    assert all("red" in style for style in styles[line + 1 :])
    for name, look in LOOKS.items():
        sixteen = Color.parse(look.terminal).downgrade(ColorSystem.STANDARD)
        assert sixteen.number not in (1, 9), f"{name} is red on a terminal of 16 colours"
        for colour in (Color.parse(look.terminal), Color.parse(look.page)):
            red, green, blue = colour.get_truecolor()
            assert red < 1.6 * green or red < blue + 40, name


# Machado, Oliveira, Fernandes (2009): how colours are seen without the cones for red, and without those for green.
SIGHTS = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "without red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "without green": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881),
    ),
}  # fmt: skip


def linear(colour: str) -> list[float]:
    values = [value / 255 for value in Color.parse(colour).get_truecolor()]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def contrast(one: str, other: str) -> float:
    """That of WCAG 2.1."""
    lights = sorted(
        sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True)) + 0.05
        for colour in (one, other)
    )
    return lights[1] / lights[0]


def lab(colour: str, sight: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """CIE L*a*b* of a colour as it is seen."""
    r, g, b = (sum(map(float.__mul__, map(float, row), linear(colour))) for row in sight)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
    )
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("place", ["terminal", "page"])
@pytest.mark.parametrize("sight", SIGHTS)
def test_neighbours_are_told_apart_by_whoever_sees_them(place: str, sight: str) -> None:
    seen = [(look.letter, lab(getattr(look, place), SIGHTS[sight])) for look in LOOKS.values()]
    # an adapter is not always there, nor is anything that only some moments have
    orders = ["WDOCGALT", "WOCALT", "WOCGAT", "WDOCAT", "WOCGT", "WDOCLT"]
    pairs = {pair for order in orders for pair in itertools.pairwise(order)}
    known = dict(seen)
    for one, other in pairs:
        assert math.dist(known[one], known[other]) >= 12, f"{one} {other}"


def test_colours_are_seen_on_light_and_dark() -> None:
    assert len({look.letter for look in LOOKS.values()}) == len(LOOKS)
    for look in LOOKS.values():
        assert min(contrast(look.page, "#ffffff"), contrast(look.page, "#1b2027")) >= 3
        assert min(contrast(look.terminal, "#ffffff"), contrast(look.terminal, "#000000")) >= 3
        assert contrast(look.ink + look.ink[1:], look.page) >= 4.5


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        ("loss", "at the loss, when all logits exist"),
        ("backward pass of layer 3", "in the backward pass of layer 3 of 4"),
        ("end of the backward pass", "at the end of the backward pass, when all gradients exist"),
        ("optimizer step", "in the optimizer's step"),
    ],
)
def test_when_that_is_in_words(moment: str, words: str) -> None:
    assert moment_words(of_size(20, moment=moment)) == words


def test_a_loss_in_pieces_has_no_moment_when_all_logits_exist() -> None:
    assert moment_words(training_memory("full", PARTS, all_logits=False)) == "at the loss, which is computed in pieces"


@pytest.mark.parametrize("flags", [[], ["--use_liger_kernel"]], ids=" ".join)
def test_every_moment_and_part_of_an_estimate_is_known(llama: Path, tmp_path: Path, flags: list[str]) -> None:
    methods = compare_methods(*make_plan(llama, tmp_path, "--max_seq_length", "32", *flags))
    for method in methods:
        assert isinstance(method, TrainingMemory)
        assert {part.name for part in method.parts} <= LOOKS.keys()
        words = [moment_words(replace(method, moment=moment.name)) for moment in method.moments]
        assert len(set(words)) == len(words) >= LAYERS
        assert words[0] == (
            # Open Instruct puts none of Liger's kernels on a 4-bit base
            "at the loss, which is computed in pieces"
            if flags and method.method != "qlora"
            else "at the loss, when all logits exist"
        )
    assert len(MOMENTS) == LAYERS + 3


def shown(
    methods: Sequence[TrainingMemory | NoEstimate],
    width: int,
    *,
    gpu: ChosenGpu | None = None,
    encoding: str = "utf-8",
    terminal: bool = True,
) -> str:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, errors="replace")
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False, emoji=False)
    print_training_memory(console, methods, "qlora", gpu or choose_gpu(methods, "qlora"))
    file.flush()
    return re.sub(" +\n", "\n", buffer.getvalue().decode(encoding))


THREE = [
    training_memory("full", {**PARTS, "adapter": 0, "optimizer states": 64 * GB}, with_checkpointing=90 * GB),
    training_memory("lora", PARTS, moment="backward pass of layer 4", with_checkpointing=70 * GB),
    training_memory("qlora", {**PARTS, "weights": 5 * GB}, moment="optimizer step"),
]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = shown(THREE, width).splitlines()
    assert max(map(len, lines)) <= width
    bars = {line.split()[0]: line for line in lines if "█" in line}
    assert list(bars) == ["full", "lora", "qlora"]
    at = {line.index("│") for line in bars.values()}
    (ruler,) = [line for line in lines if line.endswith("80 GB ┐")]
    assert at == {ruler.index("┐")}
    assert [("▒" in bar, bar.split("  ")[-1].strip()) for bar in bars.values()] == [
        (True, "124.00 GB"), (False, "63.00 GB"), (False, "52.00 GB"),
    ]  # fmt: skip
    ends = {line.index("GB") for line in lines if re.search(r"^(?:total|smallest GPU|with gradient)", line)}
    assert len(ends) == 1  # numbers end at the same column


def test_what_is_said_at_80_columns() -> None:
    lines = shown(THREE, 80).splitlines()
    expected = """
training, 8 × 4,096 tokens        full       lora      qlora
W weights                     16.00 GB   16.00 GB    5.00 GB
D adapter                                 1.00 GB    1.00 GB
O optimizer states            64.00 GB    2.00 GB    2.00 GB
C CUDA context               600.00 MB  600.00 MB  600.00 MB
G gradients                    1.00 GB    1.00 GB    1.00 GB
A activations                 30.00 GB   30.00 GB   30.00 GB
L logits and loss             12.00 GB   12.00 GB   12.00 GB
T temporary buffers          400.00 MB  400.00 MB  400.00 MB
total                        124.00 GB   63.00 GB   52.00 GB
smallest GPU                    141 GB      80 GB      80 GB
with gradient checkpointing   90.00 GB   70.00 GB
smallest GPU then                96 GB      80 GB

against a GPU of 80 GB, the smallest here on which qlora fits
                                        80 GB ┐
full   W███████O██████████████████████████████│CA▒▒▒▒▒▒▒▒▒▒▒▒▒▒L▒▒▒▒▒  124.00 GB
       44.00 GB too much; peak at the loss, when all logits exist
lora   W███████OCA██████████████L█████        │                         63.00 GB
       17.00 GB free; peak in the backward pass of layer 4 of 4
qlora  W█DOGA█████████████L█████T             │                         52.00 GB
       28.00 GB free; peak in the optimizer's step
"""
    assert lines[: len(expected.splitlines())] == expected.splitlines()


@pytest.mark.parametrize(("encoding", "terminal"), [("ascii", True), ("utf-8", False), ("latin-1", True)])
def test_where_nothing_can_be_drawn_all_is_said(encoding: str, terminal: bool) -> None:
    text = shown(THREE, 100, encoding=encoding, terminal=terminal)
    assert not set("█▒│┐┌»") & set(text)
    assert "W weights" not in text
    assert "full   124.00 GB: 44.00 GB too much; peak at the loss, when all logits exist\n" in re.sub(
        " +\n", "\n", text
    )
    assert "lora   63.00 GB: 17.00 GB free; peak in the backward pass of layer 4 of 4\n" in re.sub(" +\n", "\n", text)


def test_the_chosen_gpu_is_marked_among_those_that_fit() -> None:
    for width in (80, 200):
        marked = [line.split() for line in shown(THREE, width).splitlines() if "* " in line]
        assert all(line[1:3] == ["80", "GB"] for line in marked)
        assert len(marked) == (3 if width == 80 else 1)


def test_what_gradient_checkpointing_alone_would_do() -> None:
    assert summary_rows(THREE) == [
        ("total", ["124.00 GB", "63.00 GB", "52.00 GB"]),
        ("smallest GPU", ["141 GB", "80 GB", "80 GB"]),
        ("with gradient checkpointing", ["90.00 GB", "70.00 GB", ""]),
        ("smallest GPU then", ["96 GB", "80 GB", ""]),
    ]
    assert [name for name, _ in summary_rows([THREE[2]])] == ["total", "smallest GPU"]
    assert summary_rows([of_size(300)])[1] == ("smallest GPU", ["> 192 GB"])


def test_a_gpu_of_this_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_gpu, "first_gpu", lambda: ("[red]Tesla T4", 15_835_660_288))
    text = shown(THREE, 120)
    assert "against a GPU of 15.84 GB, the GPU of this machine: [red]Tesla T4\n" in text
    assert "* 16 GB" in text
    assert memory_tables.MOST_GPUS == 3
    assert text.count("»") == 3


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (1, "1 B"),
        (999_999_999, "1000.00 MB"),
        (GB, "1 GB"),
        (24 * GB, "24 GB"),
        (85_030_000_000, "85.03 GB"),
        (9 * 10**21, "9,000,000,000,000 GB"),
    ],
)
def test_a_gpu_of_any_size_is_drawn(size: int, said: str) -> None:
    text = shown(THREE, 80, gpu=a_gpu(size))
    assert f"against a GPU of {said}, the one of --fit\n" in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(
        line.count("│") == 1 for line in lines if line.startswith(("full  ", "lora  ", "qlora  ")) and "│" in line
    )
    assert "* " not in text  # none of those in the table


def test_nothing_is_drawn_of_what_is_not_known() -> None:
    unknown = NoEstimate(method="qlora", reason="its training step can't be simulated: [bold]x")
    text = shown([unknown], 80)
    assert text == "qlora: no estimate: its training step can't be simulated: [bold]x\n"
