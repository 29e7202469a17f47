"""How much of the base is quantised, of what could be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import MissingRequirementError
from ..flags.request import Request
from ..model.skeleton import Skeleton
from ..steps.step import OutputTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How much of the weight matrices outside embeddings and head is quantised."""

    percent: float
    """Of their parameters, or of their bytes before quantisation, which is the same."""
    left: tuple[OutputTensor, ...]
    """Those that are not."""

    def left_by_component(self) -> dict[str, list[OutputTensor]]:
        """Component to its matrices that stay as they are, by name."""
        groups: dict[str, list[OutputTensor]] = {}
        for tensor in self.left:
            groups.setdefault(tensor.component, []).append(tensor)
        return dict(sorted(groups.items()))


def measure_coverage(skeleton: Skeleton, outputs: Iterable[OutputTensor], tag: str) -> Coverage:
    """The coverage of a base that is written as `outputs`, of which the quantised ones are counted as `tag`."""
    by_name = {output.name: output for output in outputs}
    matrices = [
        by_name[tensor.name]
        for tensor in skeleton.tensors
        if len(tensor.shape) >= 2 and tensor.component not in ("embedding", "head", "norm")
    ]
    left = tuple(output for output in matrices if output.counted_as != tag)
    everything = sum(output.parameters for output in matrices)
    covered = everything - sum(output.parameters for output in left)
    return Coverage(percent=100 * covered / everything if everything else 0.0, left=left)


def check_coverage(request: Request, coverage: Coverage) -> None:
    """Raise `MissingRequirementError` where less would be quantised than `--min_quantized` asks for."""
    if coverage.percent < request.min_quantized:
        listed = ", ".join(
            f"{component} ({len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors):,} bytes)"
            for component, tensors in coverage.left_by_component().items()
        )
        raise MissingRequirementError(
            f"{coverage.percent:.1f} % of the weight matrices would be 4-bit, `--min_quantized` asks for "
            f"{request.min_quantized:g} %: bitsandbytes leaves {listed}",
            hint=f"pass --min_quantized {math.floor(coverage.percent)} to take that, or train with --use_lora",
        )
