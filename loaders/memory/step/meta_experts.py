"""Experts on `meta`: in four bits one after another, each on its even share of the tokens; in 16, with PEFT's adapter.

Which expert a token goes to depends on data. Here all get as many, as far as that is possible, and what equal experts
do is equal. So of n experts in a row with the same share three run, the first, the second and the last, and the second
counts for all between. With s the bytes that an expert keeps until its backward pass, g those that its backward pass
leaves behind, and t what its work itself needs, expert i holds (i - 1) · s + t in the forward pass and
i · s + (n - i) · g + t in the backward pass: as this is linear in i, the first and the last expert have the peaks.

This module imports torch: import it where a step is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...experts.forward import run_expert, runs, sum_of_experts
from ...model.experts.fused import take_apart
from ...model.transformers_internals import experts_run_by, register_experts_function
from .meta_linear import QuantisedLinear

if TYPE_CHECKING:
    from ...model.experts.fused import FusedExperts
    from .setting import LoraSetting

_FUNCTION = "ftload_even_experts"


class Repeats(Protocol):
    """Who counts memory, told that some of it stands for more."""

    def begin(self, times: int) -> None:
        """From now on, what is allocated counts `times` times, and no peaks are looked for."""
        ...

    def end(self) -> None:
        """All counts once again, and peaks are looked for."""
        ...

    def count(self, value: Tensor, times: int) -> None:
        """Count a tensor that is there `times` times."""
        ...


def split_experts(module: Any, fused: Iterable[FusedExperts]) -> None:
    """Put a linear layer with a quantised weight for each expert in the place of a module's fused parameters."""
    take_apart(
        module, fused, lambda one, _: QuantisedLinear((one.out_features, one.in_features)), range(module.num_experts)
    )
    register_experts_function(_FUNCTION, _forward)
    experts_run_by(module, _FUNCTION)
    module.repeats = None


def is_split(module: nn.Module) -> bool:
    """Whether a module's experts are linear layers of their own."""
    return hasattr(module, "repeats")


def count_repeats(model: nn.Module, repeats: Repeats | None) -> None:
    """Let equal experts of `model` stand for each other, as `repeats` counts them; without it, all of them run."""
    experts: list[Any] = [module for module in model.modules() if is_split(module)]
    for module in experts:
        module.repeats = repeats


class AdaptedParameters(nn.Module):
    """In place of PEFT's adapter of fused parameters (its `ParamWrapper`, of 0.21).

    In each forward pass it computes the whole of them anew, `W + alpha / r · B A`, in W's dtype.
    """

    def __init__(self, base: nn.Module, fused: Iterable[FusedExperts], lora: LoraSetting) -> None:
        super().__init__()
        self.base = base
        rank, dtype = lora.expert_rank, getattr(torch, lora.dtype)
        self.scaling = lora.alpha / rank
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for one in fused:
            name = one.parameter.rpartition(".")[2]
            self.a[name] = nn.Parameter(torch.empty(one.experts * rank, one.in_features, device="meta", dtype=dtype))
            self.b[name] = nn.Parameter(torch.empty(one.out_features, rank * one.experts, device="meta", dtype=dtype))
            self.transposed, self.experts = one.transposed, one.experts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module does that it wraps."""
        with ExitStack() as stack:
            for name in reversed(self.a):  # PEFT wraps them in this order, one around the other
                stack.enter_context(self._adapted(name))
            return self.base(*args, **kwargs)

    @contextmanager
    def _adapted(self, name: str) -> Iterator[None]:
        weight = self.base.get_parameter(name)
        a = self.a[name].reshape(self.experts, -1, self.a[name].shape[-1])
        b = self.b[name].reshape(self.b[name].shape[0], -1, self.experts).permute(2, 0, 1)
        factors = (a.transpose(-2, -1), b.transpose(-2, -1)) if self.transposed else (b, a)
        left, right = (factor.to(weight.dtype) for factor in factors)
        parametrize.register_parametrization(self.base, name, _Sum(left, right, self.scaling))
        parametrizations: Any = self.base.parametrizations
        parametrizations[name].original.requires_grad_(False)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(self.base, name, leave_parametrized=False)


class _Sum(nn.Module):
    def __init__(self, left: Tensor, right: Tensor, scaling: float) -> None:
        super().__init__()
        self.left, self.right, self.scaling = left, right, scaling

    def forward(self, weight: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # no autocast
            return torch.baddbmm(weight, self.left, self.right, alpha=self.scaling)


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `experts.forward.experts_forward`, with the same number of tokens for each expert."""
    repeats: Repeats | None = module.repeats
    tokens, top_k = top_k_index.shape
    order = torch.sort(top_k_index.reshape(-1), stable=True).indices
    shares = _shares(tokens * top_k, module.num_experts, is_repeated=repeats is not None)
    rows = hidden_states[order // top_k].split([share * times for share, times in shares])
    results, expert = [], 0
    for part, (share, times) in zip(rows, shares, strict=True):
        if not runs(module, expert, share):
            pass
        elif repeats is None or times == 1:
            results.append(run_expert(module, expert, part))
        else:
            _end_behind(results[-1], module.get_submodule(str(expert)), repeats, times)
            one: Any = _OneOf.apply(part, share, times, repeats)
            results.append(_AllOf.apply(run_expert(module, expert, one), times, repeats))
        expert += times
    return sum_of_experts(results, order, top_k_weights).to(hidden_states.dtype)


def _shares(rows: int, experts: int, *, is_repeated: bool) -> list[tuple[int, int]]:
    """Tokens of an expert, and the number of experts that it stands for, in the order of experts."""
    share, more = divmod(rows, experts)
    shares: list[tuple[int, int]] = []
    for tokens, count in ((share + 1, more), (share, experts - more)):
        many = is_repeated and count > 3
        shares += [(tokens, 1), (tokens, count - 2), (tokens, 1)] if many else [(tokens, 1)] * count
    return shares


def _end_behind(first: Tensor, second: nn.Module, repeats: Repeats, times: int) -> None:
    """The backward pass of the second expert is over when that of the first begins: autograd goes back in time."""

    def end(_: Tensor) -> None:
        for parameter in second.parameters():
            if parameter.grad is not None:
                repeats.count(parameter.grad, times)
        repeats.end()

    if first.requires_grad:
        first.register_hook(end)


class _OneOf(torch.autograd.Function):
    """The tokens of one expert, of those of so many, without a copy in either direction."""

    @staticmethod
    def forward(ctx: Any, all_rows: Tensor, share: int, times: int, repeats: Repeats) -> Tensor:
        ctx.times, ctx.repeats = times, repeats
        repeats.begin(times)
        return all_rows.narrow(0, 0, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.repeats.count(gradients[0], ctx.times)
        return _repeat(gradients[0], ctx.times), None, None, None


class _AllOf(torch.autograd.Function):
    """The results of so many experts, from that of one of them."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, times: int, repeats: Repeats) -> Tensor:
        ctx.share, ctx.repeats = len(result), repeats
        repeats.end()
        return _repeat(result, times)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.repeats.begin(1)  # temporaries; what is left behind is counted in the end
        return gradients[0].narrow(0, 0, ctx.share), None, None


def _repeat(rows: Tensor, times: int) -> Tensor:
    """So many times the rows, in the same storage."""
    return rows.as_strided((times * len(rows), rows.shape[1]), (0, 1))
