"""What this machine can do, and why not: every library is tried, in a process of its own, and every failure has a cure.

A library that raises, exits, crashes or hangs while it is imported is a finding, never the end of the examination.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ..errors import FtloadError, MissingRequirementError
from ..strategy import STRATEGIES
from ..system.limits import usable_processors
from ..system.versions import installed_version
from .machine import Finding, hub_setting, look_at_gpus, look_at_machine

PROBE_SECONDS = 120.0
"""How long a library may take: compiling the encoder for the first time takes ten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Whether something works here."""

    works: bool
    detail: str
    """How, or what is missing."""
    reason: str | None = None
    """What is the matter with what is missing."""
    mend: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that was found, and what follows from it for each strategy."""

    findings: tuple[Finding, ...]
    preparing: Mapping[str, Ability]
    training: Mapping[str, Ability]
    wanted: tuple[str, ...]
    """The strategies that must work."""

    @property
    def error(self) -> FtloadError | None:
        """What to fail with: the first strategy that is wanted and can't be prepared, or can't be trained, here."""
        for name in self.wanted:
            for ability in (self.preparing[name], self.training[name]):
                if not ability.works:
                    hint = f"run `{ability.mend}`" if ability.mend else None
                    message = f"`{name}` can't work here: {ability.detail}: {ability.reason}"
                    return MissingRequirementError(message, hint=hint)
        return None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "strategies": {
                name: {"prepare": asdict(self.preparing[name]), "train": asdict(self.training[name])}
                for name in self.preparing
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Library:
    module: str
    mend: str | None = None
    """The command, where installing it again is not enough."""
    purpose: str | None = None
    """What it is for, where ftload can do without it."""
    imports: tuple[str, ...] = ()
    """Other distributions of this table that its probe imports: it can't work where they are broken."""
    on_gpu: bool = False
    """Whether there is no use for it without a GPU."""


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
        mend="pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir flash-attn",
        imports=("torch",),
        purpose="attention falls back to PyTorch's own",
        on_gpu=True,
    ),
    "gguf": _Library(module="gguf", mend="pip install 'ftload[gguf]'", purpose="only .gguf files need it"),
}
"""What is tried, by distribution; each after those that it imports."""


_COMMON = ("torch", "transformers", "tokenizers", "safetensors")


_TRAINING = ("accelerate",)


_TRAINING_ON_GPU = {"liger": ("triton", "GPU")}
"""What a strategy needs in training beyond its packages."""


