"""Preparing a model, from the flags to the finished directory."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.checkpoint import SINGLE_FILE
from .decision import Decision
from .errors import CheckpointError, MissingRequirementError, ResourceError
from .flags.request import Request, resolve_request
from .flags.strict import check_strict
from .nf4.encode import encode as encode_nf4
from .nf4.encode import encode_with_bitsandbytes, library_problem, numba_problem
from .plan.output_files import REPORT_FILE, OutputFile
from .plan.plan import Plan
from .plan.ready import Prepared, make_ready
from .plan.sources import Sources, resolve_sources
from .progress import Progress, Timings
from .report.metadata_files import write_side_files
from .report.outputs import check_output, find_finished
from .report.recorded import record, rewrite
from .report.report import describe_plan
from .source.source import Source
from .steps.quantisation import Encoder
from .strategy import STRATEGIES
from .system.cuda import cuda_problem
from .system.durable import disk_errors
from .system.limits import available_memory_bytes
from .system.read_ahead import read_ahead
from .system.versions import require
from .write.file_copy import link_problem
from .write.fingerprint import fingerprint
from .write.processes import Processes, join_processes
from .write.staging import Journal, Staging, staged
from .write.stream import write_tensors
from .write.written import Written

if TYPE_CHECKING:
    from .flags.declared import Arguments, PlanOptions
    from .memory.estimate import Sharding


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `prepare` has to say."""

    report: dict[str, Any]
    up_to_date: bool
    """Whether the output was there already, and no weights had to be written."""
    recorded: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Flags that changed since it was written and have no part in it, old and new value: its report was rewritten."""


def prepare(arguments: Arguments, progress: Progress) -> Outcome | None:
    """Plan and write the output directory, unless it is there already.

    Of several processes (see `processes.py`) each writes its share; all but the first return None.
    Raises `FtloadError` for whatever a user can mend; then nothing is left behind, but for the finished files of a run
    that the disk or the source stopped: the next one goes on from there.
    """
    timings = Timings(progress)
    request = resolve_request(arguments)
    require(STRATEGIES[request.strategy].packages, purpose=f"`{request.strategy}`")
    processes = join_processes()
    with processes.failing_together():
        with disk_errors(request.output):
            if not (request.output / REPORT_FILE).exists():
                check_output(request.output, overwrite=request.overwrite)
        with timings.stage("resolve"):
            sources = resolve_sources(request, arguments.tokenizer)
        making = fingerprint(request, arguments.tokenizer, sources.all)
        if processes.rank:
            place = processes.agree_on("place", None)
            if place is not None:
                staging = Staging(output=request.output, directory=Path(place))
                _make(arguments, request, sources, making, staging, processes, timings)
            return None
        with staged(request.output) as staging:
            report = find_finished(request.output, making, overwrite=request.overwrite)
            if report is None:
                check_output(request.output, overwrite=request.overwrite)
            processes.agree_on("place", str(staging.directory) if report is None else None)
            if report is not None:
                report, recorded = record(report, arguments, request)
                if arguments.own.strict:
                    check_strict(Decision(**decision) for decision in report["decisions"])
                if recorded:
                    report = rewrite(report, staging)
                return Outcome(report=report, up_to_date=True, recorded=recorded)
            # again: when the place is tidied up, nobody may be writing any longer
            with processes.failing_together():
                report = _make(arguments, request, sources, making, staging, processes, timings)
            return Outcome(report=report, up_to_date=False)


def plan_only(arguments: Arguments, options: PlanOptions, progress: Progress) -> dict[str, Any]:
    """What `prepare` would write, what it takes, and what training takes then, as JSON values (see `describe_plan`).

    Reads headers; of a repository nothing else travels but the configuration and the tokenizer. A GGUF file is
    dequantised, in a temporary directory, as its tensors are not known otherwise. Raises what `prepare` would.
    """
    from .memory.estimate import compare_methods

    request = resolve_request(arguments)
    require(STRATEGIES[request.strategy].packages, purpose=f"`{request.strategy}`")
    sources = resolve_sources(request, arguments.tokenizer)
    with tempfile.TemporaryDirectory(prefix="ftload-plan-") as work:
        prepared = make_ready(arguments, request, sources, Path(work), Timings(progress), headers_only=True)
        if arguments.own.strict:
            check_strict(prepared.decisions)
        progress.stage("training memory")
        return {
            **describe_plan(prepared),
            "training_memory": [
                estimate.to_json()
                for estimate in compare_methods(prepared.plan, arguments.flat, sharding=_sharding(options))
            ],
        }


def _sharding(options: PlanOptions) -> Sharding | None:
    from .memory.estimate import Sharding

    if options.fsdp is not None:
        return Sharding(method="fsdp", gpus=options.fsdp)
    if options.zero is not None:
        return Sharding(method="zero", gpus=options.gpus, stage=options.zero)
    return None


def _make(
    arguments: Arguments,
    request: Request,
    sources: Sources,
    making: str,
    staging: Staging,
    processes: Processes,
    timings: Timings,
) -> dict[str, Any]:
    """Plan, write, report and publish; what another process than the first returns is empty."""
    scratch = staging.scratch(processes.rank)
    with disk_errors(scratch):
        scratch.mkdir()
    encode = encode_nf4
    # while libraries are imported, the disk would have nothing to do
    needed = () if processes.count > 1 or staging.is_begun else _surely_read(request, sources.model)
    with read_ahead(needed, available_memory_bytes() // 2):
        prepared = make_ready(arguments, request, sources, scratch, timings)
        if prepared.plan.encodes:
            # not part of the plan: importing numba takes a while, and nothing that is planned depends on it
            with timings.stage("encoder"):
                encode, decision = _choose_encoder(request)
                prepared = prepared.decide(decision).decide(_statistics_decision())
    if request.base == "link" and prepared.plan.copied_files:
        prepared = _link_or_copy(prepared, scratch)
    if arguments.own.strict:
        check_strict(prepared.decisions)
    finished = processes.agree_on("finished", staging.resume(making) if processes.rank == 0 else None)
    remaining = tuple(file for file in prepared.plan.files if file.path not in finished)
    _check_room(prepared.plan, remaining, staging.stage)
    with Journal(staging, making, rank=processes.rank) as journal:
        share = _write_weights(
            prepared, processes.share(remaining), encode, staging.stage, timings,
            lambda file, digest: journal.add(file.path, digest),
        )  # fmt: skip
    written = Written.all_of(processes.gather("written", dataclasses.asdict(share)))
    report: dict[str, Any] = {}
    if processes.rank == 0:
        report = write_side_files(prepared, written, {**finished, **written.hashes}, making, staging.stage, timings)
        check_output(request.output, overwrite=request.overwrite)
        staging.publish(overwrite=request.overwrite)
    processes.gather("published", True)
    return report


def _surely_read(request: Request, source: Source) -> tuple[Path, ...]:
    """The weights, as far as they are on this machine, that are read whatever the plan will be.

    LoRA may leave the base where it is. Shards by their usual names: which ones the index lists, a hub would have to be
    asked. (Files that come to be cloned are not read after all: only the hash reads the clone.)
    """
    if request.strategy == "lora" and request.base not in ("copy", "link"):
        return ()
    names = [file.path for file in source.files]
    if SINGLE_FILE in names:
        return (source.root / SINGLE_FILE,)
    return tuple(source.root / name for name in names if fnmatch(name, "model-*-of-*.safetensors"))


def _choose_encoder(request: Request) -> tuple[Encoder, Decision | None]:
    """The NF4 encoder of the device that was asked for. Raises `MissingRequirementError` where there is none."""
    if request.device == "cuda":
        problem = cuda_problem()
        if problem is not None:
            raise MissingRequirementError(f"`--device cuda`: {problem}", hint="leave it out: the CPU encodes as well")
        return partial(encode_with_bitsandbytes, device="cuda"), None
    problem = numba_problem()
    if problem is None:
        return encode_nf4, None
    decision = Decision(what="nf4_encoder", requested="numba", effective="bitsandbytes", reason=problem)
    return encode_with_bitsandbytes, decision


def _statistics_decision() -> Decision | None:
    problem = library_problem()
    if problem is None:
        return None
    return Decision(
        what="nf4_statistics", requested="bitsandbytes' library", effective="bitsandbytes", reason=problem
    )  # fmt: skip


def _link_or_copy(prepared: Prepared, scratch: Path) -> Prepared:
    """What `--base link` comes to on this file system."""
    plan = prepared.plan
    problem = link_problem(plan.checkpoint.source.root / plan.copied_files[0].path, scratch)
    if problem is None:
        return prepared
    decision = Decision(what="base", requested="link", effective="copy", reason=problem)
    request = dataclasses.replace(plan.request, base="copy")
    return dataclasses.replace(prepared, plan=dataclasses.replace(plan, request=request)).decide(decision)


def _check_room(plan: Plan, files: Iterable[OutputFile], directory: Path) -> None:
    """Raise `ResourceError` unless the disk has room for `files` and the memory for making them."""
    linked = plan.request.base == "link"
    needed = sum(file.size for file in files if not (linked and file.layout is None))
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ResourceError(
            f"`{plan.request.output.parent}` has {free / 1e9:.1f} GB free, the output takes {needed / 1e9:.1f} GB",
            hint="free some disk space, or choose another --output_dir",
        )
    available = available_memory_bytes()
    if plan.memory_bytes > available:
        raise ResourceError(
            f"{available / 1e9:.1f} GB of memory are free, the plan takes {plan.memory_bytes / 1e9:.1f} GB",
            hint="pass a smaller --max_memory",
        )


def _write_weights(
    prepared: Prepared,
    files: tuple[OutputFile, ...],
    encode: Encoder,
    stage: Path,
    timings: Timings,
    on_finished: Callable[[OutputFile, str], None],
) -> Written:
    plan, source = prepared.plan, prepared.plan.checkpoint.source
    if any(file is not plan.adapter_file for file in files):
        with timings.stage("fetch"):
            sizes = {file.path: file.bytes for file in source.files}
            timings.progress.expect(bytes=sum(sizes[name] for name in plan.checkpoint.weight_files), tensors=0)
            source.fetch(plan.checkpoint.weight_files, lambda count: timings.progress.advance(bytes=count, tensors=0))
    with timings.stage("write"):
        try:
            written = write_tensors(plan, files, encode, stage, timings.progress, on_finished)
        except CheckpointError:
            source.check_unchanged(plan.files_read)  # what was read may be of no state that it ever had
            raise
    source.check_unchanged(plan.files_read)
    return written
