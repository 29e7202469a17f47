"""The model card that is written as README.md: what the directory holds and how to load it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..system.safe_text import one_line
from ..trainers.registry import TRAINERS
from .handed_over import hand_over

if TYPE_CHECKING:
    from ..decision import Decision
    from .document import Report


def model_card(report: Report) -> str:
    """Markdown with the hub's metadata as its YAML header, made from the report."""
    from huggingface_hub import ModelCardData

    source, parameters, adapter = report.source, report.parameters, report.adapter
    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=source.model if source.kind == "hub" else None,
        tags=["ftload", report.strategy],
    )
    origin = _code(source.model) + (f" at commit `{source.commit}`" if source.commit else "")
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# {origin}, ready to train ({report.strategy})",
        "",
        f"A `{source.architecture}` that ftload {report.ftload_version} prepared from {origin}.",
        "",
        "```python",
        "from ftload import load_prepared",
        "",
        'model, tokenizer = load_prepared("path/to/this/directory")',
        "```",
        "",
        *(_EXPERTS if report.quantization is not None and report.quantization.experts else ()),
        "| | parameters |",
        "|---|---:|",
        f"| total | {parameters.total:,} |",
        f"| trainable | {parameters.trainable:,} ({parameters.trainable_percent:.2f} %) |",
        "",
        "| stored as | tensors | parameters | bytes |",
        "|---|---:|---:|---:|",
        *(
            f"| {dtype} | {row.tensors:,} | {row.parameters:,} | {row.bytes:,} |"
            for dtype, row in parameters.by_dtype.items()
        ),
        "",
    ]
    if adapter:
        where = "this directory" if report.base == "copy" else f"{_code(adapter.base)}, which is not copied here"
        experts = "" if adapter.experts_r is None else f", of experts {adapter.experts_r}"
        lines += [
            f"The LoRA adapter (rank {adapter.r}{experts}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}) is in "
            f"`adapter/`; its base is {where}.",
            "",
        ]
    if report.embeddings.resized:
        rows = report.embeddings
        lines += [f"The embeddings grew from {rows.rows_before:,} to {rows.rows_after:,} rows ({rows.init}).", ""]
    if report.decisions:
        lines += ["What was decided:", "", *map(_decided, report.decisions), ""]
    lines += _trainers(report)
    lines += ["Every file's hash, every flag and all versions are in `ftload_report.json`.", ""]
    return "\n".join(lines)


_EXPERTS = (
    "The experts are 4-bit, which transformers alone does not load: any other program imports `ftload.register` first.",
    "",
)


def _decided(decision: Decision) -> str:
    change = f"{_code(decision.requested)} → " if decision.requested != decision.effective else ""
    return f"- {_prose(decision.what)}: {change}{_code(decision.effective)} – {_prose(decision.reason)}"


def _code(text: str) -> str:
    """A code span (CommonMark 0.31, section 6.1): text from outside as it is, and none of it means anything."""
    text = one_line(text) or "–"
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, pad = "`" * (longest + 1), " " * text.startswith("`") or " " * text.endswith("`")
    return f"{fence}{pad}{text}{pad}{fence}"


def _prose(text: str) -> str:
    """A sentence with names between backticks: these as code; of the rest, nothing is Markdown's or HTML's."""
    pieces = re.split("(`[^`]+`)", one_line(text))
    pieces[1::2] = (_code(name[1:-1]) for name in pieces[1::2])
    pieces[::2] = (re.sub(r"[<>`|*\[\]]", lambda match: f"&#{ord(match[0])};", piece) for piece in pieces[::2])
    return "".join(pieces)


_HERE = "path/to/this/directory"
"""A card can be read anywhere: where the directory is then, nobody knows."""


def _trainers(report: Report) -> list[str]:
    """Markdown: what `ftload recipe` writes in full, in short."""
    handover = hand_over(report, _HERE)
    lines = [
        "## In a trainer",
        "",
        f"`ftload recipe {_HERE} --for TRAINER` prints a complete file. What it must say:",
        "",
    ]
    for trainer in TRAINERS.values():
        refusal = trainer.refusal(handover)
        if refusal is not None:
            lines += [f"{trainer.title} can't train it: {refusal.reason}.", ""]
            continue
        text = trainer.essentials(handover).rstrip("\n")
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # a path can hold backticks
        lines += [f"{trainer.title}:", "", f"{fence}{trainer.language}", text, fence, ""]
    return lines
