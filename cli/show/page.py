"""`--html`: what `plan` and `inspect` show, as one page that needs neither scripts nor a network."""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...loaders.errors import OutputError, UsageError
from ...loaders.system.durable import disk_errors
from ...loaders.system.safe_text import one_line
from .advice_tables import advice_rows
from .inspection_tables import facts
from .memory_tables import (
    LOOKS,
    bar_scale,
    estimated,
    excess_words,
    gpu_size,
    how_to_read,
    moment_words,
    origins,
    part_bytes,
    part_names,
    room_words,
    setting,
    summary_rows,
    what_fits,
    without_estimate,
)
from .summary import decision_words, details, drawn_gpu, in_training, needs, trained_method, weight_bytes
from .tables import format_bytes, format_count
from .treemap import Rectangle, squarify

if TYPE_CHECKING:
    from ...loaders.inspect.inspection import Inspection
    from ...loaders.inspect.inventory import StoredTensor
    from ...loaders.memory.chosen_gpu import ChosenGpu
    from ...loaders.memory.training_memory import TrainingMemory
    from ...loaders.prepare import PlanOutcome
    from ...loaders.report.document import StoredTotals

_BEGINNING = b"<!doctype html>\n<!-- a page of ftload -->"
_PLANE = Rectangle(0, 0, 100, 44)
"""Of the treemap: its sides are in percent of the page's width."""
_COLOURS = 8
"""In the page's palette."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    title: str
    columns: tuple[str, ...]
    """A name that begins with `#` heads a column of numbers."""
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cell:
    """One component in one dtype, in percent of the treemap's sides."""

    component: str
    dtype: str
    colour: int
    parameters: int
    bytes: int
    share: float
    place: Rectangle


def check_place(name: str) -> None:
    """Raise unless a page can be written to this file, which may be new, empty, or an earlier page."""
    if name in ("", "-"):
        raise UsageError("`--html` needs the name of a file")
    path = Path(name)
    with _place_errors(path):
        try:
            is_file = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise OutputError(f"can't write `{path}`: its directory does not exist") from None
            return
        # opening a pipe would block; a device or a link would be replaced by a file
        if not is_file or _first_bytes(path) not in (_BEGINNING, b""):
            raise OutputError(f"`{path}` exists and is not a page of ftload's")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_BEGINNING))


def write_page(name: str, page: str) -> None:
    """Write the page as a whole or not at all."""
    path = Path(name)
    part = path.with_name(f".ftload-{secrets.token_hex(8)}")
    with _place_errors(path):
        try:
            with part.open("x", encoding="utf-8") as file:
                file.write(page)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _place_errors(path: Path) -> Iterator[None]:
    try:
        with disk_errors(path):
            yield
    except OutputError as error:
        raise OutputError(error.message, hint="choose another --html") from error


def plan_page(outcome: PlanOutcome) -> str:
    """The page of `ftload plan`."""
    plan, known = outcome.plan, estimated(outcome.training_memory)
    gpu = drawn_gpu(outcome)
    parameters = plan.parameters
    tables = [
        _Table(title="Fit", columns=("GPU", "change", "#saves", "#then"), rows=[*advice_rows(outcome.advice)]),
        _stored_table(plan.stored),
        _Table(title="Model", columns=("", ""), rows=[("in training", in_training(parameters)), *details(plan)]),
        _Table(title="Files", columns=("file", "#bytes"), rows=[(file.path, f"{file.bytes:,}") for file in plan.files]),
        _Table(
            title="Flags",
            columns=("flag", "value"),
            rows=[(f"--{name}", _typed(f.value)) for name, f in plan.arguments.items() if f.origin != "default"],
        ),
    ]
    if known:
        tables.append(_Table(title="Where the memory's numbers come from", columns=("", ""), rows=origins(known)))
    figures = [
        ("parameters", format_count(parameters.total)),
        ("trainable", f"{format_count(parameters.trainable)} ({parameters.trainable_percent:.2f} %)"),
        ("size", format_bytes(weight_bytes(plan.files))),
        *((f"preparing: {name}", format_bytes(size)) for name, size, _ in needs(plan)),
    ]
    return _render(
        title=plan.source.model,
        subtitle=f"{plan.strategy}, as ftload would prepare it",
        figures=figures,
        stored=plan.stored,
        memory=None if gpu is None else _memory(known, gpu, trained_method(plan)),
        missing=[(one.method, one.reason) for one in without_estimate(outcome.training_memory)],
        tables=tables,
        notes=[*map(decision_words, plan.decisions), *plan.warnings],
        version=plan.ftload_version,
    )


