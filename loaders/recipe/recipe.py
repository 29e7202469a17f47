"""The recipe for one trainer: refused with the reason where the trainer can't take the directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, SourceError, UsageError
from ..report.handed_over import hand_over
from ..report.outputs import prepared_root, read_report
from ..system.durable import disk_errors
from ..trainers.recipe_text import recipe_text
from ..trainers.registry import TRAINERS

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The file with which a trainer takes a prepared directory."""

    trainer: str
    directory: str
    file: str
    """Where it was written, or what it is best called."""
    text: str
    launch: str
    """The command line that runs it."""
    notes: tuple[str, ...]
    """What the trainer does otherwise than planned."""
    tested: Mapping[str, str]
    """Distribution to version."""


def make_recipe(directory: Path, trainer_name: str, *, data: str | None = None, output: Path | None = None) -> Recipe:
    """The recipe of `trainer_name` for `directory`; written to `output` where that is given.

    Raises `UsageError` where the trainer is not known or can't take the directory, `SourceError` and `CheckpointError`
    where the directory is none that ftload prepared, `OutputError` where `output` exists or can't be written.
    """
    trainer = TRAINERS.get(trainer_name)
    if trainer is None:
        raise UsageError(f"`--for {trainer_name}`: no such trainer", hint=f"known are {', '.join(TRAINERS)}")
    root = prepared_root(directory)
    handover = hand_over(read_report(root), str(root), data=data)
    if data is not None and handover.data[0].startswith("/") and not Path(handover.data[0]).is_file():
        raise SourceError(
            f"`--data {data}`: no such file", hint="give a .json or .jsonl file of conversations, or a hub id"
        )
    refusal = trainer.refusal(handover)
    if refusal is not None:
        raise UsageError(f"{trainer.title} can't train `{directory}`: {refusal.reason}", hint=refusal.hint)
    file = trainer.file_name if output is None else str(output)
    text = recipe_text(trainer, handover, file)
    if output is not None:
        with disk_errors(output):
            try:
                with output.open("x", encoding="utf-8") as stream:
                    stream.write(text)
            except FileExistsError as error:
                raise OutputError(f"`{output}` exists", hint="choose another --output") from error
    return Recipe(
        trainer=trainer.name,
        directory=str(root),
        file=file,
        text=text,
        launch=trainer.launch(handover, file),
        notes=trainer.notes(handover),
        tested=trainer.tested,
    )
