"""`scripts/gpu_check`, as far as it goes without a GPU: its rehearsal runs the same code on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check"


def gpu_check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=1500)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the script runs for minutes")
def test_it_says_in_one_line_that_there_is_no_gpu() -> None:
    process = gpu_check()
    assert (process.returncode, process.stdout) == (5, "")
    assert process.stderr.startswith("gpu_check: nothing checked: ")
    assert process.stderr.count("\n") == 1


def rehearse(work: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run on the CPU, and its figures."""
    process = gpu_check("--rehearse", "--directory", work, "--json", work / "report.json", *arguments)
    return process, json.loads((work / "report.json").read_text())["results"]


@pytest.mark.parametrize("job", ["four-bit", "liger", "encode", "load", "flash"])
def test_each_job_can_be_rehearsed(job: str, tmp_path: Path) -> None:
    process, results = rehearse(tmp_path, "--jobs", job, "--seconds", "6000")
    assert process.returncode == 0, process.stderr
    assert results[job]["ok"] is True
    assert f"| {job} | ok (" in process.stdout
    found = results[job]
    if job == "four-bit":
        assert found["experts"]["cosine"] > 0.999
        assert found["small"]["gradients_finite"]
    elif job == "encode":
        assert (found["other_code_bytes"], found["other_maxima"]) == (0, 0)
        assert len(found["million_weights_per_second"]) == 3
    elif job == "load":
        assert {"full_seconds", "lora_seconds", "qlora_seconds"} < found.keys()
    else:
        assert found["lowest_cosine"] > 0.98
    assert not list(tmp_path.glob("ftload-gpu-*"))


def test_the_grid_of_memory_can_be_rehearsed(tmp_path: Path) -> None:
    process, results = rehearse(tmp_path, "--jobs", "memory", "--seconds", "6000")
    assert process.returncode == 0, process.stderr
    cells = results["memory"]["cells"]
    kinds = {
        (cell["method"], "--gradient_checkpointing" in cell["flags"], cell["mixed_precision"], cell["length"])
        for cell in cells
        if cell["model"] == "large" and "--no_use_flash_attn" not in cell["flags"]
    }
    assert len(kinds) == 3 * 2 * 2 * 2
    assert len(cells) == results["memory"]["measured"] == 40
    assert results["memory"]["groups_left_out"] == 0
    assert [cell["error"] for cell in cells] == [None] * 40
    assert all(cell["estimated_bytes"] > 0 and cell["phases"].keys() == {"forward", "backward", "optimizer"}
               for cell in cells)  # fmt: skip
    assert process.stdout.count("\n| large ") + process.stdout.count("\n| experts ") == 40


def test_where_time_runs_out_what_was_found_is_kept_and_the_rest_left_out(tmp_path: Path) -> None:
    process, results = rehearse(tmp_path, "--jobs", "memory", "load", "--seconds", "20")
    assert process.returncode == 1
    assert results["memory"]["ok"] is False
    assert results["load"] == {"ok": None, "skipped": "no time is left"}
    assert "| load | not checked | skipped: no time is left |" in process.stdout


def test_the_recorded_steps_are_printed_as_they_stand_among_the_benchmarks() -> None:
    process = gpu_check("--recorded")
    assert process.returncode == 0, process.stderr
    head, _, *rows = process.stdout.splitlines()
    benchmarks = (SCRIPT.parents[1] / "BENCHMARKS.md").read_text().splitlines()
    begin = benchmarks.index(head)
    assert len(rows) == 20
    assert benchmarks[begin + 2 : begin + 2 + len(rows)] == rows
