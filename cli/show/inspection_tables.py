"""What `ftload inspect` prints for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ...loaders.adapter.in_words import in_words
from .tables import (
    UNBOUNDED,
    format_bytes,
    format_count,
    harmless,
    make_console,
    print_details,
    print_labelled,
    print_line,
    print_table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ...loaders.inspect.comparison import Comparison
    from ...loaders.inspect.inspection import Embeddings, Inspection, Quantization
    from ...loaders.inspect.inventory import StoredTensor
    from ...loaders.inspect.json_facts import AdapterFacts, Architecture, Prepared
    from ...loaders.inspect.tokenizer_facts import TokenizerFacts

_BAR_WIDTH = 12
_SHOWN = 20
"""Differences of a kind that are listed."""


def print_inspection(inspection: Inspection, tensors: tuple[StoredTensor, ...] | None) -> None:
    """Print what was found, or a row for each of `tensors`, to stdout."""
    console = make_console()
    files = inspection.files
    counts = (
        f"{format_count(inspection.total.parameters)} parameters",
        _plural(inspection.total.tensors, "tensor"),
        _plural(len(files), "file"),
        format_bytes(sum(file.bytes for file in files)),
    )
    kind = _kind(inspection)
    print_line(console, f"[bold]{harmless(inspection.model)}[/]" + (f" [dim]{kind}[/]" if kind else ""))
    print_line(console, " · ".join(counts))
    if tensors is not None:
        console.print()
        _print_tensors(console, tensors)
        return
    if inspection.tensors:
        console.print()
        print_table(console, _components(inspection, console))
    known = list(facts(inspection))
    if known:
        console.print()
        print_details(console, known)
    for note in inspection.notes:
        print_labelled(console, "note", note)


def print_comparison(comparison: Comparison) -> None:
    """Print what differs, the first of each kind, to stdout."""
    console = make_console()
    first, second = map(harmless, comparison.models)
    compared = "names, dtypes, shapes" + ("" if comparison.hashed is None else f", contents of {comparison.hashed:,}")
    verdict = "[bold green]equal[/]" if comparison.equal else "[bold red]different[/]"
    print_line(console, f"{verdict} {_plural(comparison.common, 'common tensor')} ({compared})")
    print_line(console, f"[red]-[/] {first}")
    print_line(console, f"[green]+[/] {second}")
    for sign, style, names in zip("-+", ("red", "green"), comparison.only, strict=True):
        if names:
            model = first if sign == "-" else second
            print_line(console, f"\n[bold]{_plural(len(names), 'tensor')} in[/] {model} [bold]alone[/]")
            _print_some(console, (f"[{style}]{sign}[/] {harmless(name)}" for name in names), len(names))
    for what in ("dtype", "shape", "contents"):
        changes = [change for change in comparison.changes if change.what == what]
        if changes:
            console.print(f"\n[bold]{_plural(len(changes), 'tensor')} of another {what}[/]", soft_wrap=True)
            _print_some(
                console,
                (
                    f"{harmless(change.name)}  [red]{_value(change.first)}[/] → [green]{_value(change.second)}[/]"
                    for change in changes
                ),
                len(changes),
            )


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _kind(inspection: Inspection) -> str:
    kind = {"model": "", "file": "one file", "gguf": "GGUF"}.get(inspection.kind, inspection.kind)
    return " ".join(filter(None, (kind, f"@ {inspection.commit}" if inspection.commit else "")))


def _components(inspection: Inspection, console: Console) -> Table:
    """Parameters and bytes by component and dtype; at a terminal with a bar for the share of the bytes."""
    with_bars = console.is_terminal and console.encoding.startswith("utf")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("component", no_wrap=True)
    table.add_column("stored", no_wrap=True)
    for column in ("tensors", "parameters", "bytes", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    if with_bars:
        table.add_column("", no_wrap=True, style="cyan")
    total = inspection.total.bytes
    last = None
    for found in inspection.stored():
        share = found.bytes / total if total else 0
        row = [
            found.component if found.component != last else "",
            found.dtype,
            f"{found.tensors:,}",
            f"{found.parameters:,}",
            format_bytes(found.bytes),
            f"{100 * share:.1f} %",
        ]
        last = found.component
        table.add_row(*row, *((_bar(share),) if with_bars else ()))
    for dtype, found in inspection.by("dtype").items():
        row = ("", dtype, f"{found.tensors:,}", f"{found.parameters:,}", format_bytes(found.bytes))
        table.add_row("total" if dtype == min(inspection.by("dtype")) else "", *row[1:], style="bold")
    return table


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    """What is known beside the tensors, each with its name."""
    if inspection.prepared is not None:
        yield "prepared", _prepared(inspection.prepared)
    if inspection.adapter is not None:
        yield "adapter", _adapter(inspection.adapter)
        kinds = inspection.adapter_kinds()
        if len(kinds) > 1:
            yield "in it", ", ".join(f"{found.parameters:,} {kind}" for kind, found in kinds.items())
        at = f" @ {inspection.adapter.revision}" if inspection.adapter.revision else ""
        yield "base", f"{inspection.adapter.base or 'not named'}{at}"
    if inspection.architecture is not None:
        yield "architecture", _architecture(inspection.architecture)
    if inspection.embeddings is not None:
        yield "embeddings", _embeddings(inspection.embeddings)
    if inspection.quantization is not None:
        yield "quantised", _quantization(inspection.quantization)
    if inspection.tokenizer is not None:
        yield "tokenizer", _tokenizer(inspection.tokenizer)


def _prepared(prepared: Prepared) -> str:
    base = {"reference": ", base elsewhere"}.get(prepared.base, "")
    at = f" @ {prepared.commit}" if prepared.commit else ""
    return f"{prepared.strategy} from {prepared.model}{at} by ftload {prepared.ftload_version}{base}"


def _adapter(adapter: AdapterFacts) -> str:
    parts = (
        adapter.type,
        "" if adapter.r is None else f"rank {adapter.r}",
        *(f"{rank} on {pattern}" for pattern, rank in adapter.ranks.items()),
        "" if adapter.alpha is None else f"alpha {adapter.alpha:g}",
        "" if adapter.dropout is None else f"dropout {adapter.dropout:g}",
        *in_words(adapter.settings),
    )
    return ", ".join(filter(None, parts)) + f": {' '.join((*adapter.targets, *adapter.parameters)) or 'no targets'}"


def _architecture(found: Architecture) -> str:
    def number(value: int | None, words: str) -> str:
        return "" if value is None else words.format(f"{value:,}")

    kind = found.model_type if found.model_type != found.name else None
    names = (found.name or kind or "unknown") + (f" ({kind})" if found.name and kind else "")
    heads = number(found.heads, "{} heads") + number(found.key_value_heads, " ({} for keys and values)")
    experts = number(found.experts, "{} experts") + number(found.experts_per_token, " ({} a token)")
    parts = (
        names,
        number(found.layers, "{} layers"),
        number(found.hidden_size, "hidden {}"),
        number(found.intermediate_size, "inner {}"),
        heads,
        experts,
        number(found.context, "context {}"),
    )
    return ", ".join(filter(None, parts))


def _embeddings(found: Embeddings) -> str:
    return f"{found.rows:,} rows, " + ("a head of its own" if found.head_stored else "tied with the head")


def _quantization(found: Quantization) -> str:
    if found.coverage_percent is None:
        return found.method
    left = ", ".join(f"{component} {format_bytes(group.bytes)}" for component, group in found.not_quantized.items())
    covered = f"{found.coverage_percent:.1f} % of the weight matrices outside embeddings and head are {found.kind}"
    return covered + (f"; not: {left}" if left else "")


def _tokenizer(found: TokenizerFacts) -> str:
    special = (
        f"{name} {token}" if token is not None else f"no {name}"
        for name, token in (("bos", found.bos_token), ("eos", found.eos_token), ("pad", found.pad_token))
    )
    size = "size not known" if found.size is None else f"{found.size:,} tokens"
    return ", ".join((size, *special, "chat template" if found.chat_template else "no chat template"))


def _print_tensors(console: Console, tensors: tuple[StoredTensor, ...]) -> None:
    if not tensors:
        console.print("no tensor matches")
        return
    table = _tensor_table(tensors, with_files=True)
    if console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum > console.width:
        # names matter more than where they lie
        table = _tensor_table(tensors, with_files=False)
    print_table(console, table)


def _tensor_table(tensors: tuple[StoredTensor, ...], *, with_files: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", no_wrap=True, justify="right")
    table.add_column("bytes", no_wrap=True, justify="right")
    if with_files:
        table.add_column("file", no_wrap=True)
    for tensor in tensors:
        row = [harmless(tensor.name), tensor.dtype, _value(tensor.shape), format_bytes(tensor.bytes)]
        table.add_row(*row, *((harmless(tensor.file),) if with_files else ()))
    return table


def _print_some(console: Console, lines: Iterable[str], count: int) -> None:
    for number, line in enumerate(lines):
        if number == _SHOWN:
            console.print(f"[dim]… and {count - _SHOWN:,} more: --json lists all[/]", soft_wrap=True)
            return
        print_line(console, line)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "×".join(map(str, value)) or "scalar"
    return harmless(str(value))[:16]
