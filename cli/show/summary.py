"""What commands show in the end: what was or would be written, what was decided, what verifies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .memory_tables import print_training_memory
from .tables import format_bytes, harmless, make_console, print_details, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ...loaders.prepare import Outcome
    from ...loaders.verify.verify import Verification


NEEDS = (
    ("reads", "read", ""),
    ("disk", "disk", ""),
    ("memory", "memory", " for tensors, beside interpreter and libraries"),
)
"""What preparing takes: name, key in the plan, and a note."""


def print_summary(outcome: Outcome, directory: str) -> None:
    """What was written, by this run or by an earlier one, to stdout."""
    console = make_console()
    report = outcome.report
    size = sum(file["bytes"] for file in report["files"])
    console.print(
        f"[bold]{harmless(report['source']['model'])}[/] → [bold]{harmless(directory)}[/] "
        f"({report['strategy']}, {format_bytes(size)})"
        + (" [bold green]up to date[/]" if outcome.up_to_date else "")
        + (", its report rewritten" if outcome.recorded else ""),
        soft_wrap=True,
    )
    _print_parameters(console, report["parameters"])
    timings = report["timings"]
    print_details(
        console,
        [
            *details(report),
            ("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timings.items())),
            ("memory", f"{format_bytes(report['peak_anonymous_bytes'])} at the peak while writing"),
        ],
    )
    _print_notes(console, report)
    for flag, (old, new) in outcome.recorded.items():
        console.print(f"[yellow]recorded[/] {harmless(f'{flag}: {old} → {new}')}", soft_wrap=True)
    console.print("\nfrom ftload.loaders import load_prepared", soft_wrap=True)
    console.print(f"model, tokenizer = load_prepared({harmless(repr(directory))})", soft_wrap=True)


def print_plan(plan: Mapping[str, Any], directory: str) -> None:
    """What would be written, to stdout."""
    console = make_console()
    needs, files, parameters = plan["needs"], plan["files"], plan["parameters"]
    console.print(
        f"[bold]{harmless(plan['source']['model'])}[/] → [bold]{harmless(directory)}[/] ({plan['strategy']}, a plan: "
        "nothing is written)",
        soft_wrap=True,
    )
    _print_parameters(console, parameters)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameters", "component", "stored", "bytes"):
        table.add_column(column, justify="left" if column in ("component", "stored") else "right")
    for row in plan["stored"]:
        table.add_row(f"{row['parameters']:,}", row["component"], row["dtype"], format_bytes(row["bytes"]))
    console.print()
    print_table(console, table)
    console.print()
    names = f"{files[0]['path']} … {files[-1]['path']}" if len(files) > 2 else ", ".join(f["path"] for f in files)
    print_details(
        console,
        [
            ("in training", in_training(parameters)),
            *details(plan),
            ("files", f"{len(files)}: {names}"),
            *((name, format_bytes(needs[f"{key}_bytes"]) + note) for name, key, note in NEEDS),
        ],
    )
    print_training_memory(console, plan["training_memory"])
    _print_notes(console, plan)


def _print_parameters(console: Console, parameters: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameters", "stored", "tensors", "bytes"):
        table.add_column(column, justify="left" if column == "stored" else "right")
    for dtype, row in parameters["by_dtype"].items():
        table.add_row(f"{row['parameters']:,}", dtype, f"{row['tensors']:,}", format_bytes(row["bytes"]))
    table.add_row(f"{parameters['total']:,}", "total", "", "")
    table.add_row(f"{parameters['trainable']:,}", f"trainable ({parameters['trainable_percent']:.2f} %)", "", "")
    print_table(console, table)


def _print_notes(console: Console, report: Mapping[str, Any]) -> None:
    for decision in report["decisions"]:
        console.print(f"[yellow]decided[/] {harmless(decision_words(decision))}", soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"[yellow]warning[/] {harmless(warning)}", soft_wrap=True)


def print_checks(verification: Verification) -> None:
    """A line for each check, and below it what is wrong."""
    console = make_console()
    width = max(len(check.name) for check in verification.checks)
    for check in verification.checks:
        mark = "[green]ok    [/]" if check.ok else "[red]failed[/]"
        console.print(f"{mark} [bold]{check.name:{width}}[/] {harmless(check.found)}".rstrip(), soft_wrap=True)
        for problem in check.problems:
            console.print(f"       {'':{width}} [red]{harmless(problem)}[/]", soft_wrap=True)
    if verification.ok:
        console.print(f"[bold]{harmless(verification.directory)}[/] verifies", soft_wrap=True)


def decision_words(decision: Mapping[str, Any]) -> str:
    """What was decided, and why: of a report or a plan."""
    change = decision["effective"]
    if change != decision["requested"]:
        change = f"{decision['requested']} → {change}"
    return f"{decision['what']}: {change} ({decision['reason']})"


def in_training(parameters: Mapping[str, Any]) -> str:
    """Parameters by the dtype that they have while training."""
    return ", ".join(f"{row['parameters']:,} {dtype}" for dtype, row in parameters["in_training"].items())


def details(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was done to the model, each with its name: of a report or a plan."""
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
        at = f" @ {adapter['revision']}" if adapter["revision"] else ""
        scanned = "" if report["base_scanned"] else " (left where it is, its values not scanned)"
        details.append(("base", f"{adapter['base']}{at}{scanned}"))
    details.append(("attention", report["attention"]["effective"]))
    if report["kernels"]:
        details.append(("liger", ", ".join(report["kernels"]["liger"]["applied"]) or "not supported"))
    return details
