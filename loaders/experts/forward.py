"""The forward pass of a layer's experts that are one linear layer each, as one of transformers' exchangeable functions.

Imported only where experts run: torch is imported here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model.transformers_internals import apply_gate


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What all experts of a layer give together: (tokens, hidden) to (tokens, hidden), in the same dtype.

    `top_k_index` and `top_k_weights` (tokens, top_k) are the experts of each token and their weights; an index of
    `num_experts` or more stands for none. The arithmetic, its order and its dtypes are those of transformers'
    `grouped_mm_experts_forward`, experts one after another: the sum over a token's experts is deterministic.

    An expert without tokens does not run, unless something in it is trained: data-parallel training waits for a
    gradient of every parameter, and finds zeros.
    """
    top_k = top_k_index.shape[1]
    chosen = top_k_index.reshape(-1)
    counts = torch.bincount(chosen, minlength=module.num_experts)[: module.num_experts].tolist()
    order = torch.sort(chosen, stable=True).indices[: sum(counts)]
    rows = hidden_states[order // top_k].split(counts)
    results = [run_expert(module, expert, part) for expert, part in enumerate(rows) if runs(module, expert, len(part))]
    if not results:
        return torch.zeros_like(hidden_states)
    return sum_of_experts(results, order, top_k_weights).to(hidden_states.dtype)


def runs(module: Any, expert: int, tokens: int) -> bool:
    """Whether an expert runs that gets so many tokens."""
    return tokens > 0 or (torch.is_grad_enabled() and _is_trained(module.get_submodule(str(expert))))


def sum_of_experts(results: list[Tensor], order: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts (tokens, hidden).

    `results` lie expert by expert; `order` says which of the (tokens, top_k) choices each of their rows is for.
    """
    weighted = torch.cat(results) * top_k_weights.reshape(-1)[order, None]
    placed = weighted.new_zeros(top_k_weights.numel(), weighted.shape[-1]).index_copy(0, order, weighted)
    return placed.view(*top_k_weights.shape, -1).sum(dim=1)


def run_expert(module: Any, expert: int, x: Tensor) -> Tensor:
    """One expert: (its tokens, hidden) to (its tokens, hidden)."""
    first = "gate_up" if module.has_gate else "up"
    x = _project(module, expert, first, x)
    x = _project(module, expert, "down", apply_gate(module, x) if module.has_gate else module.act_fn(x))
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _project(module: Any, expert: int, projection: str, x: Tensor) -> Tensor:
    x = module.get_submodule(f"{expert}.{projection}")(x)
    if not module.has_bias:
        return x
    return x + module.get_parameter(f"{projection}_proj_bias")[expert].to(x.dtype)


def _is_trained(expert: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in expert.parameters())
