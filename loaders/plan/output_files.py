"""How the output's tensors are divided into files."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.checkpoint import Checkpoint
from ..steps.plain import Cast
from ..steps.step import Step
from .layout import Layout, lay_out


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputFile:
    """One safetensors file: what is written into it, and where."""

    path: str
    """Relative to the output directory."""
    steps: tuple[Step, ...]
    layout: Layout | None
    """None for a file of the checkpoint that is taken over whole."""
    size: int
    """In bytes."""


def divide(steps: tuple[Step, ...], max_bytes: int) -> tuple[OutputFile, ...]:
    """Steps in the order of the model, in as few files of at most `max_bytes` as that order allows."""
    shards: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if shards[-1] and size + step.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += step.nbytes
    if len(shards) == 1:
        return (output_file("model.safetensors", tuple(steps)),)
    return tuple(
        output_file(f"model-{number:05d}-of-{len(shards):05d}.safetensors", tuple(shard))
        for number, shard in enumerate(shards, start=1)
    )


def unchanged_files(checkpoint: Checkpoint, steps: tuple[Step, ...], max_bytes: int) -> tuple[OutputFile, ...]:
    """The checkpoint's own files, where all their tensors are written as they are and none is too large; else none."""
    kept = {
        step.operation.source.name: step
        for step in steps
        if isinstance(step.operation, Cast) and step.operation.changes_nothing
    }
    if checkpoint.pickled or len(kept) != len(steps) or kept.keys() != checkpoint.stored.keys():
        return ()
    sizes = {file.path: file.bytes for file in checkpoint.source.files}
    if max(sizes[name] for name in checkpoint.weight_files) > max_bytes:
        return ()
    by_file: dict[str, list[Step]] = {name: [] for name in checkpoint.weight_files}
    for name, step in kept.items():
        by_file[checkpoint.stored[name].file].append(step)
    return tuple(
        OutputFile(path=name, steps=tuple(by_file[name]), layout=None, size=sizes[name])
        for name in checkpoint.weight_files
    )


def output_file(path: str, steps: tuple[Step, ...]) -> OutputFile:
    """One file for these steps, laid out."""
    layout = lay_out(output for step in steps for output in step.outputs)
    return OutputFile(path=path, steps=steps, layout=layout, size=layout.size)
