"""What every test can use."""

from __future__ import annotations

import sys
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
def ftload(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process: `ftload("prepare", "--model", …)`."""

    def run(*words: str | Path) -> Result:
        from ftload.cli.app import main

        monkeypatch.setattr(sys, "argv", ["ftload", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capfd.readouterr()
        return Result(code=int(raised.value.code or 0), out=out, err=err)

    return run
