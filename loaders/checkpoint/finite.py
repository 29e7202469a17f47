"""Whether numbers are finite: one NaN or infinity in a weight spoils every loss that it has a part in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .tensors import TORCH_NAMES, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; integers have none.

    A sum tells: both survive any addition. It takes a fiftieth of the time of torch's `isfinite`, which is asked only
    where the sum itself is too large.
    """
    import torch

    if not values.is_floating_point():
        return True
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)  # torch adds up no FP8
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def check_finite(values: Tensor, stored: Tensor, tensor: TensorMeta) -> None:
    """Raise `CheckpointError` naming `tensor` unless `values` are finite; `stored` are the same before a cast."""
    if all_finite(values):
        return
    if all_finite(stored):
        dtype = str(values.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"tensor `{tensor.name}` of `{tensor.file}` holds {TORCH_NAMES[tensor.dtype]} values beyond the range of "
            f"{dtype}",
            hint=f"in {dtype} they would be infinite; the checkpoint is damaged or was saved from a diverged run",
        )
    raise CheckpointError(
        f"tensor `{tensor.name}` of `{tensor.file}` holds NaN or infinity",
        hint="the checkpoint is damaged or was saved from a diverged run",
    )
