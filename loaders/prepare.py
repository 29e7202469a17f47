"""The whole way, from the flags to the finished directory: what each stage makes, the next one is made from.

    arguments ─► request ─► sources ─► configuration, tokenizer, checkpoint ─► skeleton ─► plan ─► written ─► report

`plan` stops at the plan. docs/architecture.md says the same in more words.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.checkpoint import SINGLE_FILE, open_checkpoint
from .decision import Decision
from .flags.gpu_sizes import parse_gpus
from .flags.request import Request, resolve_request
from .flags.strict import check_strict
from .merge.merge import merge
from .model.gguf.checkpoint import open_gguf
from .model.skeleton import build_skeleton
from .plan.configuration import read_configuration
from .plan.plan import Plan
from .plan.planning import make_plan
from .plan.sources import Sources, resolve_sources
from .plan.vocabulary import without_impossible_padding
from .progress import Stopwatch
from .report.document import PlanDocument, Report
from .report.json_values import to_json
from .report.metadata_files import write_report
from .report.outputs import check_output, find_finished
from .report.recorded import record, rewrite
from .report.report import describe_plan
from .source.file_names import REPORT_FILE
from .source.source import Source
from .steps.step import Encoder
from .strategy import STRATEGIES
from .system.durable import disk_errors
from .system.limits import available_memory_bytes, give_back_large_blocks
from .system.read_ahead import read_ahead
from .system.versions import require
from .tokenizer.tokenizer import fetch_tokenizer, prepare_tokenizer
from .write.file_copy import link_problem
from .write.fingerprint import fingerprint
from .write.processes import Processes, join_processes
from .write.run import Run
from .write.staging import Staging, staged
from .write.weights import write_weights

if TYPE_CHECKING:
    from .errors import FtloadError
    from .flags.declared import Arguments, PlanOptions
    from .memory.advice import Advice
    from .memory.training_memory import NoEstimate, TrainingMemory
    from .progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `prepare` has to say."""

    report: Report
    up_to_date: bool
    """Whether the output was there already, and no weights had to be written."""
    recorded: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Flags that changed since it was written and have no part in it, old and new value: its report was rewritten."""


def prepare(arguments: Arguments, progress: Progress) -> Outcome | None:
    """Plan and write the output directory, unless it is there already.

    Of several processes (see `write/processes.py`) each writes its share; all but the first return None.
    Raises `FtloadError` for whatever a user can fix; then nothing is left behind, but for the finished files of a run
    that the disk or the source stopped: the next one goes on from there.
    """
    give_back_large_blocks()
    watch = Stopwatch(progress)
    request = resolve_request(arguments)
    require(STRATEGIES[request.strategy].packages, purpose=f"`{request.strategy}`")
    processes = join_processes()
    with processes.failing_together():
        _check_place(request)
        with watch.stage("resolve"):
            sources = resolve_sources(request)
        with _begin(request, fingerprint(request, sources.all), processes, watch) as (run, finished):
            if run is None:
                return None
            if finished is not None:
                return _up_to_date(run, request, finished)
            run.make_scratch()
            with read_ahead(_certain_weights(run, request, sources.model), available_memory_bytes() // 2):
                plan, encode = _fit_to_machine(run, read_and_plan(request, sources, watch))
            if request.strict:
                check_strict(plan.decisions)
            with warnings.catch_warnings():
                # it takes each layer for a whole model: what it says of the model was heard when it was planned
                warnings.filterwarnings("ignore", module=r"peft\.")
                written = write_weights(run, plan, encode)
            report = write_report(run, plan, written) if run.is_first else None
            if report is not None:
                check_output(request.output, overwrite=request.overwrite)
                run.staging.publish(overwrite=request.overwrite)
            processes.gather("published", True)
            return None if report is None else Outcome(report=report, up_to_date=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOutcome:
    """What `plan_only` has to say."""

    plan: PlanDocument
    training_memory: tuple[TrainingMemory | NoEstimate, ...]
    advice: tuple[Advice, ...] = ()
    """For each of `--fit`, in its order."""

    @property
    def error(self) -> FtloadError | None:
        """The error where nothing fits on one of `--fit`."""
        from .memory.advice import fit_error

        return fit_error(self.advice)

    def to_json(self) -> dict[str, Any]:
        """The document of `ftload plan`."""
        return {
            **to_json(self.plan),
            "training_memory": [estimate.to_json() for estimate in self.training_memory],
            "advice": [one.to_json() for one in self.advice],
        }


def plan_only(arguments: Arguments, options: PlanOptions, progress: Progress) -> PlanOutcome:
    """What `prepare` would write, what it takes, and what training takes then.

    Reads headers; of a repository nothing else travels but the configuration and the tokenizer. Raises what `prepare`
    would.
    """
    from .memory.advice import advise
    from .memory.estimate import compare_methods
    from .memory.training_run import training_run
    from .memory.what_fits import Simulations

    request = resolve_request(arguments)
    require(STRATEGIES[request.strategy].packages, purpose=f"`{request.strategy}`")
    sources = resolve_sources(request)
    plan = read_and_plan(request, sources, Stopwatch(progress), headers_only=True)
    if request.strict:
        check_strict(plan.decisions)
    progress.stage("training memory")
    run, simulations = training_run(options), Simulations()
    memory = compare_methods(plan, arguments.flat, run, simulations=simulations)
    gpus = [parse_gpus(text) for text in options.fit or ()]
    return PlanOutcome(
        plan=describe_plan(plan),
        training_memory=memory,
        advice=advise(plan, arguments, run, gpus, simulations),
    )


def read_and_plan(request: Request, sources: Sources, watch: Stopwatch, *, headers_only: bool = False) -> Plan:
    """From the sources to the plan.

    Reads headers, and weights in one case, unless `headers_only`: of tied parameters that are both stored
    (`model/ties.py`).
    """
    with watch.stage("config"):
        configuration = read_configuration(request, sources)
    with watch.stage("tokenizer"):
        fetch_tokenizer(sources.tokenizer, trust_remote_code=request.trust_remote_code)
        tokenizer = prepare_tokenizer(
            sources.tokenizer.root,
            get_tokenizer_fn=request.tokenizer.get_tokenizer_fn,
            use_fast=request.tokenizer.use_fast,
            trust_remote_code=request.trust_remote_code,
            chat_template_name=request.tokenizer.chat_template_name,
            add_bos=request.tokenizer.add_bos,
            name=sources.tokenizer_name,
            gguf_file=sources.tokenizer.gguf_file,
        )
    with watch.stage("headers"):
        if sources.gguf is not None:
            checkpoint = open_gguf(sources.gguf)
        else:
            checkpoint = open_checkpoint(
                sources.model,
                allow_pickle=request.allow_pickle,
                dequantize=request.dequantize or bool(sources.adapters),
            )
    with watch.stage("plan"):
        merged = merge(
            checkpoint,
            configuration.config,
            sources.adapters,
            trust_remote_code=request.trust_remote_code,
            headers_only=headers_only,
        )
        configuration = replace(configuration, config=merged.config)
        skeleton = build_skeleton(
            merged.checkpoint,
            without_impossible_padding(configuration.config, tokenizer.tokenizer),
            trust_remote_code=request.trust_remote_code,
            tokenizer_size=tokenizer.facts()["size"],
            fuse_experts=request.quantize_experts and STRATEGIES[request.strategy].quantisation is not None,
            headers_only=headers_only,
        )
        return make_plan(request, sources, configuration, tokenizer, merged, skeleton)


def _check_place(request: Request) -> None:
    """Raise `OutputError` early where nothing can be put: a finished output is looked at once it is locked."""
    with disk_errors(request.output):
        if not (request.output / REPORT_FILE).exists():
            check_output(request.output, overwrite=request.overwrite)


@contextmanager
def _begin(
    request: Request, fingerprint: str, processes: Processes, watch: Stopwatch
) -> Iterator[tuple[Run | None, Report | None]]:
    """Take the place to work in, or learn it from the first process; None where that has nothing to share.

    And the report of an output that is just what would be written, and intact.
    """
    if processes.rank:
        place = processes.agree_on("place", None)
        if place is None:
            yield None, None
            return
        staging = Staging(output=request.output, directory=Path(place))
        yield Run(fingerprint=fingerprint, staging=staging, processes=processes, watch=watch), None
        return
    with staged(request.output) as staging:
        finished = find_finished(request.output, fingerprint, watch, overwrite=request.overwrite)
        if finished is None:
            check_output(request.output, overwrite=request.overwrite)
        processes.agree_on("place", str(staging.directory) if finished is None else None)
        # again: when the place is tidied up, nobody may be writing any longer
        with processes.failing_together():
            yield Run(fingerprint=fingerprint, staging=staging, processes=processes, watch=watch), finished


def _up_to_date(run: Run, request: Request, finished: Report) -> Outcome:
    """What there is to say of an output that is finished; its report is rewritten where recorded flags changed."""
    report, recorded = record(finished, request)
    if request.strict:
        check_strict(report.decisions)
    if recorded:
        report = rewrite(report, run.staging)
    return Outcome(report=report, up_to_date=True, recorded=recorded)


def _certain_weights(run: Run, request: Request, source: Source) -> tuple[Path, ...]:
    """The weights, as far as they are on this machine, that are read whatever the plan will be.

    While libraries are imported, the disk would have nothing to do. LoRA may leave the base where it is. Shards are
    taken by their usual names: which ones the index lists, a hub would have to be asked. (Files that come to be cloned
    are not read after all: only the hash reads the clone.)
    """
    if run.processes.count > 1 or run.staging.is_begun:
        return ()
    if source.gguf_file is not None:
        return (source.root / source.gguf_file,)
    if request.strategy == "lora" and request.base not in ("copy", "link"):
        return ()
    names = [file.path for file in source.files]
    if SINGLE_FILE in names:
        return (source.root / SINGLE_FILE,)
    return tuple(source.root / name for name in names if fnmatch(name, "model-*-of-*.safetensors"))


def _fit_to_machine(run: Run, plan: Plan) -> tuple[Plan, Encoder | None]:
    """The plan with what only the machine that carries it out knows, and the encoder where something is quantised.

    No part of planning: importing the encoder takes a while, and nothing that is planned depends on it.
    """
    encode = None
    if plan.encodes and plan.strategy.quantisation is not None:
        with run.watch.stage("encoder"):
            encode, decisions = plan.strategy.quantisation.choose_encoder(plan.request.device)
            plan = plan.decide(*decisions)
    if plan.link and plan.copied_files:
        source = plan.checkpoint.source
        # what is still to be fetched comes to where other files of its repository are
        paths = [source.root / name for name in (plan.copied_files[0].path, *(file.path for file in source.files))]
        problem = link_problem(next((path for path in paths if path.exists()), paths[0]), run.scratch)
        if problem is not None:
            decision = Decision(what="base", requested="link", effective="copy", reason=problem)
            plan = replace(plan, link=False).decide(decision)
    return plan, encode
