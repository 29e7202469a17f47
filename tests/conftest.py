"""What every test can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .parity.models import write_model
from .tokenizers import write_llama

ROWS = 144
"""Of the tiny Llama's embedding: more than the 129 tokens that a tokenizer of 128 and its new pad token make."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def ftload(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process: `ftload("prepare", "--model", …)`."""

    def run(*words: str | Path) -> Result:
        from ftload.cli.app import run as run_command_line

        capfd.readouterr()
        code = run_command_line([str(word) for word in words])
        out, err = capfd.readouterr()
        return Result(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, whole, in bfloat16, with its tokenizer; tests don't change it."""
    directory = tmp_path_factory.mktemp("llama") / "model"
    write_model(directory, "llama", vocab_size=ROWS, dtype="bfloat16")
    write_llama(directory)
    return directory
