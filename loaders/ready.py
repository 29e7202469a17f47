"""Everything that is known before anything is written: the sources found, the headers read, the plan made."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import fetch_config, open_checkpoint
from .errors import CheckpointError, OutputError
from .gguf import dequantise
from .model_config import load_config, load_generation_config
from .plan import Plan, make_plan
from .request import Decision, Request
from .skeleton import build_skeleton
from .source import Source, resolve_source, tokenizer_file_names
from .strategy import STRATEGIES
from .stream import Progress
from .tokenizer import PreparedTokenizer, prepare_tokenizer, resolve_tokenizer_source
from .trained_adapter import leave_adapter
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

    from .arguments import Arguments, TokenizerConfig


class Timings:
    """Seconds spent in each stage, and word of it to whoever watches."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that comes again adds up."""
        self.progress.stage(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where everything comes from."""

    model: Source
    tokenizer: Source
    config: Source
    """Of the configuration: the model, or what `--config_name` names."""
    tokenizer_name: str
    warnings: tuple[str, ...]

    @property
    def all(self) -> tuple[Source, ...]:
        """Each of them, the model first."""
        return self.model, self.tokenizer, self.config


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


def resolve_sources(request: Request, options: TokenizerConfig) -> Sources:
    """Find the model, the tokenizer and the configuration. Raises `SourceError` for what is not there."""
    name, revision, warnings = resolve_tokenizer_source(
        tokenizer_name_or_path=options.tokenizer_name_or_path,
        tokenizer_revision=options.tokenizer_revision,
        tokenizer_name=options.tokenizer_name,
        model=request.model,
        model_revision=request.revision,
    )
    model = resolve_source(request.model, request.revision)
    same = (name, revision) == (request.model, request.revision)
    tokenizer = model if same else resolve_source(name, revision)
    config = model if request.config_name is None else resolve_source(request.config_name, request.revision)
    kept = {
        "the model itself": model.root,
        "the tokenizer itself": tokenizer.root,
        "the configuration itself": config.root,
        "the current directory": Path.cwd(),
        "your home": Path.home(),
    }
    for what, path in kept.items():
        # an output is renamed into place as a whole: what stood there before, with all that is in it, is deleted
        if path.resolve().is_relative_to(request.output.resolve()):
            raise OutputError(f"`{request.output}` is or holds {what}", hint="choose another --output_dir")
    return Sources(model=model, tokenizer=tokenizer, config=config, tokenizer_name=name, warnings=warnings)


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
