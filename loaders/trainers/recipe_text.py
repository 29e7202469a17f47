"""The text of a recipe: a head of comments that every recipe has, and the trainer's own body."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..system.safe_text import escaped
from .interface import Handover, Trainer


def recipe_text(trainer: Trainer, handover: Handover, file: str) -> str:
    """The complete file. All languages of recipes begin a comment with `#`."""
    versions = ", ".join(f"{name} {version}" for name, version in trainer.tested.items())
    paragraphs = [
        f"{trainer.title}: trains {handover.directory} ({handover.strategy}), as ftload {handover.ftload_version} "
        "prepared it.",
        f"Run: {trainer.launch(handover, file)}",
        f"Tested with {versions}.",
        *(f"- {note}" for note in trainer.notes(handover)),
    ]
    return "\n".join(line for paragraph in paragraphs for line in _comment(paragraph)) + "\n\n" + trainer.body(handover)


def yaml_text(values: Mapping[str, Any]) -> str:
    """Keys and values as YAML, in their order. No string can become anything else, and none leaves its key's lines."""
    import yaml  # the command line imports this file, and has no YAML to write

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10**6)


def _comment(paragraph: str) -> list[str]:
    # a path can hold a newline: what follows it must stay a comment
    if paragraph.startswith("Run: "):
        return [f"# {escaped(paragraph)}"]
    later = "#   " if paragraph.startswith("- ") else "# "
    return textwrap.wrap(
        escaped(paragraph),
        width=120,
        initial_indent="# ",
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
