"""What commands show in the end: what was or would be written, what was decided, what verifies."""

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
    """Print it to stdout, of an earlier run if that is `up_to_date`."""
    console = _console()
    size = sum(file["bytes"] for file in report["files"])
    console.print(
        f"[bold]{_clean(report['source']['model'])}[/] → [bold]{_clean(directory)}[/] "
        f"({report['strategy']}, {format_bytes(size)})" + (" [bold green]up to date[/]" if up_to_date else ""),
        soft_wrap=True,
    )
    _print_parameters(console, report["parameters"])
    timings = report["timings"]
    _print_details(
        console,
        [
            *_details(report),
            ("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timings.items())),
            ("memory", f"{format_bytes(report['peak_anonymous_bytes'])} at the peak while writing"),
        ],
    )
    _print_notes(console, report)
    console.print("\nfrom ftload.loaders import load_prepared", soft_wrap=True)
    console.print(f"model, tokenizer = load_prepared({_clean(repr(directory))})", soft_wrap=True)


def print_plan(plan: Mapping[str, Any], directory: str) -> None:
    """What would be written, to stdout."""
    console = _console()
    needs, files, parameters = plan["needs"], plan["files"], plan["parameters"]
    console.print(
        f"[bold]{_clean(plan['source']['model'])}[/] → [bold]{_clean(directory)}[/] ({plan['strategy']}, a plan: "
        "nothing is written)",
        soft_wrap=True,
    )
    _print_parameters(console, parameters)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameters", "component", "bytes"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for component, row in parameters["by_component"].items():
        table.add_row(f"{row['parameters']:,}", component, format_bytes(row["bytes"]))
    console.print(table)
    names = f"{files[0]['path']} … {files[-1]['path']}" if len(files) > 2 else ", ".join(f["path"] for f in files)
    in_training = (f"{row['parameters']:,} {dtype}" for dtype, row in parameters["in_training"].items())
    _print_details(
        console,
        [
            ("in training", ", ".join(in_training)),
            *_details(plan),
            ("files", f"{len(files)}: {names}"),
            ("reads", format_bytes(needs["read_bytes"])),
            ("disk", format_bytes(needs["disk_bytes"])),
            ("memory", f"{format_bytes(needs['memory_bytes'])} for tensors, beside interpreter and libraries"),
        ],
    )
    _print_training_memory(console, plan["training_memory"])
    _print_notes(console, plan)


def _print_training_memory(console: Console, methods: list[Mapping[str, Any]]) -> None:
    """Full fine-tuning, LoRA and QLoRA side by side: what fills the memory at its peak, and what fits on which GPU."""
    known = [method for method in methods if "parts" in method]
    if known:
        setting = f"{known[0]['batch_size']} × {known[0]['length']:,} tokens"
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        table.add_column(f"training, {setting}")
        for method in known:
            table.add_column(method["method"], justify="right")
        names = dict.fromkeys(part["name"] for method in known for part in method["parts"])
        for name in names:
            sizes = ({part["name"]: part["bytes"] for part in method["parts"]}.get(name) for method in known)
            table.add_row(name, *("" if size is None else format_bytes(size) for size in sizes))
        table.add_row("total", *(f"[bold]{format_bytes(method['total_bytes'])}[/]" for method in known))
        for row, fit in enumerate(known[0]["fits"]):
            fits = [method["fits"][row] for method in known]
            words = (f"batch {one['largest_batch']}" if one["fits"] else "[dim]no[/]" for one in fits)
            table.add_row(f"fits {fit['gigabytes']} GB", *words)
        console.print(table)
    for method in methods:
        if "reason" in method:
            console.print(f"[dim]{method['method']}: no estimate: {_clean(method['reason'])}[/]", soft_wrap=True)


def _console() -> Console:
    """Stdout; in a pipe without colours, as wide as it needs to be."""
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=160)


def _print_parameters(console: Console, parameters: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameters", "stored", "tensors", "bytes"):
        table.add_column(column, justify="left" if column == "stored" else "right")
    for dtype, row in parameters["by_dtype"].items():
        table.add_row(f"{row['parameters']:,}", dtype, f"{row['tensors']:,}", format_bytes(row["bytes"]))
    table.add_row(f"{parameters['total']:,}", "total", "", "")
    table.add_row(f"{parameters['trainable']:,}", f"trainable ({parameters['trainable_percent']:.2f} %)", "", "")
    console.print(table)


def _print_details(console: Console, details: list[tuple[str, str]]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in details:
        table.add_row(name, _clean(value))
    console.print(table)


def _print_notes(console: Console, report: Mapping[str, Any]) -> None:
    for decision in report["decisions"]:
        change = _clean(decision["effective"])
        if decision["effective"] != decision["requested"]:
            change = f"{_clean(decision['requested'])} → {change}"
        console.print(
            f"[yellow]decided[/] {_clean(decision['what'])}: {change} ({_clean(decision['reason'])})", soft_wrap=True
        )
    for warning in report["warnings"]:
        console.print(f"[yellow]warning[/] {_clean(warning)}", soft_wrap=True)


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
    return details


def _clean(text: str) -> str:
    """Text from outside, as rich shows it unchanged and a terminal can't be steered by it."""
    return escape(one_line(text))
