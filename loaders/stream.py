"""Executing a plan: every output file is written once, tensor by tensor, each at its place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .checkpoint import TORCH_NAMES, Checkpoint, read_header
from .errors import FtloadError, OutputError, ResourceError, VerificationError
from .operations import Grow, Inputs
from .plan import OutputFile, Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from .skeleton import Skeleton


class Progress(Protocol):
    """Hears how far the work has come."""

    def stage(self, name: str) -> None:
        """A new stage begins."""
        ...

    def expect(self, *, bytes: int, tensors: int) -> None:
        """This much will be written."""
        ...

    def advance(self, *, bytes: int, tensors: int) -> None:
        """This much more has been written."""
        ...


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str) -> None:
        """Say nothing."""

    def expect(self, *, bytes: int, tensors: int) -> None:
        """Say nothing."""

    def advance(self, *, bytes: int, tensors: int) -> None:
        """Say nothing."""


def write_tensors(plan: Plan, directory: Path, progress: Progress) -> None:
    """Write all safetensors files of `plan` into `directory` and check that they are what was planned.

    Random numbers are drawn in the reference's order: seed, new embedding rows, adapter.
    """
    import torch

    progress.expect(
        bytes=sum(file.layout.size for file in plan.files),
        tensors=sum(len(step.outputs) for file in plan.files for step in file.steps),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.request.seed)
        new_rows: Mapping[str, Tensor] = {}
        if plan.grown and plan.request.embedding_init == "reference":
            new_rows = _draw_new_rows(plan.skeleton, plan.checkpoint, plan.grown)
        inputs = Inputs(checkpoint=plan.checkpoint, new_rows=new_rows)
        # the adapter first: its draws follow those of the embeddings
        for file in reversed(plan.files):
            _write_file(file, directory, inputs, progress)
    for file in plan.files:
        _check_written(file, directory)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Name the file when writing fails: `ResourceError` for a full or failing disk, `OutputError` for permissions."""
    try:
        yield
    except FtloadError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"can't write `{path}`: {reason}", hint="choose another --output_dir") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"can't write `{path}`: {reason}", hint="free some disk space") from error
        raise ResourceError(f"can't write `{path}`: {reason}") from error


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Make a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _FileWriter:
    """A sink that puts each tensor's bytes where the layout wants them."""

    def __init__(self, descriptor: int, file: OutputFile, advance: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._positions = file.layout.offsets()
        self._ends = {tensor.name: self._positions[tensor.name] + tensor.nbytes for tensor in file.layout.fixed}
        self._states: dict[str, bytes] = {tensor.name: b"" for tensor in file.layout.variable}
        self._file = file
        self._advance = advance

    def write(self, name: str, values: Tensor) -> None:
        import torch

        data = memoryview(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if name in self._states:
            self._states[name] += bytes(data)
        else:
            position = self._positions[name]
            if position + len(data) > self._ends[name]:
                raise VerificationError(f"tensor `{name}` came out larger than planned")
            _write_at(self._descriptor, data, position)
            self._positions[name] = position + len(data)
        self._advance(len(data))

    def close(self) -> None:
        short = [name for name, end in self._ends.items() if self._positions[name] != end]
        if short:
            raise VerificationError(f"tensor `{short[0]}` came out smaller than planned")
        _write_at(self._descriptor, memoryview(self._file.layout.head(self._states)), 0)
        os.fsync(self._descriptor)


def _write_file(file: OutputFile, directory: Path, inputs: Inputs, progress: Progress) -> None:
    path = directory / file.path
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with disk_errors(path):
            writer = _FileWriter(descriptor, file, lambda count: progress.advance(bytes=count, tensors=0))
            for step in file.steps:
                step.operation.run(inputs, writer)
                progress.advance(bytes=0, tensors=len(step.outputs))
            writer.close()
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data = data[count:]
        position += count


def _check_written(file: OutputFile, directory: Path) -> None:
    """Read the header back: names, dtypes, shapes and the size must be the planned ones."""
    path = directory / file.path
    size = path.stat().st_size

    def read(begin: int, end: int) -> bytes:
        with path.open("rb") as opened:
            opened.seek(begin)
            return opened.read(end - begin)

    written = {meta.name: meta for meta in read_header(file.path, size, read)}
    planned = {tensor.name: tensor for step in file.steps for tensor in step.outputs}
    if size != file.layout.size or written.keys() != planned.keys():
        raise VerificationError(f"`{file.path}` is not what was planned")
    for name, tensor in planned.items():
        found = written[name]
        if found.dtype != tensor.dtype or (found.shape != tensor.shape and not tensor.variable):
            raise VerificationError(f"tensor `{name}` of `{file.path}` is not what was planned")


def _draw_new_rows(skeleton: Skeleton, checkpoint: Checkpoint, grown: tuple[Grow, ...]) -> dict[str, Tensor]:
    """transformers' own mean-resizing, on a model that holds nothing but its embeddings.

    It needs the old matrix in float32 and its covariance: this, unlike all else, is not bounded by a chunk.
    """
    from copy import deepcopy

    import torch

    from .skeleton import quiet_transformers

    model = deepcopy(skeleton.model)
    for grow in grown:
        value = checkpoint.read(grow.source).to(getattr(torch, TORCH_NAMES[grow.dtype]))
        _set_parameter(model, grow.parameter, torch.nn.Parameter(value))
    if skeleton.tied and skeleton.head is not None:
        _set_parameter(model, skeleton.head, model.get_parameter(skeleton.embedding))
    with quiet_transformers():
        model.resize_token_embeddings(skeleton.rows_after)
    return {grow.name: model.get_parameter(grow.parameter).detach()[-grow.new_rows :] for grow in grown}


def _set_parameter(model: PreTrainedModel, name: str, value: torch.nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, value)
