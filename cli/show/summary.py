"""What commands show in the end: what was or would be written, what was decided, what verifies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from ...loaders.adapter.in_words import in_words
from .advice_tables import print_advice
from .memory_tables import print_training_memory
from .tables import format_bytes, harmless, make_console, print_details, print_labelled, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ...loaders.decision import Decision
    from ...loaders.fuse import FusedAdapter
    from ...loaders.memory.chosen_gpu import ChosenGpu
    from ...loaders.prepare import Outcome, PlanOutcome
    from ...loaders.recipe.recipe import Recipe
    from ...loaders.report.document import Described, Parameters, PlanDocument, PlannedFile, WrittenFile
    from ...loaders.report.rebased import Rebased
    from ...loaders.verify.verify import Verification

_SHOWN_TARGETS = 16
"""An adapter of whole names has one for each layer."""


def print_summary(outcome: Outcome, directory: str) -> None:
    """What was written, by this run or by an earlier one, to stdout."""
    console = make_console()
    report = outcome.report
    print_line(
        console,
        f"[bold]{harmless(report.source.model)}[/] → [bold]{harmless(directory)}[/] "
        f"({report.strategy}, {format_bytes(weight_bytes(report.files))})"
        + (" [bold green]up to date[/]" if outcome.up_to_date else "")
        + (", its report rewritten" if outcome.recorded else ""),
    )
    _print_parameters(console, report.parameters)
    told = [
        *details(report),
        ("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.timings.items())),
        ("memory", f"{format_bytes(report.peak_anonymous_bytes)} at the peak while writing"),
    ]
    if report.ranges is not None:
        proven = f"files with the hub's sha256: {len(report.ranges.compared)}"
        told.append(("by ranges", f"{format_bytes(report.ranges.bytes)}, {proven}"))
    print_details(console, told)
    _print_notes(console, report)
    for flag, (old, new) in outcome.recorded.items():
        print_labelled(console, "recorded", f"{flag}: {old} → {new}")
    adapter = report.adapter
    if adapter is not None and report.base == "reference":
        at = f" @ {adapter.revision}" if adapter.revision else ""
        console.print("\n[bold]for tools that take a model's directory[/]")
        told = [("model", adapter.base + at), ("adapter", f"{directory}/adapter"), ("tokenizer", directory)]
        print_details(console, told)
    console.print("\nfrom ftload import load_prepared", soft_wrap=True)
    console.print(f"model, tokenizer = load_prepared({harmless(repr(directory))})", soft_wrap=True)


def print_plan(outcome: PlanOutcome, directory: str) -> None:
    """What would be written, to stdout."""
    console, plan = make_console(), outcome.plan
    print_line(
        console,
        f"[bold]{harmless(plan.source.model)}[/] → [bold]{harmless(directory)}[/] "
        f"({plan.strategy}, {format_bytes(weight_bytes(plan.files))}, a plan: nothing is written)",
    )
    _print_parameters(console, plan.parameters)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameters", "component", "stored", "bytes"):
        table.add_column(column, justify="left" if column in ("component", "stored") else "right")
    for row in plan.stored:
        table.add_row(f"{row.parameters:,}", row.component, row.dtype, format_bytes(row.bytes))
    console.print()
    print_table(console, table)
    console.print()
    paths = [file.path for file in plan.files]
    names = f"{paths[0]} … {paths[-1]}" if len(paths) > 2 else ", ".join(paths)
    print_details(
        console,
        [
            ("in training", in_training(plan.parameters)),
            *details(plan),
            ("files", f"{len(paths)}: {names}"),
            *((name, format_bytes(size) + note) for name, size, note in needs(plan)),
        ],
    )
    print_training_memory(console, outcome.training_memory, trained_method(plan), drawn_gpu(outcome))
    _print_notes(console, plan)
    print_advice(console, outcome.advice)


def _print_parameters(console: Console, parameters: Parameters) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameters", "stored", "tensors", "bytes"):
        table.add_column(column, justify="left" if column == "stored" else "right")
    for dtype, row in parameters.by_dtype.items():
        table.add_row(f"{row.parameters:,}", dtype, f"{row.tensors:,}", format_bytes(row.bytes))
    table.add_row(f"{parameters.total:,}", "total", "", "")
    table.add_row(f"{parameters.trainable:,}", f"trainable ({parameters.trainable_percent:.2f} %)", "", "")
    print_table(console, table)


def _print_notes(console: Console, report: Described) -> None:
    for decision in report.decisions:
        print_labelled(console, "decided", decision_words(decision))
    for warning in report.warnings:
        print_labelled(console, "warning", warning)


def print_fused(fused: FusedAdapter) -> None:
    """What was written, and how PEFT loads it."""
    console = make_console()
    at = f" @ {fused.revision}" if fused.revision else ""
    targets = ", ".join(f"{name} ×{count}" for name, count in fused.target_parameters.items())
    print_line(
        console,
        f"[bold]{harmless(fused.directory)}[/]: {fused.parameters:,} parameters in {fused.tensors:,} tensors, for "
        f"{harmless(fused.base + at)}: {harmless(targets)}",
    )


def print_recipe(recipe: Recipe) -> None:
    """Where it was written, how it is run, and what must be known before."""
    console = make_console()
    console.print(f"[bold]{harmless(recipe.file)}[/]: {harmless(recipe.launch)}", soft_wrap=True)
    for note in recipe.notes:
        print_labelled(console, "note", note)


def print_checks(verification: Verification, rebased: Rebased | None) -> None:
    """A line for what was fixed and one for each check, and below it what is wrong."""
    console = make_console()
    if rebased is not None:
        change = f"the adapter's base: {rebased.before} → {rebased.after} ({', '.join(rebased.files)})"
        print_labelled(console, "fixed ", change)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=len("failed"))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in verification.checks:
        table.add_row("[green]ok[/]" if check.ok else "[red]failed[/]", check.name, harmless(check.found))
        for problem in check.problems:
            table.add_row("", "", f"[red]{harmless(problem)}[/]")
        for note in check.notes:
            table.add_row("", "", f"[yellow]note[/] {harmless(note)}")
    print_table(console, table)
    if verification.ok:
        print_line(console, f"[bold]{harmless(verification.directory)}[/] verifies")


def needs(plan: PlanDocument) -> tuple[tuple[str, int, str], ...]:
    """What preparing takes: name, bytes, and a note."""
    return (
        ("reads", plan.needs.read_bytes, ""),
        ("disk", plan.needs.disk_bytes, " for weights, beside the tokenizer"),
        *_cache_needs(plan),
        ("memory", plan.needs.memory_bytes, " for tensors, beside interpreter and libraries"),
    )


def _cache_needs(plan: PlanDocument) -> Iterator[tuple[str, int, str]]:
    """What the source takes in the hub's cache, with either value of `--source_cache`."""
    cache, fetched, there = plan.source.cache, plan.needs.fetch_bytes, plan.needs.cached_bytes
    if cache is None:
        return
    has = f", which has {format_bytes(there)}" if there else ""
    if not fetched:
        yield "cache", 0, f" more in the hub's cache{has}: all that is read"
    elif cache == "none":
        yield "cache", 0, f" more in the hub's cache{has}; {format_bytes(fetched)} with --source_cache hub"
    else:
        yield "cache", fetched, f" more in the hub's cache{has}; 0 with --source_cache none"


