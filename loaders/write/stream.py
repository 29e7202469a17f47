"""Executing a plan: every output tensor is made once and put in its place, several at a time, in bounded memory.

A step (one tensor, or a few that belong together) reads, converts and writes on its own. Worker threads take steps, as
`in_order` lists them; reading, encoding and writing all release the interpreter's lock, so that one worker's reading
overlaps another's encoding. A step begins when what it allocates at most fits into the budget beside those that are
running. A file whose last step is done is made durable, hashed and reported.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..plan.output_files import OutputFile
from ..plan.plan import Plan
from ..progress import Stopwatch
from ..steps.plain import Cast, Grow
from ..steps.step import Encoder, Inputs, Sink, Step
from ..system.durable import disk_errors, hash_file
from ..system.limits import PeakMemory
from ..system.quiet import quiet_transformers
from .file_copy import FileCopy
from .file_writer import FileWriter, check_written
from .written import WORK, Written

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..model.skeleton import Skeleton


def write_tensors(
    plan: Plan,
    files: tuple[OutputFile, ...],
    encode: Encoder | None,
    directory: Path,
    watch: Stopwatch,
    on_finished: Callable[[OutputFile, str], None],
    on_stopped: Callable[[], None] = lambda: None,
) -> Written:
    """Write these files of `plan` into `directory`, check that they are what was planned, and hash them.

    Random numbers are drawn in the reference's order: seed, new embedding rows, adapter. `on_finished` gets every
    file that is durable, with its sha256, from the thread that finished it. After an error `on_stopped` ends what
    workers wait for.
    """
    import torch

    watch.progress.expect(
        bytes=sum(file.size for file in files),
        tensors=sum(len(step.outputs) for file in files for step in file.steps),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the threads; and sums come out alike on every machine
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.request.seed)
            inputs = Inputs(checkpoint=plan.checkpoint, chunk_bytes=plan.chunk_bytes, encode=encode, watch=watch)
            if plan.grown and plan.request.embedding_init == "reference":
                inputs = replace(inputs, new_rows=_draw_new_rows(plan.skeleton, inputs, plan.grown))
            with PeakMemory() as peak:
                execution = _Execution(plan, files, directory, inputs, on_finished, on_stopped)
                execution.run()
            seconds = {kind: watch.work.get(kind, 0.0) for kind in WORK}
            return Written(hashes=execution.hashes, seconds=seconds, peak_anonymous_bytes=peak.anonymous_bytes)
    finally:
        torch.set_num_threads(threads)


Task: TypeAlias = tuple[tuple[OutputFile, ...], tuple[Step, ...]]
"""What a worker takes at a time: steps, one after another, and the files that each of them writes into."""


def in_order(
    files: tuple[OutputFile, ...],
    adapter: OutputFile | None,
    workers: int,
    arrival: Callable[[Step], Any] = lambda step: 0,
) -> list[Task]:
    """Tasks, the largest step of each file first; an adapter as a whole, if each step follows another.

    File after file, or with many workers a few files after a few, a step of each of these in turn. `arrival` says what
    place among all that comes from a hub the last has that a step reads: what comes first is done first.

    One worker initialises such an adapter, layer after layer, while the others go on, and one hashes the model's last
    file: the adapter is begun so late that both end together. As measured, a byte of it takes as long as a byte of the
    model, and hashing one a quarter of that.
    """
    by_base = {step.beside: step for step in adapter.steps if step.beside is not None} if adapter is not None else {}
    order: list[Task] = []
    for group in _groups([file for file in files if file is not adapter], workers):
        largest_first = ([(file, step) for step in sorted(file.steps, key=lambda step: -step.nbytes)] for file in group)
        for file, step in filter(None, chain.from_iterable(zip_longest(*largest_first))):
            if step in by_base and adapter is not None:
                # the adapter's step is carried out even if its file is finished: it writes the base's tensor
                order.append((tuple(of for of in (adapter, file) if of in files), (by_base.pop(step),)))
            else:
                order.append(((file,), (step,)))
    order.sort(key=lambda task: max(map(arrival, task[1])))
    if adapter is None or adapter not in files:
        return order
    if not any(step.in_turn for step in adapter.steps):
        left = {id(step) for step in by_base.values()}
        alone = (step for step in adapter.steps if step.beside is None or id(step) in left)
        return [*order, *(((adapter,), (step,)) for step in alone)]
    hashed = order[-1][0][0].size // 4 if order else 0
    left, place = (adapter.size - hashed) * (workers - 1), len(order)
    while left > 0 and place > 0:
        place -= 1
        left -= sum(step.nbytes for step in order[place][1])
    order.insert(place, ((adapter,), adapter.steps))
    return order


_WORKERS_A_FILE = 8
"""A file system lets one thread at a time write into a file; what so many encode, it takes."""


def _groups(files: Sequence[OutputFile], workers: int) -> Iterator[Sequence[OutputFile]]:
    """Files that are written at a time: no more than such a number of workers needs, as files end later by that.

    The last one, often the smallest, is written alone, while those before it are hashed.
    """
    first, last = files[:-1], files[-1:]
    count = -(-len(first) // max(1, workers // _WORKERS_A_FILE))
    size = -(-len(first) // max(1, count))
    for begin in range(0, len(first), max(1, size)):
        yield first[begin : begin + size]
    yield last


class _Sink:
    """Takes tensors to their files; those of files that are finished, or another process's, to none."""

    def __init__(self, writers: Iterable[FileWriter]) -> None:
        self._writers = {
            output.name: writer for writer in writers for step in writer.file.steps for output in step.outputs
        }

    def write(self, name: str, values: Tensor) -> None:
        """Append to a tensor, if it is to be written."""
        writer = self._writers.get(name)
        if writer is not None:
            with disk_errors(writer.path):
                writer.write(name, values)