def examine(*, quick: bool, wanted: Iterable[str] = (), seconds: float = PROBE_SECONDS) -> Diagnosis:
    """Look at everything. `quick` imports and asks nothing: what is installed counts as usable.

    A probe that takes longer than `seconds` counts as hanging.
    """
    present = [name for name, library in _LIBRARIES.items() if _is_there(library.module)]
    offline = hub_setting("HF_HUB_OFFLINE")
    answers: dict[str, dict[str, Any]] = {}
    if not quick:
        answers = _run_probes([*present, *(() if offline else ("hub",))], seconds)
    torch = answers.get("torch", {})
    libraries: dict[str, Finding] = {}
    for name in _LIBRARIES:
        libraries[name] = _library(name, name in present, answers, libraries)
    findings = (
        *look_at_machine(),
        *libraries.values(),
        *look_at_gpus(torch, tried="torch" in answers),
        *_hub(answers.get("hub"), offline),
    )
    by_name = {finding.name: finding for finding in findings}
    preparing = {name: _preparing(strategy.packages, by_name) for name, strategy in STRATEGIES.items()}
    training = {
        name: _training((*strategy.packages, *_TRAINING_ON_GPU.get(name, ())), by_name)
        for name, strategy in STRATEGIES.items()
    }
    return Diagnosis(findings=findings, preparing=preparing, training=training, wanted=tuple(wanted))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _run_probes(names: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Run probes, as many at a time as there are processors; name to answer."""
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


def _library(
    name: str, is_there: bool, answers: Mapping[str, Mapping[str, Any]], others: Mapping[str, Finding]
) -> Finding:
    library = _LIBRARIES[name]
    version, needed = installed_version(name), _requirements().get(name)
    options = (
        "--no-build-isolation " if library.on_gpu else ""
    )  # such packages are built against the torch that is here
    install = f"pip install {options}'{needed}'" if needed else f"pip install {options}{name}"
    again: str | None = library.mend or f"pip install --force-reinstall --no-deps {name}"
    facts = {"version": version}
    if not is_there:
        if version is not None:
            detail = f"{version} is installed, but its package `{library.module}` is not there"
            return Finding(name=name, state="broken", detail=detail, mend=again, facts=facts)
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
        problem, again = f"{problem} ({culprit.name} is {culprit.state})", culprit.mend
    if "undefined symbol" in problem:
        problem = f"built for another torch than {installed_version('torch')}: {problem}"
    if "no locator available" in problem:  # numba's words: neither its package nor the home can be written
        again = f"export NUMBA_CACHE_DIR={tempfile.gettempdir()}/numba"
    return Finding(name=name, state="broken", detail=f"{shown}: {problem}", mend=again, facts=facts)


@cache
def _requirements() -> dict[str, Any]:
    """What ftload asks for, extras included: distribution to `packaging.requirements.Requirement`."""
    from packaging.requirements import Requirement

    found = {}
    try:
        lines = importlib.metadata.requires("ftload") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    for requirement in map(Requirement, lines):
        requirement.marker = None  # it would be part of the command
        found.setdefault(requirement.name, requirement)
    return found


def _hub(answer: Mapping[str, Any] | None, offline: bool | None) -> Iterator[Finding]:
    if offline:
        detail = "switched off by `HF_HUB_OFFLINE`: the cache alone is used"
        yield Finding(name="hub", state="absent", detail=detail, mend="unset HF_HUB_OFFLINE")
    elif answer is None:
        yield Finding(name="hub", state="untried", detail="not asked")
    elif "problem" in answer:
        yield Finding(name="hub", state="broken", detail=answer["problem"])
    else:
        yield Finding(name="hub", state="ok", detail=answer["detail"])
    place = _token_place()
    if place is None:
        yield Finding(
            name="token", state="absent", detail="none: gated and private models need one", mend="hf auth login"
        )
        return
    accepted = (answer or {}).get("accepted")
    shown = f"*** in {place}"
    if accepted is False:
        mend = "unset HF_TOKEN" if place == "HF_TOKEN" else "hf auth login --force"
        detail = f"{shown}: the hub refuses it, for public models too"
        yield Finding(name="token", state="broken", detail=detail, mend=mend)
    elif accepted:
        yield Finding(name="token", state="ok", detail=f"{shown}, accepted by the hub")
    else:
        yield Finding(name="token", state="untried", detail=shown)


def _token_place() -> str | None:
    """Where a token is kept; the token itself goes nowhere."""
    try:
        from huggingface_hub import constants, get_token

        if get_token() is None:
            return None
    except Exception:  # as above, or a file that can't be read
        return None
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH


def _preparing(packages: tuple[str, ...], findings: Mapping[str, Finding]) -> Ability:
    # PEFT's files are written without it: it must be there, for training, but need not work
    there = {name for name, finding in findings.items() if finding.state != "absent"}
    needed = (*_COMMON, *(name for name in packages if name != "peft" or name not in there))
    ability = _ability(needed, findings)
    if ability.works and "bitsandbytes" in packages and not findings["numba"].usable:
        return Ability(works=True, detail="slowly: bitsandbytes encodes where numba can't", mend=findings["numba"].mend)
    return ability


def _training(packages: tuple[str, ...], findings: Mapping[str, Finding]) -> Ability:
    ability = _ability((*_COMMON, *_TRAINING, *packages), findings)
    if not ability.works:
        return ability
    return Ability(works=True, detail="on the GPU" if findings["GPU"].usable else "on the CPU alone")


def _ability(needed: Iterable[str], findings: Mapping[str, Finding]) -> Ability:
    for name in needed:
        finding = findings[name]
        if not finding.usable:
            detail = f"{name} is {finding.state}"
            return Ability(works=False, detail=detail, reason=finding.detail, mend=finding.mend)
    return Ability(works=True, detail="")
