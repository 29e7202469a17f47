"""Everything that is known before anything is written: the sources found, the headers read, the plan made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.json_files import fetch_config
from ..checkpoint.trained_adapter import leave_adapter
from ..decision import Decision
from ..errors import CheckpointError
from ..flags.request import Request
from ..model.config import load_config, load_generation_config
from ..model.gguf import dequantise
from ..model.skeleton import build_skeleton
from ..progress import Timings
from ..source.source import Source, tokenizer_file_names
from ..strategy import STRATEGIES
from ..tokenizer.tokenizer import PreparedTokenizer, prepare_tokenizer
from .plan import Plan, make_plan
from .sources import Sources
from .vocabulary import (
    Padding,
    check_rows,
    check_turns,
    drop_impossible_padding,
    follow_tokenizer,
    padding_id,
    stored_padding,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..flags.declared import Arguments


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """All that is known before anything is written."""

    arguments: Arguments
    sources: Sources
    """As the user named them; the plan's checkpoint may lie elsewhere, for a GGUF file."""
    plan: Plan
    tokenizer: PreparedTokenizer
    padding: Padding
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def decide(self, decision: Decision | None) -> Prepared:
        """The same with one more decision, if it is one."""
        return self if decision is None else dataclasses.replace(self, decisions=(*self.decisions, decision))


_MAX_TOKENIZER_BYTES = 100_000_000
"""Of one file of a tokenizer; the largest that are known have 35 MB, and reading takes several times as much memory."""


def make_ready(
    arguments: Arguments,
    request: Request,
    sources: Sources,
    work: Path,
    timings: Timings,
    *,
    headers_only: bool = False,
) -> Prepared:
    """Everything up to the plan; `work` is used for what a GGUF file is turned into.

    Reads headers, and weights in one case, unless `headers_only`: of tied parameters that are both stored (`ties.py`).
    """
    strategy = STRATEGIES[request.strategy]
    options = arguments.tokenizer
    source, tokenizer_source = sources.model, sources.tokenizer
    decisions: list[Decision] = []
    if source.kind != "hub" and request.revision is not None:
        decisions.append(
            Decision(
                what="model_revision", requested=request.revision, effective="none",
                reason="the model is local: it has no revisions",
            )
        )  # fmt: skip
    left = leave_adapter(source, fresh=strategy.has_adapter)
    if left is not None:
        decisions.append(left)

    config = None
    if source.kind != "gguf":
        with timings.stage("config"):
            config = _read_config(request, source, sources.config)
    with timings.stage("tokenizer"):
        names = tokenizer_file_names(tokenizer_source.files, trust_remote_code=request.trust_remote_code)
        for file in tokenizer_source.files:
            if file.path in names and file.bytes > _MAX_TOKENIZER_BYTES:
                raise CheckpointError(f"`{file.path}` of the tokenizer is {file.bytes} bytes long")
        tokenizer_source.fetch(names)
        tokenizer = prepare_tokenizer(
            tokenizer_source.root,
            get_tokenizer_fn=options.get_tokenizer_fn,
            use_fast=options.use_fast,
            trust_remote_code=request.trust_remote_code,
            chat_template_name=options.chat_template_name,
            add_bos=options.add_bos,
            name=sources.tokenizer_name,
            gguf_file=tokenizer_source.gguf_file,
        )
    weights = source
    if source.kind == "gguf":
        with timings.stage("dequantise"):
            weights = dequantise(source, work / "gguf")
    with timings.stage("headers"):
        checkpoint = open_checkpoint(weights, allow_pickle=request.allow_pickle)
    with timings.stage("plan"):
        config, config_warnings = config or _read_config(
            request, weights, sources.config if request.config_name is not None else weights
        )
        stored_pad = stored_padding(config)
        if padding_id(tokenizer.tokenizer) is not None:
            drop_impossible_padding(config)  # the tokenizer's takes its place below
        skeleton = build_skeleton(
            checkpoint, config, trust_remote_code=request.trust_remote_code,
            tokenizer_size=tokenizer.facts()["size"], headers_only=headers_only,
        )  # fmt: skip
        fit_warnings = check_rows(
            tokenizer_size=tokenizer.facts()["size"],
            before=skeleton.rows_before,
            after=skeleton.rows_after,
            tokenizer_is_named=tokenizer_source is not source,
        )
        plan = make_plan(request, strategy, checkpoint, skeleton)
        generation = load_generation_config(weights.root)
        fit_warnings += check_turns(tokenizer, generation.eos_token_id)
        padding = follow_tokenizer(
            tokenizer.tokenizer,
            skeleton,
            stored=stored_pad,
            generation=generation.pad_token_id,
            asked=request.config_overrides.get("pad_token_id"),
            base=plan.base,
        )
    return Prepared(
        arguments=arguments,
        sources=sources,
        plan=plan,
        tokenizer=tokenizer,
        padding=padding,
        decisions=(*decisions, *tokenizer.decisions, *padding.decisions, *plan.decisions),
        warnings=(
            *weights.notes, *sources.warnings, *config_warnings, *tokenizer.warnings, *fit_warnings, *padding.warnings,
            *plan.warnings,
        ),
    )  # fmt: skip


def _read_config(request: Request, source: Source, named: Source) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """The model's configuration, or the one of `--config_name`, and warnings; its code comes with it."""
    for one in {source.root: source, named.root: named}.values():
        fetch_config(one)
        if request.trust_remote_code:
            one.fetch(file.path for file in one.files if file.path.endswith(".py"))
    load_generation_config(source.root)  # written much later: an error must come now
    return load_config(named.root, overrides=request.config_overrides, trust_remote_code=request.trust_remote_code)