class _Execution:
    """One run over all steps of a plan."""

    def __init__(
        self,
        plan: Plan,
        files: tuple[OutputFile, ...],
        directory: Path,
        inputs: Inputs,
        on_finished: Callable[[OutputFile, str], None],
        on_stopped: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._on_finished = on_finished
        self._on_stopped = on_stopped
        self._files = files
        self._directory = directory
        self._inputs = inputs
        self._source = plan.checkpoint.source
        is_coming = self._source.wait is not None or self._source.read_remote is not None
        self._places = {name: place for place, name in enumerate(plan.files_in_order)} if is_coming else {}
        self._watch = inputs.watch
        self._free = threading.Condition()
        self._free_bytes = plan.request.max_memory_bytes - plan.read_ahead_bytes
        self._stopped = threading.Event()
        self.hashes: dict[str, str] = {}

    def run(self) -> None:
        """Take the steps to workers; the first error stops all of them."""
        writers = {
            file: FileWriter(file, file.layout, self._directory, self._watch, self._advance)
            for file in self._files
            if file.layout is not None
        }
        work = in_order(tuple(writers), self._plan.adapter_file, self._plan.workers, self._arrival())
        sink = _Sink(writers.values())
        tasks = [
            *self._copies(),
            *((self._run, tuple(writers[file] for file in into), sink, steps) for into, steps in work),
        ]
        with ThreadPoolExecutor(self._plan.workers, thread_name_prefix="ftload") as pool:
            futures: list[Future[None]] = []
            try:
                futures += (pool.submit(run, *arguments) for run, *arguments in tasks)
                done, _ = wait(futures, None, FIRST_EXCEPTION)
                for future in futures:  # until all have stopped, more may fail: the first one tells
                    if future in done:
                        future.result()
            finally:
                self._stopped.set()
                if not all(future.done() for future in futures):
                    self._on_stopped()
                pool.shutdown(cancel_futures=True)
                for writer in writers.values():
                    writer.abandon()

    def _arrival(self) -> Callable[[Step], tuple[int, int]]:
        """The place of a step's last file among those that are on their way, and its last byte if that counts."""
        if not self._places:
            return lambda step: (0, 0)
        by_byte = self._source.read_remote is not None
        last = {
            name: max((self._places[part.file], part.end if by_byte else 0) for part in parts)
            for name, parts in self._plan.stored_parts.items()
        }
        return lambda step: max((last.get(output.name, (0, 0)) for output in step.outputs), default=(0, 0))

    def _copies(self) -> Iterator[tuple[Callable[..., None], Any, Any]]:
        """Files that are taken over whole: each is copied by one worker and, after it, hashed by another.

        They come from a hub as the model needs them, whatever their names.
        """
        for file in sorted(self._files, key=lambda file: self._places.get(file.path, 0)):
            if file.layout is None:
                tensors = [step.operation.source for step in file.steps if isinstance(step.operation, Cast)]
                source = self._source.root / file.path
                copy = FileCopy(source, self._directory / file.path, file.size, tensors, self._advance)
                yield self._copy, file, copy
                yield self._hash, file, copy

    def _copy(self, file: OutputFile, copy: FileCopy) -> None:
        try:
            place = self._source.place(file.path)
        except BaseException:
            copy.fail()
            raise
        with disk_errors(copy.target), self._watch.working("write"):
            if place is None:
                with self._source.at_work(), self._source.opened(file.path) as read:
                    copy.receive(read)
            elif self._plan.link:
                copy.link()
            else:
                copy.copy()
        self._advance(0, tensors=len(file.steps))

    def _hash(self, file: OutputFile, copy: FileCopy) -> None:
        with disk_errors(copy.target):
            with self._watch.working("hash"):
                digest = copy.hash()
            if digest:
                check_written(file, copy.target)
                self._finish(file, digest)

    def _run(self, writers: tuple[FileWriter, ...], sink: Sink, steps: tuple[Step, ...]) -> None:
        for step in steps:
            need = step.operation.memory(self._inputs.chunk_bytes)
            with self._reserved(need), self._source.at_work(), self._watch.working("convert"):
                step.operation.run(self._inputs, sink)
            self._advance(0, tensors=len(step.outputs))
        for writer in writers:
            self._close(writer, len(steps))

    def _close(self, writer: FileWriter, steps: int) -> None:
        """Count steps as done, and finish the file after the last of them."""
        with disk_errors(writer.path):
            if writer.finished(steps):
                with ThreadPoolExecutor(1) as aside:  # one waits for the disk, the other for the processor
                    with self._watch.working("write"):
                        writer.write_head()
                        digest = aside.submit(hash_file, writer.path)
                        writer.close()
                    with self._watch.working("hash"):
                        check_written(writer.file, writer.path)
                        self._finish(writer.file, digest.result())

    def _finish(self, file: OutputFile, digest: str) -> None:
        self.hashes[file.path] = digest
        self._on_finished(file, digest)

    @contextlib.contextmanager
    def _reserved(self, need: int) -> Iterator[None]:
        """Wait until so many bytes of the budget are free, and hold them."""
        with self._free:
            self._free.wait_for(lambda: self._free_bytes >= need)
            self._free_bytes -= need
        try:
            yield
        finally:
            with self._free:
                self._free_bytes += need
                self._free.notify_all()

    def _advance(self, count: int, tensors: int = 0) -> None:
        if self._stopped.is_set():
            raise _Stopped
        with self._free:
            self._watch.progress.advance(bytes=count, tensors=tensors)


class _Stopped(Exception):
    """Another worker failed; its error is the one that counts."""


def _draw_new_rows(skeleton: Skeleton, inputs: Inputs, grown: tuple[Grow, ...]) -> dict[str, Tensor]:
    """transformers' own mean-resizing, on a model that holds nothing but its embeddings.

    It needs the old matrix in float32 and its covariance: this, unlike all else, is not bounded by the budget.
    """
    from copy import deepcopy

    import torch

    model = deepcopy(skeleton.model)
    for grow in grown:
        value = inputs.read(grow.source, grow.dtype)
        _replace_parameter(model, grow.parameter, torch.nn.Parameter(value))
    with quiet_transformers():
        model.resize_token_embeddings(skeleton.rows_after)
    return {grow.name: model.get_parameter(grow.parameter).detach()[-grow.new_rows :] for grow in grown}


def _replace_parameter(model: PreTrainedModel, name: str, value: torch.nn.Parameter) -> None:
    """Put `value` in the place of a parameter under all its names: embeddings and biases are tied to one another."""
    old = model.get_parameter(name)
    for place, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter is old:
            module, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(module), leaf, value)
