"""The model card that is written as README.md: what the directory holds and how to load it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.in_words import in_words
from ..source.license import CARD_FILE
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
    by_reference = adapter is not None and report.base == "reference"
    relation = "adapter" if by_reference else "quantized" if report.quantization else "finetune"
    license = source.license
    header = ModelCardData(
        library_name="peft" if by_reference else "transformers",  # which loads what lies at the top
        pipeline_tag="text-generation",
        license=None if license is None else license.id,
        license_name=None if license is None else license.name,
        license_link=None if license is None else license.link,
        base_model=source.model if source.kind == "hub" else None,  # a path means nothing elsewhere
        base_model_relation=relation if source.kind == "hub" else None,
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
        *(_MASTER_WEIGHTS if adapter is None else ()),
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
        at = f" at commit `{adapter.revision}`" if adapter.revision else ""
        where = "this directory" if not by_reference else f"{_code(adapter.base)}{at}, which is not copied here"
        experts = "" if adapter.experts_r is None else f", of experts {adapter.experts_r}"
        settings = "".join(f", {_prose(words)}" for words in in_words(adapter.settings))
        lines += [
            f"The LoRA adapter (rank {adapter.r}{experts}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}"
            f"{settings}) is in `adapter/`; its base is {where}.",
            "",
            *(_CHANGED_BASE if adapter.changes_base else ()),
            *(_ELSEWHERE if by_reference else ()),
        ]
    if report.embeddings.resized:
        rows = report.embeddings
        lines += [f"The embeddings grew from {rows.rows_before:,} to {rows.rows_after:,} rows ({rows.init}).", ""]
    if report.decisions:
        lines += ["What was decided:", "", *map(_decided, report.decisions), ""]
    lines += ["Every file's hash, every flag and all versions are in `ftload_report.json`.", ""]
    lines += [*_trainers(report), *_sharing(report)]
    return "\n".join(lines)


_MASTER_WEIGHTS = (
    "In bfloat16 small steps are lost: two of AdamW at 2e-5 change 3.6 % of SmolLM2-135M's weights. Loaded with "
    '`dtype="float32"` and trained under autocast to bfloat16, all of them change, for twice the memory.',
    "",
)
_EXPERTS = (
    "The experts are 4-bit, which transformers alone does not load: any other program imports `ftload.register` first.",
    "",
)


_CHANGED_BASE = (
    "**The base alone is not the original model any more**: what the adapter starts from was taken out of its weights, "
    "and only both together are the original. `adapter_config.json` says `init_lora_weights: true` on purpose: PEFT "
    "would take it out of the base once more whenever it loads the adapter.",
    "",
)
_ELSEWHERE = (
    "A tool that takes the directory of a model is given that base as the model and `adapter/` as the adapter; the "
    "tokenizer is in either directory here.",
    "",
)


def _decided(decision: Decision) -> str:
    requested, effective = decision.shown
    change = "" if requested == effective else f"{_code(requested)} → "
    return f"- {_prose(decision.what)}: {change}{_code(effective)} – {_prose(decision.reason)}"


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
    handover = replace(handover, model=one_line(handover.model))  # a path can hold anything, new lines too
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


def _sharing(report: Report) -> list[str]:
    """Markdown: how it is put on a hub, and loaded from there."""
    adapter, heading = report.adapter, ["## On a hub", ""]
    if adapter is None:
        return [*heading, *_shell(f"hf upload ORG/NAME {_HERE} ."), *_loading("ORG/NAME")]
    if report.base == "copy":
        name = adapter.base if re.fullmatch(r"[\w.-]+/[\w.-]+", adapter.base) else "ORG/NAME"
        experts = report.quantization is not None and report.quantization.experts > 0
        return [
            *heading,
            *_shell(f"ftload verify {_HERE} --fix --base {name}", f"hf upload {name} {_HERE} ."),
            *_loading(
                name,
                f'model = PeftModel.from_pretrained(model, "{name}", subfolder="adapter", is_trainable=True)',
                imports=(*(["import ftload.register"] if experts else ()), "from peft import PeftModel"),
            ),
            "`AutoPeftModelForCausalLM` takes an adapter that is alone in a repository: "
            f"`hf upload {name}-adapter {_HERE}/adapter .`",
            "",
        ]
    if Path(adapter.base).is_absolute():
        words = (
            "The adapter's base is on one machine. Before it is shared, put that on a hub and prepare this from there"
        )
        return [*heading, f"{words}, or prepare it with `--base copy`.", ""]
    return [
        *heading,
        *_shell(f"hf upload ORG/NAME {_HERE}/adapter .", f"hf upload ORG/NAME {_HERE}/{CARD_FILE} {CARD_FILE}"),
        *_loading("ORG/NAME", imports=("from peft import AutoPeftModelForCausalLM",), model="AutoPeftModelForCausalLM"),
    ]


def _shell(*commands: str) -> list[str]:
    return ["```sh", *commands, "```", ""]


def _loading(name: str, *then: str, imports: tuple[str, ...] = (), model: str = "AutoModelForCausalLM") -> list[str]:
    of_peft = any(line.endswith(model) for line in imports)
    return [
        "```python",
        *imports,
        f"from transformers import {'' if of_peft else f'{model}, '}AutoTokenizer",
        "",
        f'model = {model}.from_pretrained("{name}"{", is_trainable=True" if of_peft else ""})',
        *then,
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
    ]
