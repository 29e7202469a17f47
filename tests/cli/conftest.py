"""What tests of commands share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to break or change."""
    return Path(shutil.copytree(llama, tmp_path / "source" / "model"))
