"""How much of the base has to be quantised, and is."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import MissingRequirementError
from ..flags.request import Request
from ..model.skeleton import Skeleton
from ..steps.coverage import Coverage, is_matrix, measure_coverage
from ..steps.step import OutputTensor


def coverage_of(skeleton: Skeleton, outputs: Iterable[OutputTensor], tag: str) -> Coverage[OutputTensor]:
    """The coverage of a base that is written as `outputs`, of which the quantised ones are counted as `tag`."""
    by_name = {output.name: output for output in outputs}
    matrices = (by_name[tensor.name] for tensor in skeleton.tensors if is_matrix(tensor.shape, tensor.component))
    return measure_coverage(matrices, lambda output: output.counted_as == tag)


def check_coverage(request: Request, coverage: Coverage[OutputTensor], *, found_quantised: bool) -> None:
    """Raise `MissingRequirementError` where less would be quantised than `--min_quantized` asks for.

    `found_quantised` says that the checkpoint is quantised already, and stays so.
    """
    if coverage.percent < request.min_quantized:
        listed = ", ".join(
            f"{component} ({len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors):,} bytes)"
            for component, tensors in coverage.left_by_component().items()
        )
        other = "--dequantize to quantise all anew" if found_quantised else "train with --use_lora"
        raise MissingRequirementError(
            f"{coverage.percent:.1f} % of the weight matrices would be 4-bit, `--min_quantized` asks for "
            f"{request.min_quantized:g} %: bitsandbytes leaves {listed}",
            hint=f"pass --min_quantized {math.floor(coverage.percent)} to take that, or {other}",
        )
