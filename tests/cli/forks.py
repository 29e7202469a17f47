"""Runs the command line in forks of one process that has imported everything, as often as one likes.

    with Forks(model, env, directory) as forks:
        code, err = forks.run("prepare", "--model", …).end()

Waits between attempts, ftload's own and its libraries', are cut to nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

GUARD_SECONDS = 120
"""After which a run that hangs is ended."""


@dataclass
class Run:
    """A run that was begun; only one is at a time."""

    pid: int
    forks: Forks

    def end(self) -> tuple[int, str]:
        """Wait for its end; returns its exit code and what it wrote to stderr."""
        code = int(self.forks.answer())
        return code, self.forks.stderr.read_text()


class Forks:
    """The process that has imported everything, which forks a run for each line of JSON that it reads."""

    def __init__(self, model: Path, env: Mapping[str, str], directory: Path) -> None:
        """`model` is a local one, which is planned once: this imports what runs import."""
        self.stderr = directory / "stderr.txt"
        command = [sys.executable, "-m", "tests.cli.forks", str(model), str(self.stderr)]
        env = {**env, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=env, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(GUARD_SECONDS)

    def run(self, *words: str | Path) -> Run:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self._process.stdin.flush()
        return Run(pid=int(self.answer()), forks=self)

    def answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "it ended"
        return line


def main() -> None:
    """Fork a run for each line; say its process id, and its exit code once it has ended."""
    from ftload.cli.app import main as ftload
    from ftload.cli.app import run
    from ftload.loaders.nf4 import encode
    from ftload.loaders.source import hub  # noqa: F401

    model, stderr = sys.argv[1:]
    assert encode.numba_problem() is None
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(["plan", "--model", model, "--use_qlora"]) == 0
    wait = time.sleep
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            time.sleep = lambda seconds: wait(min(seconds, 0.01))
            sys.argv = ["ftload", *json.loads(line)]
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            faulthandler.register(signal.SIGALRM, file=2, chain=True)  # where each thread hung
            signal.alarm(GUARD_SECONDS)
            ftload()
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
