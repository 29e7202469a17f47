"""Probes, each run in a process of its own: a library that exits, crashes or hangs ends nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..system.limits import usable_processors

PROBE_SECONDS = 120.0
"""How long a library may take: compiling the encoder for the first time takes ten."""
Answers = Mapping[str, Mapping[str, Any]]
"""What probes answered, by name: `detail` and other facts, or `problem`."""


def run_probes(names: list[str], seconds: float) -> Answers:
    """Run probes, as many at a time as there are processors; one that takes longer than `seconds` counts as hanging."""
    running: list[subprocess.Popen[bytes]] = []
    workers = min(8, usable_processors())
    with ThreadPoolExecutor(workers) as pool:
        try:
            return dict(zip(names, pool.map(lambda name: run_probe(name, seconds, running), names), strict=True))
        except BaseException:  # Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.kill()
            raise


def run_probe(name: str, seconds: float, running: list[subprocess.Popen[bytes]]) -> dict[str, Any]:
    """The answer of one of `probes.PROBES`, or the `problem` that kept it from answering.

    Its process is added to `running`, so that another thread can end it.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    # -P: what lies in the current directory is not a library
    command = [sys.executable, "-P", "-m", "ftload.loaders.doctor.probes", name, str(writing)]
    silent = subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent, pass_fds=(writing,))
        running.append(process)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return {"problem": f"hangs: no answer within {seconds:g} s"}
        try:
            return json.loads(os.read(reading, 1_000_000))
        except (BlockingIOError, ValueError):
            pass
    finally:
        os.close(reading)
        os.close(writing)
    how = f"crashes ({signal.Signals(-code).name})" if code < 0 else f"ends the process (exit code {code})"
    return {"problem": f"{how} while it is imported"}
