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
    processes.gather("room", True)  # what one of them fetches or writes would be missing to another that looks later
    with Journal(staging, run.fingerprint, rank=processes.rank) as journal:
        share = _write_share(run, plan, processes.share(remaining), encode, journal)
    written = Written.all_of(processes.gather("written", dataclasses.asdict(share)))
    return dataclasses.replace(written, hashes={**finished, **written.hashes})


def _check_room(plan: Plan, files: Iterable[OutputFile], directory: Path) -> None:
    """Raise `ResourceError` unless disks have room for `files` and what is fetched for them, and memory for the steps.

    Both may be on one disk: then it needs room for their sum.
    """
    files, source, output = tuple(files), plan.checkpoint.source, plan.request.output.parent
    needed, fetched = plan.disk_bytes(files), 0
    if plan.request.source_cache == "hub" and _reads(plan, files):
        fetched = source.unfetched_bytes(plan.files_read)
    words = f"the output takes {needed / 1e9:.1f} GB"
    if fetched:
        words += f", what is fetched {fetched / 1e9:.1f} GB in the hub's cache"
    free = shutil.disk_usage(directory).free
    if needed > free:
        hint = "free some disk space, or choose another --output_dir"
        raise ResourceError(f"`{output}` has {free / 1e9:.1f} GB free, {words}", hint=hint)
    if fetched:
        cache = next(place for place in (source.blobs, *source.blobs.parents) if place.exists())
        shared = cache.stat().st_dev == directory.stat().st_dev
        free = shutil.disk_usage(cache).free
        if fetched + (needed if shared else 0) > free:
            raise ResourceError(
                f"`{output if shared else cache}` has {free / 1e9:.1f} GB free, {words}",
                hint="pass --source_cache none, which keeps nothing in the cache, or free some disk space",
            )
    available = available_memory_bytes()
    if plan.memory_bytes > available:
        raise ResourceError(
            f"{available / 1e9:.1f} GB of memory are free, the plan takes {plan.memory_bytes / 1e9:.1f} GB",
            hint="pass a smaller --max_memory",
        )


def _reads(plan: Plan, files: Iterable[OutputFile]) -> bool:
    """Whether weights are read to write these files."""
    of_adapter = plan.adapter is not None and plan.adapter.reads_base
    return any(of_adapter or file is not plan.adapter_file for file in files)


def _write_share(
    run: Run, plan: Plan, files: tuple[OutputFile, ...], encode: Encoder | None, journal: Journal
) -> Written:
    source, progress, names = plan.checkpoint.source, run.watch.progress, plan.checkpoint.weight_files
    arrivals = None
    if source.commit is not None and _reads(plan, files) and not source.is_here(names):
        arrivals = Arrivals(source, plan.files_in_order, progress)
        plan = replace(plan, checkpoint=replace(plan.checkpoint, source=replace(source, wait=arrivals.wait)))
    with run.watch.stage("write"), arrivals.coming() if arrivals is not None else nullcontext():
        try:
            written = write_tensors(
                plan,
                files,
                encode,
                run.staging.stage,
                run.watch,
                lambda file, digest: journal.add(file.path, digest),
                arrivals.abandon if arrivals is not None else lambda: None,
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
