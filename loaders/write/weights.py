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
from ..source.blocks import Blocks, Piece
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
    if source.cached and _reads(plan, files):
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
    transfer = None
    if source.commit is not None and _reads(plan, files) and not source.is_here(names):
        if source.cached:
            transfer = Arrivals(source, _needed(plan, files), progress)
            source = replace(source, wait=transfer.wait)
        else:
            transfer = Blocks(source, _pieces(plan, files), plan.read_ahead_bytes, progress)
            source = replace(source, read_remote=transfer.read_into, at_work=transfer.at_work)
        plan = replace(plan, checkpoint=replace(plan.checkpoint, source=source))
    with run.watch.stage("write"), transfer.coming() if transfer is not None else nullcontext():
        try:
            written = write_tensors(
                plan,
                files,
                encode,
                run.staging.stage,
                run.watch,
                lambda file, digest: journal.add(file.path, digest),
                transfer.abandon if transfer is not None else lambda: None,
            )
        except CheckpointError:
            _check_unchanged(plan)  # what was read may be of no state that it ever had
            raise
    if transfer is not None:
        run.watch.stages["fetch"] = transfer.seconds
    if isinstance(transfer, Blocks):
        written = replace(written, ranges_bytes=transfer.received_bytes, compared=transfer.compared)
    _check_unchanged(plan)
    return written


def _needed(plan: Plan, files: tuple[OutputFile, ...]) -> tuple[str, ...]:
    """The checkpoint's files that are read for these files to be written, in the order of reading."""
    if plan.adapter is not None and plan.adapter.reads_base and plan.adapter_file in files:
        return plan.files_in_order
    return tuple(dict.fromkeys(name for name, _, _ in _pieces(plan, files)))


def _pieces(plan: Plan, files: tuple[OutputFile, ...]) -> list[Piece]:
    """What is read of weights that are not in the cache, in the order of reading, for these files to be written."""
    source = plan.checkpoint.source
    away = {name: place for place, name in enumerate(plan.files_in_order) if not source.is_here([name])}
    pieces = {(file.path, 0, file.size) for file in files if file.layout is None}
    names = {output.name for file in files if file.layout is not None for step in file.steps for output in step.outputs}
    if plan.adapter_file is not None and plan.adapter_file in files:
        beside = (step.beside for step in plan.adapter_file.steps if step.beside is not None)
        names |= {output.name for step in beside for output in step.outputs}
    pieces |= {
        (part.file, part.begin, part.end)
        for name, parts in plan.stored_parts.items()
        for part in parts
        if name in names
    }
    return sorted((piece for piece in pieces if piece[0] in away), key=lambda piece: (away[piece[0]], piece))


def _check_unchanged(plan: Plan) -> None:
    source = plan.checkpoint.source
    source.check_unchanged(name for name in plan.files_read if source.commit is None or source.is_here([name]))
    for merged in plan.merged.adapters:
        merged.adapter.source.check_unchanged([merged.file])
