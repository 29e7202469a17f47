"""What this machine can do, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FtloadError, MissingRequirementError
from ..strategy import STRATEGIES
from .finding import Finding
from .hub import hub_setting, look_at_hub
from .libraries import installed_libraries, look_at_libraries
from .machine import look_at_gpus, look_at_machine
from .probe_processes import PROBE_SECONDS, Answers, run_probes


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Whether something works here."""

    works: bool
    detail: str
    """How, or what is missing."""
    reason: str | None = None
    """Why it is missing."""
    mend: str | None = None
    """The command that fixes it, where there is one."""


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


_COMMON = ("torch", "transformers", "tokenizers", "safetensors")
"""What every strategy needs, for preparing and for training."""
_TRAINING = ("accelerate",)
"""What every strategy needs for training alone."""
_TRAINING_ON_GPU = {"liger": ("triton", "GPU")}
"""What a strategy needs in training beyond its packages."""


def examine(*, quick: bool, wanted: Iterable[str] = (), seconds: float = PROBE_SECONDS) -> Diagnosis:
    """Look at everything. With `quick`, nothing is imported and no hub is asked: what is installed counts as usable.

    A probe that takes longer than `seconds` counts as hanging.
    """
    installed = installed_libraries()
    offline = hub_setting("HF_HUB_OFFLINE")
    answers: Answers = {} if quick else run_probes([*installed, *(() if offline else ("hub",))], seconds)
    findings = (
        *look_at_machine(),
        *look_at_libraries(installed, answers),
        *look_at_gpus(answers.get("torch", {}), tried="torch" in answers),
        *look_at_hub(answers.get("hub"), offline=offline),
    )
    by_name = {finding.name: finding for finding in findings}
    preparing = {name: _preparing(strategy.packages, by_name) for name, strategy in STRATEGIES.items()}
    training = {
        name: _training((*strategy.packages, *_TRAINING_ON_GPU.get(name, ())), by_name)
        for name, strategy in STRATEGIES.items()
    }
    return Diagnosis(findings=findings, preparing=preparing, training=training, wanted=tuple(wanted))


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
