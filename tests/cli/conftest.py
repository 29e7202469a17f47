"""A tiny Llama for the tests of commands, made once, and the checks that all of them share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def prepare(ftload: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Run `ftload prepare` with `--json`, which must succeed; returns the report."""

    def run(model: str | Path, output: Path, *flags: str | Path) -> dict[str, Any]:
        result = ftload("prepare", "--model", model, "--output_dir", output, "--lora_rank", "8", "--json", *flags)
        assert (result.code, result.err) == (0, "")
        return json.loads(result.out)

    return run
