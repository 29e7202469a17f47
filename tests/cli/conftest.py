"""A tiny Llama for the tests of commands, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ..parity.models import write_model
from ..tokenizers import write_llama

ROWS = 144
"""Of the embedding: more than the 129 tokens that a tokenizer of 128 and its new pad token make."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bfloat16 model with its tokenizer; tests don't change it."""
    directory = tmp_path_factory.mktemp("llama") / "model"
    write_model(directory, "llama", vocab_size=ROWS, dtype="bfloat16")
    write_llama(directory)
    return directory


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of it to break or change."""
    return Path(shutil.copytree(llama, tmp_path / "source" / "model"))
