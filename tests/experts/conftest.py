"""Checkpoints that several tests load and none changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a name (`MODELS`), written once; beside it, `NAME plain` is the model in bfloat16."""
    root = tmp_path_factory.mktemp("experts")

    def write(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else write_checkpoint(directory, name)

    return write
