"""Processors and memory that this process may use, control groups included."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


class PeakMemory:
    """The largest anonymous memory of this process while a `with` block runs, sampled a hundred times a second."""

    def __init__(self) -> None:
        self.anonymous_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ftload-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGESIZE")
        while True:
            # resident less shared: what file-backed pages do not explain (proc(5))
            resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
            self.anonymous_bytes = max(self.anonymous_bytes, (int(resident) - int(shared)) * page)
            if self._done.wait(0.01):
                return


def control_groups(controller: str) -> Iterator[Path]:
    """The control groups that confine this process, from its own to the root, of both versions (cgroups(7)).

    A container may see its own group at the root, under another name: some of these directories may not exist.
    """
    try:
        own = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # a system without control groups
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controller if controllers else _GROUPS
        group = root / path.lstrip("/")
        yield from (directory for directory in (group, *group.parents) if directory.is_relative_to(root))


_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def processor_quota() -> float | None:
    """The quota of CPU time that the control groups set, in processors; None where they set none."""
    allowed = []
    for group in control_groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, version 1
            with contextlib.suppress(OSError, ValueError):  # no such group, or `max`
                quota, period = " ".join((group / file).read_text() for file in files).split()
                if int(quota) > 0:
                    allowed.append(int(quota) / int(period))
    return min(allowed, default=None)


def usable_processors() -> int:
    """The processors that this process can keep busy: its CPU affinity, or its quota of CPU time if that is less."""
    usable, quota = len(os.sched_getaffinity(0)), processor_quota()
    return usable if quota is None else min(usable, math.ceil(quota))


def available_memory_bytes() -> int:
    """The memory that is left, in bytes: of the machine, or of a control group of this process if that is less."""
    entries = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(entries["MemAvailable"].split()[0]) * 1024
    for group in control_groups("memory"):
        for limit, used, prefix in (
            ("memory.max", "memory.current", ""),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
        ):
            with contextlib.suppress(OSError, ValueError):  # no such group, or `max`: no limit
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                reclaimable = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
                left = int((group / limit).read_text()) - int((group / used).read_text()) + reclaimable
                available = min(available, max(0, left))
    return available


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far, in bytes, file-backed pages included."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_M_MMAP_THRESHOLD = -3
_LARGE = 8 * 1024 * 1024
"""Bytes; chunks of tensors are smaller, and are to be had again without being zeroed."""


def give_back_large_blocks() -> None:
    """Let glibc hand back blocks of 8 MB and more as soon as they are freed, from now on, in this process.

    By itself it raises that bound to the largest block that was freed, and then keeps what lies below another: tens of
    MB a thread (mallopt(3), M_MMAP_THRESHOLD). Other C libraries have no such setting, and nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
