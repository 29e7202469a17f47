"""A model on disk: a directory, or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError, SourceError
from .file_names import ADAPTER_CONFIGS, CHAT_TEMPLATES
from .license import license_of_card
from .source import Source, SourceFile


def resolve_directory(model: str, revision: str | None, root: Path) -> Source:
    """The source that a directory is, by its absolute path."""
    files = list_files(root)
    _check_links(root, files)
    return Source(
        model=model,
        kind="local",
        revision=revision,
        commit=None,
        root=root,
        files=files,
        adapters=list_adapters(root),
        license=license_of_card(root),
    )


def resolve_file(model: str, revision: str | None, path: Path) -> Source:
    """The source that a GGUF file is, by its absolute path. Raises `SourceError` for any other file."""
    if path.suffix.lower() != ".gguf":
        hint = f"give the directory: `{path.parent}`"
        raise SourceError(f"`{model}` is a file, but not a .gguf file", hint=hint)
    return Source(
        model=model,
        kind="gguf",
        revision=revision,
        commit=None,
        root=path.parent,
        files=(_listed(path, path.parent),),
        gguf_file=path.name,
    )


def list_files(root: Path) -> tuple[SourceFile, ...]:
    """The files at the top level and in `additional_chat_templates/`, sorted."""
    templates = root / CHAT_TEMPLATES
    paths = [*root.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    # is_file is false for a link to nothing, such as the cache leaves when a blob is deleted
    files = [_listed(path, root) for path in paths if path.is_file()]
    return tuple(sorted(files, key=lambda file: file.path))


def list_adapters(root: Path) -> tuple[str, ...]:
    """Where a directory holds adapters: the paths of their adapter_config.json."""
    return tuple(name for name in ADAPTER_CONFIGS if (root / name).is_file())


def _check_links(root: Path, files: Iterable[SourceFile]) -> None:
    """Refuse links that lead out of a model: what they lead to could be anybody's file, and would be copied.

    Weights may be links, since nothing but tensors is read from them. So may the files of a hub's cache, which are
    links to its blobs.
    """
    allowed = (root, root.parent.parent / "blobs")
    for file in files:
        path = root / file.path
        target = path.resolve()
        if file.path.endswith((".safetensors", ".bin", ".gguf")) or any(target.is_relative_to(p) for p in allowed):
            continue
        raise CheckpointError(
            f"`{path}` is a link to `{target}`, out of the model's directory", hint="put the file itself there"
        )


def _listed(path: Path, root: Path) -> SourceFile:
    found = path.stat()
    return SourceFile(
        path=path.relative_to(root).as_posix(), bytes=found.st_size, sha256=None, mtime_ns=found.st_mtime_ns
    )
