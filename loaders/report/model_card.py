"""The model card that is written as README.md: what the directory holds and how to load it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..system.safe_text import one_line

if TYPE_CHECKING:
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
    origin = f"`{_plain(source.model)}`" + (f" at commit `{source.commit}`" if source.commit else "")
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
        where = "this directory" if report.base == "copy" else f"`{_plain(adapter.base)}`, which is not copied here"
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
        lines += ["| decision | requested | effective | why |", "|---|---|---|---|"]
        cells = ((d.what, d.requested, d.effective, d.reason) for d in report.decisions)
        lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in cells]
        lines.append("")
    lines += ["Every file's hash, every flag and all versions are in `ftload_report.json`.", ""]
    return "\n".join(lines)


_EXPERTS = (
    "The experts are 4-bit, which transformers alone does not load: any other program imports `ftload.register` first.",
    "",
)


def _plain(text: str) -> str:
    """Text from outside as one line that is neither Markdown's nor HTML's, whatever it holds."""
    text = one_line(text)
    return re.sub(r"[<>`|#*\[\]]", lambda match: f"&#{ord(match[0])};", text) if re.search(r"[<>|\[\]]", text) else text
