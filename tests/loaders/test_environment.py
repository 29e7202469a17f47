"""The memory that control groups leave, on trees as they look in containers, under Slurm and under systemd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.doctor.machine import look_at_machine
from ftload.loaders.system.limits import available_memory_bytes, usable_processors

MB = 10**6


def write_group(directory: Path, version: int, limit: str, used: int, cached: int) -> None:
    limit_file, used_file, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    # of version 1, what has no prefix leaves out the groups below
    stat = {"inactive_file": 0, "active_file": 0}
    stat |= {f"{prefix}inactive_file": cached // 4, f"{prefix}active_file": cached - cached // 4}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / limit_file).write_text(f"{limit}\n")
    (directory / used_file).write_text(f"{used}\n")
    (directory / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("ftload.loaders.system.limits._GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("ftload.loaders.system.limits._OWN_GROUPS", tmp_path / "own")
    return tmp_path / "cgroup"


def test_the_own_group_counts_and_not_only_the_root(groups: Path) -> None:
    (groups.parent / "own").write_text("0::/system.slice/job.service\n")
    write_group(groups / "system.slice", 2, "max", 900 * MB, 0)
    write_group(groups / "system.slice/job.service", 2, str(300 * MB), 250 * MB, 40 * MB)
    assert available_memory_bytes() == 90 * MB


def test_a_group_further_up_may_leave_less(groups: Path) -> None:
    (groups.parent / "own").write_text("7:blkio:/\n4:memory:/slurm/job_1/step_0\n0::/\n")
    write_group(groups / "memory", 1, str(2**63 - 4096), 0, 0)
    write_group(groups / "memory/slurm/job_1", 1, str(200 * MB), 190 * MB, 20 * MB)
    write_group(groups / "memory/slurm/job_1/step_0", 1, str(300 * MB), 100 * MB, 0)
    assert available_memory_bytes() == 30 * MB


def test_a_container_sees_its_group_at_the_root(groups: Path) -> None:
    (groups.parent / "own").write_text("4:memory:/docker/0123456789ab\n")
    write_group(groups / "memory", 1, str(100 * MB), 150 * MB, 0)
    assert available_memory_bytes() == 0


def test_without_control_groups_the_machine_counts(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def meminfo(path: Path, *arguments: Any) -> str:
        return "MemTotal: 900 kB\nMemAvailable: 700 kB\n" if path == Path("/proc/meminfo") else read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", meminfo)
    assert available_memory_bytes() == 700 * 1024


@pytest.mark.parametrize(
    ("allowed", "usable"),
    [("50000 100000", 1), ("100000 100000", 1), ("110000 100000", 2), ("900000 100000", 3), ("max 100000", 3)],
)
def test_processors_are_as_many_as_their_time_allows(
    groups: Path, monkeypatch: pytest.MonkeyPatch, allowed: str, usable: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    (groups.parent / "own").write_text("0::/job\n")
    (groups / "job").mkdir(parents=True)
    (groups / "job/cpu.max").write_text(allowed)
    assert usable_processors() == usable


def test_a_quota_of_version_1_counts_and_none_is_minus_one(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    (groups.parent / "own").write_text("6:cpu,cpuacct:/job\n")
    for group, quota in (("cpu", -1), ("cpu/job", 150_000)):
        (groups / group).mkdir(parents=True, exist_ok=True)
        (groups / group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (groups / group / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_processors() == 2


def test_the_doctor_tells_the_least_of_all_groups(groups: Path) -> None:
    (groups.parent / "own").write_text("0::/a/b\n")
    for group, limit, quota in (("a", "200", "150000 100000"), ("a/b", "max", "max 100000")):
        write_group(groups / group, 2, limit if limit == "max" else str(200 * MB), 0, 0)
        (groups / group / "cpu.max").write_text(quota)
    found = {finding.name: finding.facts for finding in look_at_machine()}
    assert found["memory"]["limit_bytes"] == 200 * MB
    assert found["memory"]["available_bytes"] == 200 * MB
    assert found["processors"]["quota"] == 1.5


_HOLES = """
import torch
from ftload.loaders.system.limits import give_back_large_blocks

def anonymous():
    return int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0]) * 1024

give_back_large_blocks()
torch.ones(30 * 2**20, dtype=torch.uint8)  # freed: glibc raises its bound
before = anonymous()
blocks = [torch.ones(10 * 2**20 if number % 2 else 100, dtype=torch.uint8) for number in range(20)]
del blocks[1::2]
print(anonymous() - before)
"""


def test_large_blocks_are_given_back_when_they_are_freed() -> None:
    """Left to itself, glibc keeps 40 to 100 MB of these."""
    kept = subprocess.run([sys.executable, "-c", _HOLES], check=True, capture_output=True).stdout
    assert int(kept) < 2**20
