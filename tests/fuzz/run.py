"""Running hostile inputs through the command line, in this process, and judging what comes of them."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ftload.cli.app import run

from ..parity.models import write_model
from ..tokenizers import write_gpt2, write_llama
from .cases import Case

MAX_SECONDS = 5
"""Of processor time, so that a busy machine does not count."""
MAX_BYTES = 500 * 10**6
CODES = frozenset({0, 2, 3, 4, 5, 6, 8})
"""The contract, without 1, which is a bug, and 7, which says that what was written is not what was planned."""


class Violation(AssertionError):
    """What must not happen."""


def write_bases(directory: Path) -> dict[str, Path]:
    """The good models: in one file, in shards, with other modules, and 4-bit."""
    llama, shards, gpt2, packed = (directory / name for name in ("llama", "shards", "gpt2", "packed"))
    write_model(llama, "llama", vocab_size=128, dtype="bfloat16")
    write_model(shards, "qwen3_moe", vocab_size=136, dtype="float16", shards=True)
    write_model(gpt2, "gpt2", vocab_size=264, dtype="float32")
    for path in (llama, shards):
        write_llama(path, vocab_size=128)
    write_gpt2(gpt2)
    assert run(["prepare", "--model", str(llama), "--output_dir", str(packed), "--use_qlora", "--quiet"]) == 0
    shutil.rmtree(packed / "adapter")
    return {path.name: path for path in (llama, shards, gpt2, packed)}


def check(case: Case, bases: dict[str, Path], work: Path) -> int:
    """Run a case; returns the exit code. Raises `Violation`."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    model = work / "model"
    shutil.copytree(bases[case.base], model)
    case.plant(model)
    out = work / "out"
    words = ["prepare"]
    flags = list(case.flags)
    if flags[:1] == ["run.yaml"]:
        words.append(str(model / flags.pop(0)))
    words += ["--model", str(model), "--output_dir", str(out), "--lora_rank", "2", *flags]
    if "own.jinja" in flags:
        words[words.index("own.jinja")] = str(model / "own.jinja")
    before = _list(work)
    stdout, stderr = io.StringIO(), io.StringIO()
    memory = _peak()
    begin = time.process_time()
    with _time_limit(4 * MAX_SECONDS), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        here = Path.cwd()
        os.chdir(work)  # an output whose name is spoilt too must not land among the sources
        try:
            code = run(words)
        finally:
            os.chdir(here)
    seconds = time.process_time() - begin
    lines = stderr.getvalue().splitlines()
    problems = []
    if code not in CODES:
        problems.append(f"exit code {code}")
    if seconds > MAX_SECONDS:
        problems.append(f"{seconds:.1f} s of processor time")
    if _peak() - memory > MAX_BYTES:
        problems.append(f"{(_peak() - memory) / 1e6:.0f} MB more memory")
    if any(not character.isprintable() for line in lines for character in line):
        problems.append("control characters on stderr")
    if code == 0 and "--quiet" not in flags and not stdout.getvalue():
        problems.append("exit code 0 and no word")
    if code == 0 and not {"-h", "--help"} & {*flags} and not any(work.rglob("ftload_report.json")):
        problems.append("exit code 0 and no output")
    if code != 0:
        if _list(work) != before:
            problems.append(f"left behind: {sorted(_list(work) - before)[:3]}")
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or not (lines[0].startswith("error: ") and len(lines) <= 2):
            problems.append("not one line and a hint")
    if code == 1:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            run([*words, "--debug"])
        lines = stderr.getvalue().splitlines()[-12:]
    if problems:
        raise Violation(f"{'; '.join(problems)}\n{case!r}\n" + "\n".join(lines))
    return code


def _list(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """End a case after so many seconds of processor time, or when it has waited for something for very long."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Violation(f"still running after {seconds} s of processor time, or waiting after {_PATIENCE_SECONDS} s")

    limits = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, _PATIENCE_SECONDS)}
    old = {number: signal.signal(number, stop) for number in limits}
    for timer, limit in limits.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in limits.items():
            signal.setitimer(timer, 0)
            signal.signal(number, old[number])


_PATIENCE_SECONDS = 300
