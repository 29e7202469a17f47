"""The same inputs and arguments give the same bytes, whatever the hash seed and the number of threads."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..parity.models import write_model
from ..tokenizers import write_llama

TIMES = {"created", "timings", "work", "peak_anonymous_bytes", "peak_rss_bytes"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("flags", [[], ["--use_lora", "--base", "copy"], ["--use_qlora", "--min_quantized", "0"]])
def test_only_times_differ(tmp_path: Path, architecture: str, flags: list[str]) -> None:
    write_model(tmp_path / "model", architecture, vocab_size=128, dtype="float32", shards=True)
    write_llama(tmp_path / "model", vocab_size=128)
    results = []
    for seed, threads in (("0", "1"), ("1", "2"), ("4242", "7")):
        out = tmp_path / "out"
        words = ["--model", tmp_path / "model", "--output_dir", out, "--embedding_init", "reference", *flags, "--quiet"]
        command = [sys.executable, "-m", "ftload.cli", "prepare", *map(str, words)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": "1"}
        if threads == "1":
            command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), *command]
        subprocess.run(command, check=True, timeout=600, env=environment)
        report = json.loads((out / "ftload_report.json").read_text())
        results.append((hash_all(out), {key: value for key, value in report.items() if key not in TIMES}))
        out.rename(tmp_path / f"out-{seed}")
    assert results[0] == results[1] == results[2]


def hash_all(directory: Path) -> dict[str, Any]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "ftload_report.json"
    }