def weight_bytes(files: Iterable[WrittenFile | PlannedFile]) -> int:
    """The size of an output: what its files of weights take, the adapter's too, as `inspect` counts them."""
    return sum(file.bytes for file in files if file.path.endswith(".safetensors"))


def decision_words(decision: Decision) -> str:
    """What was decided, and why: of a report or a plan."""
    return f"{decision.news} – {decision.reason}"


def trained_method(plan: PlanDocument) -> str:
    """The way of training that was asked for, by the name that its estimate of memory has."""
    return plan.strategy if plan.adapter is not None else "full"


def drawn_gpu(outcome: PlanOutcome) -> ChosenGpu | None:
    """The GPU that training memory is drawn against; None if there is no estimate of it."""
    from ...loaders.memory.chosen_gpu import choose_gpu

    return choose_gpu(outcome.training_memory, trained_method(outcome.plan), outcome.advice)


def in_training(parameters: Parameters) -> str:
    """Parameters by the dtype that they have while training."""
    return ", ".join(f"{row.parameters:,} {dtype}" for dtype, row in parameters.in_training.items())


def details(report: Described) -> list[tuple[str, str]]:
    """What was done to the model, each with its name: of a report or a plan."""
    details = []
    packed: dict[str, int] = {}
    for row in report.source.stored or ():
        if row.format is not None:
            packed[row.format] = packed.get(row.format, 0) + row.parameters
    for name, parameters in packed.items():
        details.append(("source", f"{parameters:,} parameters stored as {name}"))
    rows = report.embeddings
    if rows.resized:
        details.append(("embeddings", f"{rows.rows_before:,} → {rows.rows_after:,} rows ({rows.init})"))
    quantization = report.quantization
    if quantization:
        details.append(
            (
                "4-bit",
                f"{quantization.quant_type}, {'double' if quantization.double_quant else 'single'} quantisation: "
                f"{quantization.coverage_percent:.1f} % of the "
                "weight matrices outside embeddings and head",
            )
        )
    adapter = report.adapter
    if adapter:
        hits = [*adapter.targets.items(), *adapter.target_parameters.items()]
        targets = ", ".join(f"{name} ×{layers}" for name, layers in hits[:_SHOWN_TARGETS])
        if len(hits) > _SHOWN_TARGETS:
            targets += f" … and {len(hits) - _SHOWN_TARGETS:,} more"
        experts = "" if adapter.experts_r is None else f", of experts {adapter.experts_r}"
        settings = "".join(f", {words}" for words in in_words(adapter.settings))
        details.append(("adapter", f"rank {adapter.r}{experts}, alpha {adapter.alpha:g}{settings}: {targets}"))
        at = f" @ {adapter.revision}" if adapter.revision else ""
        scanned = " (left where it is, its values not scanned)" if report.base_scanned is False else ""
        changed = ", without what the adapter starts from" if adapter.changes_base else ""
        details.append(("base", f"{adapter.base}{at}{scanned}{changed}"))
    details.append(("attention", report.attention.effective))
    if report.kernels:
        details.append(("liger", ", ".join(report.kernels.liger.applied) or "not supported"))
    return details
