"""What every test can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


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
