"""How much of a model's weight matrices is quantised: those outside embeddings, head and norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..model.components import Component

_NOT_ASKED = frozenset({"embedding", "head", "norm", "adapter"})


def is_matrix(shape: tuple[int, ...], component: Component) -> bool:
    """Whether coverage counts a tensor of this logical shape: experts that are fused are matrices too."""
    return len(shape) >= 2 and component not in _NOT_ASKED


class Weight(Protocol):
    """What coverage needs to know of a tensor."""

    @property
    def component(self) -> Component:
        """What it is for."""
        ...

    @property
    def parameters(self) -> int:
        """Logical parameters."""
        ...


W = TypeVar("W", bound=Weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage(Generic[W]):
    """How much of some weight matrices is quantised."""

    percent: float
    """Of their parameters, or of their bytes before quantisation, which is the same."""
    left: tuple[W, ...]
    """Those that are not."""

    def left_by_component(self) -> dict[str, list[W]]:
        """Component to its matrices that are not quantised, by name."""
        groups: dict[str, list[W]] = {}
        for weight in self.left:
            groups.setdefault(weight.component, []).append(weight)
        return dict(sorted(groups.items()))


def measure_coverage(matrices: Iterable[W], is_quantised: Callable[[W], bool]) -> Coverage[W]:
    """The coverage of `matrices`, all of which `is_matrix` counts."""
    matrices = tuple(matrices)
    left = tuple(weight for weight in matrices if not is_quantised(weight))
    everything = sum(weight.parameters for weight in matrices)
    covered = everything - sum(weight.parameters for weight in left)
    return Coverage(percent=100 * covered / everything if everything else 0.0, left=left)
