"""All weight files of a plan: what an earlier run finished is kept, the rest is shared by the processes and written."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, ResourceError
from ..plan.output_files import OutputFile
from ..plan.plan import Plan
from ..source.arrivals import Arrivals
from ..steps.step import Encoder
from ..system.limits import available_memory_bytes
from .run import Run
from .staging import Journal
from .stream import write_tensors
from .written import Written


def write_weights(run: Run, plan: Plan, encode: Encoder | None) -> Written:
    """Write the weight files that are not finished yet, each process its share; returns what all of them did.

    Raises `ResourceError` where disk or memory won't do, before anything is written.
    """
    processes, staging = run.processes, run.staging
    finished = processes.agree_on("finished", staging.resume(run.fingerprint, run.watch) if run.is_first else None)
    remaining = tuple(file for file in plan.files if file.path not in finished)
    _check_room(plan, remaining, staging.stage)
    with Journal(staging, run.fingerprint, rank=processes.rank) as journal:
        share = _write_share(run, plan, processes.share(remaining), encode, journal)
    written = Written.all_of(processes.gather("written", dataclasses.asdict(share)))
    return dataclasses.replace(written, hashes={**finished, **written.hashes})


def _check_room(plan: Plan, files: Iterable[OutputFile], directory: Path) -> None:
    """Raise `ResourceError` unless the disk has room for `files` and the memory for the steps."""
    needed = plan.disk_bytes(files)
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


def _write_share(
    run: Run, plan: Plan, files: tuple[OutputFile, ...], encode: Encoder | None, journal: Journal
) -> Written:
    source, progress, names = plan.checkpoint.source, run.watch.progress, plan.checkpoint.weight_files
    of_adapter = plan.adapter is not None and plan.adapter.reads_base
    reads = any(of_adapter or file is not plan.adapter_file for file in files)
    arrivals = None
    if source.commit is not None and reads and not source.is_here(names):
        arrivals = Arrivals(source, plan.files_in_order, progress)
        plan = replace(plan, checkpoint=replace(plan.checkpoint, source=replace(source, wait=arrivals.wait)))
    with run.watch.stage("write"), arrivals.coming() if arrivals is not None else nullcontext():
        try:
            written = write_tensors(
                plan, files, encode, run.staging.stage, run.watch, lambda file, digest: journal.add(file.path, digest)
            )
        except CheckpointError:
            _check_unchanged(plan)  # what was read may be of no state that it ever had
            raise
    if arrivals is not None:
        run.watch.stages["fetch"] = arrivals.seconds
    _check_unchanged(plan)
    return written


def _check_unchanged(plan: Plan) -> None:
    plan.checkpoint.source.check_unchanged(plan.files_read)
    for merged in plan.merged.adapters:
        merged.adapter.source.check_unchanged([merged.file])
