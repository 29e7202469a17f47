"""What transformers changes in buffers that it has just loaded.

After loading, `from_pretrained` runs `_init_weights` on every module. transformers' own functions spare what came from
the checkpoint (a flag on the tensor says so), but an assignment does not: Zaya's routers set the last of their biases.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from ..system.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def set_after_loading(model: PreTrainedModel, name: str) -> Tensor | None:
    """What a floating-point buffer of `model` (on `meta`) is set to after loading; None if it stays as it was stored.

    The tensor has the buffer's shape and dtype, and NaN where the buffer stays.
    """
    import torch
    from transformers import PreTrainedModel
    from transformers.initialization import guard_torch_init_functions

    buffer = model.get_buffer(name)
    if not buffer.is_floating_point():
        return None
    path, _, leaf = name.rpartition(".")
    owner = model
    for end in (position for position, letter in enumerate(path + ".") if letter == "."):
        part = model.get_submodule(path[:end])
        owner = part if isinstance(part, PreTrainedModel) else owner
    probe = torch.full(buffer.shape, float("nan"), dtype=buffer.dtype)
    probe._is_hf_initialized = True  # type: ignore[attr-defined]
    module = deepcopy(model.get_submodule(path))
    module._buffers[leaf] = probe
    with quiet_transformers(), torch.no_grad(), guard_torch_init_functions():
        owner._init_weights(module)
    return None if probe.isnan().all() else probe
