"""The table that closes a `prepare`: what was written, what was decided, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import one_line

if TYPE_CHECKING:
    from ..loaders.verify import Verification


def print_summary(report: Mapping[str, Any], directory: str, *, up_to_date: bool) -> None:
    """Print it to stdout, of an earlier run if that is `up_to_date`.

    In a pipe without colours, as wide as it needs to be.
    """
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=160)
    parameters = report["parameters"]
    size = sum(file["bytes"] for file in report["files"])
    console.print(
        f"[bold]{_clean(report['source']['model'])}[/] → [bold]{_clean(directory)}[/] "
        f"({report['strategy']}, {format_bytes(size)})" + (" [bold green]up to date[/]" if up_to_date else ""),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameters", "stored", "tensors", "bytes"):
        table.add_column(column, justify="left" if column == "stored" else "right")
    for dtype, row in parameters["by_dtype"].items():
        table.add_row(f"{row['parameters']:,}", dtype, f"{row['tensors']:,}", format_bytes(row["bytes"]))
    table.add_row(f"{parameters['total']:,}", "total", "", "")
    table.add_row(f"{parameters['trainable']:,}", f"trainable ({parameters['trainable_percent']:.2f} %)", "", "")
    console.print(table)
    details = Table(box=None, pad_edge=False, show_header=False)
    details.add_column(style="bold")
    details.add_column(overflow="fold")
    for name, value in _details(report):
        details.add_row(name, _clean(value))
    console.print(details)
    for decision in report["decisions"]:
        change = _clean(decision["effective"])
        if decision["effective"] != decision["requested"]:
            change = f"{_clean(decision['requested'])} → {change}"
        console.print(
            f"[yellow]decided[/] {_clean(decision['what'])}: {change} ({_clean(decision['reason'])})", soft_wrap=True
        )
    for warning in report["warnings"]:
        console.print(f"[yellow]warning[/] {_clean(warning)}", soft_wrap=True)
    console.print("\nfrom ftload.loaders import load_prepared", soft_wrap=True)
    console.print(f"model, tokenizer = load_prepared({_clean(repr(directory))})", soft_wrap=True)


def print_checks(verification: Verification) -> None:
    """A line for each check, and below it what is wrong."""
    console = Console(highlight=False, emoji=False)
    width = max(len(check.name) for check in verification.checks)
    for check in verification.checks:
        mark = "[green]ok    [/]" if check.ok else "[red]failed[/]"
        console.print(f"{mark} [bold]{check.name:{width}}[/] {_clean(check.found)}".rstrip(), soft_wrap=True)
        for problem in check.problems:
            console.print(f"       {'':{width}} [red]{_clean(problem)}[/]", soft_wrap=True)
    if verification.ok:
        console.print(f"[bold]{_clean(verification.directory)}[/] verifies", soft_wrap=True)


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and downloads are sold: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _details(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    details = []
    rows = report["embeddings"]
    if rows["resized"]:
        details.append(("embeddings", f"{rows['rows_before']:,} → {rows['rows_after']:,} rows ({rows['init']})"))
    quantization = report["quantization"]
    if quantization:
        details.append(
            (
                "4-bit",
                f"{quantization['quant_type']}, double quantisation: {quantization['coverage_percent']:.1f} % of the "
                "weight matrices outside embeddings and head",
            )
        )
    adapter = report["adapter"]
    if adapter:
        targets = ", ".join(f"{name} ×{hits}" for name, hits in adapter["targets"].items())
        details.append(("adapter", f"rank {adapter['r']}, alpha {adapter['alpha']:g}: {targets}"))
        details.append(("base", adapter["base"] + (f" @ {adapter['revision']}" if adapter["revision"] else "")))
    details.append(("attention", report["attention"]["effective"]))
    if report["kernels"]:
        details.append(("liger", ", ".join(report["kernels"]["liger"]["applied"]) or "not supported"))
    timings = report["timings"]
    details.append(("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timings.items())))
    details.append(("memory", f"{format_bytes(report['peak_anonymous_bytes'])} at the peak while writing"))
    return details


def _clean(text: str) -> str:
    """Text from outside, as rich shows it unchanged and a terminal can't be steered by it."""
    return escape(one_line(text))
