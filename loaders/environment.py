"""What this machine and Python environment have; each question is answered by trying, not by looking for a package.

And transformers kept quiet, whoever calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import math
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MissingRequirementError, said_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPORTED = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "huggingface_hub",
    "liger-kernel", "flash-attn", "gguf", "numpy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """The attention implementation that was asked for and the one that works here."""

    requested: str
    effective: str
    reason: str | None
    """Why they differ; None when they don't."""


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def ftload_version() -> str:
    """The version of ftload itself."""
    return installed_version("ftload") or "unknown"


def versions() -> dict[str, str]:
    """Of Python and of every installed distribution that has a part in the result."""
    found = {"python": platform.python_version()}
    for name in _REPORTED:
        version = installed_version(name)
        if version is not None:
            found[name] = version
    return found


def require(packages: tuple[str, ...], *, purpose: str) -> None:
    """Raise `MissingRequirementError` naming the distributions that are not installed."""
    missing = [name for name in packages if installed_version(name) is None]
    if missing:
        raise MissingRequirementError(
            f"{purpose} needs {', '.join(f'`{name}`' for name in missing)}",
            hint=f"pip install {' '.join(missing)}",
        )


def resolve_attention(model_class: type[PreTrainedModel], *, use_flash_attn: bool) -> Attention:
    """FlashAttention 2 where it was asked for and runs; else PyTorch's sdpa where the model supports it; else eager."""
    if not use_flash_attn:
        return Attention(requested="eager", effective="eager", reason=None)
    problem = _flash_attention_problem(model_class)
    if problem is None:
        return Attention(requested="flash_attention_2", effective="flash_attention_2", reason=None)
    fallback = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    return Attention(requested="flash_attention_2", effective=fallback, reason=problem)


def cuda_problem() -> str | None:
    """Why CUDA can't be used here; None when it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "there is no GPU that torch can use"


def liger_problem() -> str | None:
    """Why Liger's kernels can't run here; None when they can."""
    import torch

    if not torch.cuda.is_available():
        return "Liger's Triton kernels need a GPU, and there is none"
    try:
        importlib.import_module("liger_kernel.transformers")
    except Exception as error:  # a broken Triton raises whatever it likes
        return f"liger-kernel does not import: {said_by(error)}"
    return None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars, log lines and warnings off stderr; what matters in them is checked and reported here."""
    from transformers.utils import logging as transformers_logging

    bitsandbytes = logging.getLogger("bitsandbytes")
    levels = bitsandbytes.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    bitsandbytes.setLevel(logging.ERROR)  # of optional kernels that it would rather have
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        bitsandbytes.setLevel(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()


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

    In a container its own group may be at the root, whatever it is called outside: not all that come need exist.
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
    """The processors' worth of time that the control groups allow; None where they set no limit."""
    allowed = []
    for group in control_groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, version 1
            with contextlib.suppress(OSError, ValueError):  # no such group, or `max`
                quota, period = " ".join((group / file).read_text() for file in files).split()
                if int(quota) > 0:
                    allowed.append(int(quota) / int(period))
    return min(allowed, default=None)


def usable_processors() -> int:
    """The processors that this process can keep busy: those it may run on, or the time that it is allowed on them."""
    usable, quota = len(os.sched_getaffinity(0)), processor_quota()
    return usable if quota is None else min(usable, math.ceil(quota))


def available_memory_bytes() -> int:
    """The memory that can still be had: of the machine, or of the control groups that this process is confined to."""
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
    """The largest resident size that this process has had, file-backed pages included."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _flash_attention_problem(model_class: type[PreTrainedModel]) -> str | None:
    import torch

    if not getattr(model_class, "_supports_flash_attn", False):
        return f"`{model_class.__name__}` does not support FlashAttention"
    if not torch.cuda.is_available():
        return "FlashAttention needs a GPU, and there is none"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"FlashAttention 2 needs compute capability 8.0, `{torch.cuda.get_device_name()}` is older"
    try:
        importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        return "flash-attn is not installed"
    except Exception as error:  # built for another torch: ImportError, OSError or RuntimeError
        return f"flash-attn does not import: {said_by(error)}"
    return None
