"""Autocast on `meta`, which PyTorch has none for: matrix products in bfloat16, what needs the range in float32.

Which operations are cast is PyTorch's choice, in `ATen/autocast_mode.h` for CUDA and in `autocast_mode.cpp` for a CPU;
names here are those of `torch` and `torch.nn.functional`.

This module imports torch: import it where a step is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

Policy = Literal["bfloat16", "float32", "accumulate", "widest"]
"""To bfloat16 · to float32 · results in float32 unless a dtype is asked for · to the widest dtype of all."""

_PRODUCTS = (
    "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu",
    "addmm", "matmul", "mm", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "einsum",
    "scaled_dot_product_attention", "__matmul__", "__rmatmul__",
)  # fmt: skip
"""On either device; einsum is a product inside."""
_LOSSES = (
    "cosine_embedding_loss", "nll_loss", "cross_entropy", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "poisson_nll_loss",
)  # fmt: skip
_CUDA: Mapping[str, Policy] = {
    **dict.fromkeys(
        (*_PRODUCTS, "addmv", "addr", "mv", "chain_matmul", "linalg_multi_dot",
         "_scaled_dot_product_flash_attention"),
        "bfloat16",
    ),
    **dict.fromkeys(
        (*_LOSSES, "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal",
         "rsqrt", "sinh", "tan", "pow", "__pow__", "__rpow__", "softplus", "layer_norm", "native_layer_norm",
         "rms_norm", "group_norm", "frobenius_norm", "nuclear_norm", "cosine_similarity", "dist", "pdist", "cdist",
         "renorm", "logsumexp", "interpolate"),
        "float32",
    ),
    **dict.fromkeys(
        ("prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm",
         "linalg_matrix_norm", "norm", "sum"),
        "accumulate",
    ),
    **dict.fromkeys(
        ("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
         "scatter_add"),
        "widest",
    ),
}  # fmt: skip
_CPU: Mapping[str, Policy] = {
    **dict.fromkeys(_PRODUCTS, "bfloat16"),
    **dict.fromkeys(
        (*_LOSSES, "avg_pool3d", "binary_cross_entropy", "grid_sampler", "polar", "prod", "quantile", "nanquantile",
         "stft", "cdist", "trace", "inverse"),
        "float32",
    ),
    **dict.fromkeys(("stack", "cat", "index_copy"), "widest"),
}  # fmt: skip
POLICIES: Mapping[str, Mapping[str, Policy]] = {"cuda": _CUDA, "cpu": _CPU}
"""What is cast on a device, and how."""


class Autocast(TorchFunctionMode):
    """What `torch.autocast(device, dtype=torch.bfloat16)` does to tensors on `meta` while a `region` is open."""

    def __init__(self, device: Literal["cuda", "cpu"]) -> None:
        super().__init__()
        self._policies = POLICIES[device]
        self._is_open = False
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        """bfloat16 copies of float32 leaves that require a gradient, beside them, by identity, to the region's end."""

    @contextmanager
    def region(self) -> Iterator[None]:
        """Cast until the end. In a region that is open this does nothing."""
        if self._is_open:
            yield
            return
        self._is_open = True
        try:
            with self:
                yield
        finally:
            self._is_open = False
            self._cache.clear()

    def in_region(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that opens a region where none is open, as checkpointing does in the backward pass."""

        def opens_region(*args: Any, **kwargs: Any) -> Any:
            with self.region():
                return function(*args, **kwargs)

        return opens_region

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        policy = self._policies.get(func.__name__)
        if policy is None:
            return func(*args, **kwargs)
        if policy == "accumulate":
            return func(*args, **self._in_float32(args, kwargs))
        if policy == "widest" and not any(_is_float32(value) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        dtype = torch.bfloat16 if policy == "bfloat16" else torch.float32
        args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _in_float32(self, args: Any, kwargs: Any) -> Any:
        asks = kwargs.get("dtype") is not None or any(isinstance(value, torch.dtype) for value in args)
        return kwargs if asks or not _is_float(args[0]) else {**kwargs, "dtype": torch.float32}

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not _is_float(value) or value.dtype == dtype:
            return value
        may_keep = dtype == torch.bfloat16 and value.dtype == torch.float32 and value.requires_grad and value.is_leaf
        if not may_keep or value._is_view():
            return value.to(dtype)
        if id(value) not in self._cache:
            self._cache[id(value)] = value, value.to(dtype)
        return self._cache[id(value)][1]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _is_float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32