def inspection_page(inspection: Inspection, tensors: Iterable[StoredTensor] | None) -> str:
    """The page of `ftload inspect`, with a table of `tensors` unless that is None."""
    from ...loaders.system.versions import ftload_version

    stored = inspection.stored()
    tables = [_stored_table(stored), _Table(title="Model", columns=("", ""), rows=list(facts(inspection)))]
    tables.append(
        _Table(
            title="Files",
            columns=("file", "#bytes"),
            rows=[(file.path, f"{file.bytes:,}") for file in inspection.files],
        )
    )
    if tensors is not None:
        rows = [
            (tensor.name, tensor.dtype, "×".join(map(str, tensor.shape)) or "scalar", f"{tensor.bytes:,}", tensor.file)
            for tensor in tensors
        ]
        tables.append(_Table(title="Tensors", columns=("tensor", "dtype", "#shape", "#bytes", "file"), rows=rows))
    total = inspection.total
    figures = [
        ("parameters", format_count(total.parameters)),
        ("tensors", f"{total.tensors:,}"),
        ("size", format_bytes(sum(file.bytes for file in inspection.files))),
        ("files", f"{len(inspection.files):,}"),
    ]
    return _render(
        title=inspection.model,
        subtitle=inspection.kind + (f" @ {inspection.commit}" if inspection.commit else ""),
        figures=figures,
        stored=stored,
        memory=None,
        missing=[],
        tables=tables,
        notes=list(inspection.notes),
        version=ftload_version(),
    )


def _stored_table(stored: Iterable[StoredTotals]) -> _Table:
    rows = [
        (row.component, row.dtype, f"{row.tensors:,}", f"{row.parameters:,}", format_bytes(row.bytes)) for row in stored
    ]
    return _Table(title="Parameters", columns=("component", "stored", "#tensors", "#parameters", "#bytes"), rows=rows)


def _memory(methods: list[TrainingMemory], gpu: ChosenGpu, asked: str) -> dict[str, Any]:
    """What the page draws of training memory: a bar for each method, filled by parts, against one GPU.

    Places and widths are in percent of a bar's width.
    """
    names = part_names(methods)
    percent = 100 / bar_scale(methods, gpu)
    return {
        "setting": setting(methods[0]),
        "note": how_to_read(methods[0]),
        "excesses": excess_words(methods),
        "looks": LOOKS,
        "parts": [
            (name, [format_bytes(size) if size else "" for size in (part_bytes(method, name) for method in methods)])
            for name in names
        ],
        "rows": summary_rows(methods),
        "gpu": {"size": gpu_size(gpu), "reason": gpu.reason, "line": gpu.bytes * percent},
        "methods": [
            {
                "name": method.method,
                "asked": method.method == asked,
                "total": format_bytes(method.total),
                "room": room_words(method, gpu),
                "moment": moment_words(method),
                "parts": [(name, part_bytes(method, name) * percent) for name in names if part_bytes(method, name)],
                "over": max(0, method.total - gpu.bytes) * percent,
                "cut": method.total * percent > 100,
            }
            for method in methods
        ],
        "fits": [
            {
                "size": fits[0].gigabytes,
                "chosen": fits[0].gigabytes == gpu.gigabytes,
                "answers": [(fit.fits, what_fits(fit)) for fit in fits],
            }
            for fits in zip(*(method.fits for method in methods), strict=True)
        ],
    }


def _typed(value: Any) -> str:
    """The value of a flag as it is typed."""
    if isinstance(value, list):
        return shlex.join(map(str, value))
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def _cells(stored: Iterable[StoredTotals]) -> list[_Cell]:
    """A treemap of two levels: components, and in each the dtypes that it is stored in; the area is parameters."""
    rows = [row for row in stored if row.parameters]
    total = sum(row.parameters for row in rows)
    colours = {dtype: number % _COLOURS for number, dtype in enumerate(sorted({row.dtype for row in rows}))}
    components: dict[str, list[StoredTotals]] = {}
    for row in sorted(rows, key=lambda row: -row.parameters):
        components.setdefault(row.component, []).append(row)
    groups = sorted(components.values(), key=lambda group: -_parameters(group))
    if not groups:
        return []
    cells = []
    for group, outer in zip(groups, squarify([_parameters(group) for group in groups], _PLANE), strict=True):
        for row, inner in zip(group, squarify([row.parameters for row in group], outer), strict=True):
            place = Rectangle(
                inner.x * 100 / _PLANE.width, inner.y * 100 / _PLANE.height,
                inner.width * 100 / _PLANE.width, inner.height * 100 / _PLANE.height,
            )  # fmt: skip
            cells.append(
                _Cell(
                    component=row.component, dtype=row.dtype, colour=colours[row.dtype],
                    parameters=row.parameters, bytes=row.bytes, share=100 * row.parameters / total,
                    place=place,
                )
            )  # fmt: skip
    return cells


def _parameters(rows: Iterable[StoredTotals]) -> int:
    return sum(row.parameters for row in rows)


def _render(*, stored: Sequence[StoredTotals], **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: one_line(value) if isinstance(value, str) else value,
    )
    environment.filters |= {"count": format_count, "bytes": format_bytes}
    cells = _cells(stored)
    dtypes = dict.fromkeys((cell.dtype, cell.colour) for cell in cells)
    return environment.get_template("page.html").render(
        cells=cells, dtypes=list(dtypes), colours=_COLOURS, ratio=f"{_PLANE.width} / {_PLANE.height}", **values
    )
