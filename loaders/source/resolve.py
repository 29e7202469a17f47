"""From the name of a model to its source: a directory, a GGUF file, or a repository on a hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError, UsageError, said_by
from ..flags.model_page import repository_of
from ..system.safe_text import masked
from .hub import resolve_hub
from .local import resolve_directory, resolve_file
from .source import Source


def resolve_source(model: str, revision: str | None) -> Source:
    """Find the model: a directory, a `.gguf` file, or a repository on the hub, by name or by its page's address.

    What is on disk wins. Raises `SourceError` when there is nothing to be found or no way to it, `UsageError`
    when `model` is empty.
    """
    if not model:
        raise UsageError("the name of the model is empty")
    model, revision = repository_of(model, revision)
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return resolve_directory(model, revision, path.resolve())
        if path.is_file():
            return resolve_file(model, revision, path.parent.resolve() / path.name)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        reason = error.strerror if isinstance(error, OSError) else said_by(error)
        raise SourceError(f"can't read `{masked(model)}`: {reason}") from error
    if _looks_like_path(model):
        hint = "check the path; a repository on the hub is given as `organisation/name`"
        raise SourceError(f"`{masked(model)}` does not exist", hint=hint)
    return resolve_hub(model, revision)


def _looks_like_path(model: str) -> bool:
    """Whether a name that is not on disk was meant to be: such a name is never sent to a hub."""
    is_file_name = "/" not in model and model.lower().endswith((".gguf", ".safetensors", ".bin"))
    is_path = model.startswith(("/", "./", "../", "~")) or model.endswith("/") or "\\" in model
    return is_path or is_file_name or model.count("/") > 1
