"""The libraries that ftload uses: which are installed, whether they work, and how to fix those that don't."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..system.versions import installed_version, requirements
from .finding import Finding
from .probe_processes import Answers


@dataclass(frozen=True, kw_only=True, slots=True)
class _Library:
    module: str
    fix: str | None = None
    """The command, where installing it again is not enough."""
    purpose: str | None = None
    """What it is for, where ftload can do without it."""
    imports: tuple[str, ...] = ()
    """Other distributions of this table that its probe imports: where one is broken, it is broken too."""
    on_gpu: bool = False
    """Whether it is of no use without a GPU."""


_LIBRARIES = {
    "torch": _Library(module="torch"),
    "transformers": _Library(module="transformers", imports=("torch", "tokenizers", "safetensors")),
    "tokenizers": _Library(module="tokenizers"),
    "safetensors": _Library(module="safetensors", imports=("torch",)),
    "accelerate": _Library(module="accelerate", imports=("torch",)),
    "peft": _Library(module="peft", imports=("torch", "transformers", "accelerate")),
    "bitsandbytes": _Library(module="bitsandbytes", imports=("torch",)),
    "numba": _Library(module="numba", imports=("torch",)),
    "triton": _Library(module="triton"),
    "liger-kernel": _Library(module="liger_kernel", imports=("torch", "transformers", "peft", "triton")),
    "flash-attn": _Library(
        module="flash_attn",
        fix="pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir flash-attn",
        imports=("torch",),
        purpose="attention falls back to PyTorch's own",
        on_gpu=True,
    ),
    "gguf": _Library(module="gguf", fix="pip install 'ftload[gguf]'", purpose="only .gguf files need it"),
    "compressed-tensors": _Library(
        module="compressed_tensors",
        fix="pip install 'ftload[compressed-tensors]'",
        imports=("torch", "transformers"),
        purpose="only checkpoints of compressed-tensors need it",
    ),
}
"""What is tried, by distribution; each after those that it imports."""


def installed_libraries() -> list[str]:
    """The distributions among those that ftload uses whose packages are there, whether they work or not."""
    return [name for name, library in _LIBRARIES.items() if _is_there(library.module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def look_at_libraries(installed: list[str], answers: Answers) -> Iterable[Finding]:
    """A finding for each library; one of the `installed` that no probe answered for counts as untried."""
    findings: dict[str, Finding] = {}
    for name in _LIBRARIES:
        findings[name] = _finding(name, name in installed, answers, findings)
    return findings.values()


def _finding(name: str, is_there: bool, answers: Answers, others: Mapping[str, Finding]) -> Finding:
    """What is the case with one library; `others` are the findings of those that it imports."""
    library = _LIBRARIES[name]
    version, needed = installed_version(name), requirements().get(name)
    # packages for GPUs are built against the torch that is installed
    options = "--no-build-isolation " if library.on_gpu else ""
    install = f"pip install {options}'{needed}'" if needed else f"pip install {options}{name}"
    reinstall: str | None = library.fix or f"pip install --force-reinstall --no-deps {name}"
    facts = {"version": version}
    if not is_there:
        if version is not None:
            detail = f"{version} is installed, but its package `{library.module}` is not there"
            return Finding(name=name, state="broken", detail=detail, mend=reinstall, facts=facts)
        purpose = f": {library.purpose}" if library.purpose else ""
        if library.on_gpu and not answers.get("torch", {}).get("gpus"):
            return Finding(name=name, state="absent", detail="not installed: it runs on a GPU alone", facts=facts)
        return Finding(name=name, state="absent", detail=f"not installed{purpose}", mend=install, facts=facts)
    shown = version or "unknown version"
    if version is not None and needed is not None and not needed.specifier.contains(version, prereleases=True):
        detail = f"{version}, ftload needs {needed.specifier}"
        return Finding(name=name, state="broken", detail=detail, mend=install, facts=facts)
    answer = answers.get(name)
    if answer is None:
        return Finding(name=name, state="untried", detail=shown, facts=facts)
    problem = answer.get("problem")
    if problem is None:
        return Finding(name=name, state="ok", detail=f"{shown}, {answer['detail']}", facts=facts)
    culprit = next((others[other] for other in library.imports if not others[other].usable), None)
    if culprit is not None:
        problem, reinstall = f"{problem} ({culprit.name} is {culprit.state})", culprit.mend
    if "undefined symbol" in problem:
        problem = f"built for another torch than {installed_version('torch')}: {problem}"
    if "no locator available" in problem:  # numba's words: neither its package nor the home can be written
        reinstall = f"export NUMBA_CACHE_DIR={tempfile.gettempdir()}/numba"
    return Finding(name=name, state="broken", detail=f"{shown}: {problem}", mend=reinstall, facts=facts)
