"""What this machine is: processors, memory, disks and GPUs, as findings of the doctor."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..system.limits import available_memory_bytes, control_groups, processor_quota
from ..system.versions import ftload_version
from .finding import Finding
from .hub import hub_setting


def look_at_machine() -> Iterator[Finding]:
    """Python, processors, memory and disks."""
    yield Finding(name="ftload", state="ok", detail=ftload_version())
    yield Finding(
        name="python",
        state="ok",
        detail=f"{platform.python_version()}, {sys.executable}",
        facts={"version": platform.python_version()},
    )
    yield _processors()
    yield _memory()
    yield _disk("disk", Path.cwd(), None)
    yield _disk("temporary", Path(tempfile.gettempdir()), "export TMPDIR=DIRECTORY")
    cache = hub_setting("HF_HUB_CACHE")
    if cache:
        yield _disk("cache", Path(cache), "export HF_HOME=DIRECTORY")


def _processors() -> Finding:
    usable, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count()
    detail = f"{usable} threads" if usable == all_of_them else f"{usable} of {all_of_them} threads"
    quota = processor_quota()
    if quota is not None and quota < usable:
        detail += f", limited to the time of {quota:g} by the control group"
    return Finding(name="processors", state="ok", detail=detail, facts={"threads": usable, "quota": quota})


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    available, limit = available_memory_bytes(), total
    for group in control_groups("memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such group, or `max`
                limit = min(limit, int((group / file).read_text()))
    detail = f"{_gigabytes(available)} available of {_gigabytes(total)}"
    if limit < total:
        detail += f", limited to {_gigabytes(limit)} by the control group"
    facts = {"available_bytes": available, "total_bytes": total, "limit_bytes": limit}
    return Finding(name="memory", state="ok", detail=detail, facts=facts)


def _disk(name: str, path: Path, fix: str | None) -> Finding:
    place = next(place for place in (path, *path.parents) if place.exists())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(name=name, state="broken", detail=f"{path}: {error.strerror}", mend=fix)
    facts = {"path": str(path), "free_bytes": free}
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        return Finding(name=name, state="broken", detail=f"{path} can't be written", mend=fix, facts=facts)
    return Finding(name=name, state="ok", detail=f"{_gigabytes(free)} free, {path}", facts=facts)


def look_at_gpus(torch: Mapping[str, Any], *, tried: bool) -> Iterator[Finding]:
    """The GPUs that torch found, in the words of its probe, or why there is none; perhaps it was not `tried`."""
    has_driver = Path("/proc/driver/nvidia/version").exists()
    for number, gpu in enumerate(torch.get("gpus", ())):
        detail = f"{gpu['name']}, {_gigabytes(gpu['memory_bytes'])}, compute capability {gpu['capability']}"
        yield Finding(name="GPU" if not number else f"GPU {number}", state="ok", detail=detail, facts=gpu)
    problem = torch.get("gpu_problem") or torch.get("problem")
    if torch.get("gpus") and not problem:
        return
    if not has_driver:
        detail = "no NVIDIA driver" + (f"; {problem}" if problem else "")
        yield Finding(name="GPU", state="absent", detail=detail)
    elif not tried:
        yield Finding(name="GPU", state="untried", detail="there is an NVIDIA driver")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding(
            name="GPU", state="absent", detail="`CUDA_VISIBLE_DEVICES` hides it", mend="unset CUDA_VISIBLE_DEVICES"
        )
    else:
        fix = "pip install --force-reinstall torch"
        yield Finding(name="GPU", state="broken", detail=problem or "torch was not tried", mend=fix)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
