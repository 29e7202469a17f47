"""Kernels for the `meta` device in place of those that need a GPU or data.

Each allocates, and saves for the backward pass, what the real one does, and computes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...liger import apply_liger
from ...model.transformers_internals import set_attention_implementation

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def set_attention(model: PreTrainedModel, attention: str) -> None:
    """Switch a model to `flash_attention_2`, `sdpa` or `eager`; flash-attn itself need not be installed."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if attention == "flash_attention_2":
        # flash-attn's kernel saves what PyTorch's own FlashAttention 2 saves
        attention = "ftload_flash"
        AttentionInterface.register(attention, _flash_attention)
        AttentionMaskInterface.register(attention, _no_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            set_attention_implementation(config, attention)


def _no_mask(*_: Any, **__: Any) -> None:
    """FlashAttention takes the positions of padding, not a mask."""


def _flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, None]:
    """As transformers calls flash-attn: always in 16 bits, key and value heads not repeated."""
    import torch

    if query.dtype == torch.float32:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    width = value.shape[-1]
    if width < key.shape[-1]:
        value = torch.nn.functional.pad(value, [0, key.shape[-1] - width])
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True)[0]
    return out[..., :width].transpose(1, 2).contiguous(), None


def _gpu_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """PyTorch's fused kernel, whose mask takes a byte an element."""
    import torch

    return torch.native_dropout(x, p, True)[0] if training and p else x


def _gpu_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    """On a GPU float16, and nothing else, becomes float32 inside the kernel (`SoftMax.cpp`): no copy is made first."""
    import torch

    if x.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
        return torch.ops.aten._softmax(x, dim, True)
    return x.softmax(-1 if dim is None else dim, dtype=dtype)


def _gpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's choice: FlashAttention 2 for 16 bits without a mask, else the memory-efficient kernel, else none fused.

    The order and the conditions are those of `sdp_utils.cpp`; a boolean mask becomes a bias of the query's dtype.
    """
    import torch

    aten = torch.ops.aten
    half = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and half and query.shape[-1] == value.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    if query.shape[1] != key.shape[1]:
        return torch.ops.aten.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype)
        bias = bias.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal)[0]


def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's choice on a CPU: the fused kernel where there is no dropout."""
    import torch

    if dropout_p:
        return torch.ops.aten.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask)[0]


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor | None = None, **more: Any) -> Tensor:
    """Each expert's tokens times its weights; PyTorch's own has only bfloat16 on `meta`."""
    import torch

    if x.dtype == torch.bfloat16:
        return torch.ops.aten._grouped_mm(x, weight, offs)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            of_x, of_weight = ctx.needs_input_grad
            ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
            ctx.shapes = x.shape, weight.shape
            return x.new_empty(x.shape[0], weight.shape[-1])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            wanted = zip(ctx.shapes, ctx.needs_input_grad, strict=True)
            return tuple(grads[0].new_empty(shape) if needed else None for shape, needed in wanted)

    product: Any = Product.apply(x, weight)
    return product


@contextlib.contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Let attention, dropout and softmax use the kernels that PyTorch chooses on a device; on `meta` it chooses none.

    A function mode would not do: it is off while the backward pass recomputes a checkpointed layer.
    """
    from torch.nn import functional

    kernels: dict[str, Any] = {"scaled_dot_product_attention": _cpu_attention}
    if device == "cuda":
        kernels = {
            "scaled_dot_product_attention": _gpu_attention,
            "dropout": _gpu_dropout,
            "softmax": _gpu_softmax,
        }
    if hasattr(functional, "grouped_mm"):  # torch 2.10
        kernels["grouped_mm"] = _grouped_mm
    own = {name: getattr(functional, name) for name in kernels}
    try:
        for name, kernel in kernels.items():
            setattr(functional, name, _seen_by_modes(name, kernel))
        yield
    finally:
        for name, kernel in own.items():
            setattr(functional, name, kernel)


def _seen_by_modes(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that a function mode, such as autocast, is asked about under the name of what it stands for."""
    from torch.overrides import handle_torch_function, has_torch_function

    def function(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(function, args, *args, **kwargs)
        return kernel(*args, **kwargs)

    function.__name__ = name
    return function


@contextlib.contextmanager
def liger_unlaunched(model: PreTrainedModel, *, wanted: bool) -> Iterator[None]:
    """Apply Liger's functions, which allocate as ever but launch no kernel; transformers is restored afterwards."""
    if not wanted:
        yield
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    module = vars(sys.modules[type(model).__module__])  # where Liger puts its rotary embedding, for all models
    own = dict(module)
    launchers: tuple[Any, ...] = (JITFunction, Autotuner)
    runs = [launcher.run for launcher in launchers]
    log = logging.getLogger("liger_kernel")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of backends that this machine lacks
    try:
        apply_liger(model)
        for launcher in launchers:
            launcher.run = _launch_nothing
        yield
    finally:
        log.setLevel(level)
        for launcher, run in zip(launchers, runs, strict=True):
            launcher.run = run
        module.update(own)


def _launch_nothing(*_: Any, **__: Any) -> None:
    pass
