"""Kills `ftload prepare` at random instants and runs it again; prints what came of it as one JSON document.

A script of its own, so that everything is imported once and each trial is a fork.

    kill_trials.py MODEL WORK COUNT SEED
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from ftload.cli.app import run

STRATEGIES = {
    "standard": ["--max_shard_size", "30KB"],
    "copied": [],
    "linked": ["--base", "link"],
    "lora": ["--use_lora", "--base", "copy"],
    "qlora": ["--use_qlora", "--max_shard_size", "30KB"],
    "replacing": ["--use_qlora", "--max_shard_size", "30KB", "--overwrite"],
}


def start(model: Path, out: Path, flags: list[str], *, killed_after: float = 0) -> int:
    """Fork a run; returns its process id.

    The system kills it once it has used so many seconds of processor time, if any: how busy the machine is, and what a
    disk makes a run wait for, has no part in where that is.
    """
    pid = os.fork()
    if pid:
        return pid
    signal.setitimer(signal.ITIMER_PROF, killed_after)  # nothing in the run handles its signal, which ends it at once
    words = ["prepare", "--model", str(model), "--output_dir", str(out), "--lora_rank", "8", "--quiet", *flags]
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123
        os._exit(run(words))


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def time_of(pid: int) -> float:
    """The processor time that a run takes, in seconds; it must succeed."""
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_utime + usage.ru_stime


def hash_all(directory: Path) -> dict[str, str]:
    """sha256 of every file but the report, which holds times."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("ftload_report.json", "README.md")
    }


def is_whole(directory: Path) -> bool:
    """Whether every file is there as the report tells."""
    report = json.loads((directory / "ftload_report.json").read_text())
    return {f["path"]: f["sha256"] for f in report["files"] if f["path"] != "README.md"} == hash_all(directory)


def finished_files(work: Path) -> dict[str, int]:
    """Inode by path of the files that a journal lists."""
    found = {}
    for journal in work.glob(".out.ftload-*/journal-*"):
        for line in journal.read_text().splitlines()[1:]:
            with contextlib.suppress(ValueError, OSError):
                path = json.loads(line)["path"]
                found[path] = (journal.parent / "output" / path).stat().st_ino
    return found


def main() -> None:
    model, work, count, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    chance = random.Random(seed)
    out = work / "out"
    assert finish(start(model, out, STRATEGIES["qlora"])) == 0  # numba's cache is filled
    expected, seconds = {}, {}
    import ftload.loaders.nf4.encode as nf4

    assert nf4.numba_problem() is None
    from transformers import LlamaForCausalLM  # noqa: F401

    for name, flags in STRATEGIES.items():
        shutil.rmtree(out, ignore_errors=True)
        seconds[name] = time_of(start(model, out, flags))
        expected[name] = hash_all(out)
    shutil.rmtree(out)
    tally = {"trials": 0, "killed": 0, "absent": 0, "whole": 0, "resumed": 0, "files_kept": 0}
    for trial in range(count):
        name = list(STRATEGIES)[trial % len(STRATEGIES)]
        flags = STRATEGIES[name]
        if name == "replacing":
            assert finish(start(model, out, STRATEGIES["standard"])) == 0
        # half of them in the last third, where files are written and published
        share = chance.choice((chance.random(), 0.6 + 0.5 * chance.random()))
        code = finish(start(model, out, flags, killed_after=seconds[name] * share))
        killed = code == -signal.SIGPROF
        assert killed or code == 0, (trial, name, code)
        tally["trials"] += 1
        tally["killed"] += killed
        if not killed:
            seconds[name] *= 0.95  # it takes less than when it was timed
        if out.exists():
            assert is_whole(out), (trial, name)
            tally["whole"] += 1
        else:
            tally["absent"] += 1
        finished = finished_files(work)
        code = finish(start(model, out, flags))
        assert code == 0, (trial, name, code)
        assert hash_all(out) == expected[name], (trial, name)
        assert sorted(path.name for path in work.iterdir()) == ["out"], (trial, name, list(work.iterdir()))
        kept = [path for path, inode in finished.items() if (out / path).stat().st_ino == inode]
        assert len(kept) == len(finished), (trial, name, finished)
        tally["resumed"] += bool(kept)
        tally["files_kept"] += len(kept)
        shutil.rmtree(out)
    print(json.dumps({**tally, "seconds": seconds}))


if __name__ == "__main__":
    main()
