"""The versions of what is installed."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache
from typing import TYPE_CHECKING

from ..errors import MissingRequirementError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_REPORTED = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "huggingface_hub",
    "liger-kernel", "flash-attn", "gguf", "compressed-tensors", "numpy",
)  # fmt: skip


@cache
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
    """The versions of Python and of every installed distribution that the result depends on."""
    found = {"python": platform.python_version()}
    for name in _REPORTED:
        version = installed_version(name)
        if version is not None:
            found[name] = version
    return found


@cache
def requirements() -> dict[str, Requirement]:
    """What ftload asks for, extras included, by distribution; empty where ftload is not installed."""
    from packaging.requirements import Requirement

    found: dict[str, Requirement] = {}
    try:
        lines = importlib.metadata.requires("ftload") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    for requirement in map(Requirement, lines):
        requirement.marker = None  # it would be part of a command
        found.setdefault(requirement.name, requirement)
    return found


def required_range(distribution: str) -> str:
    """The versions that ftload asks for, such as `>=5.17,<5.25`; empty where any will do."""
    found = requirements().get(distribution)
    return "" if found is None else str(found.specifier)


def require(packages: tuple[str, ...], *, purpose: str) -> None:
    """Raise `MissingRequirementError` naming the distributions that are not installed."""
    missing = [name for name in packages if installed_version(name) is None]
    if missing:
        raise MissingRequirementError(
            f"{purpose} needs {', '.join(f'`{name}`' for name in missing)}",
            hint=f"pip install {' '.join(missing)}",
        )
