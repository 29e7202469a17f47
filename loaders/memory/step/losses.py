"""The loss of a step on `meta`: the model's own, of all logits at once, or TRL's, which never holds all logits.

TRL 1.16 multiplies the last hidden states of all tokens that count with the head's weight in tiles, twice: in the
forward pass for the loss, in the backward pass, anew, for the gradients. Both gradients are summed up in float32 and
cast when they are complete (`trl/kernels/chunked_logprob.py`, `trl/trainer/utils.py`, `add_fused_lm_head`). Here each
token counts. What it holds beside is a few numbers a token, and is left out.

This module imports torch: import it where a step is run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE = 4096, 32768
"""Tokens and rows of the vocabulary whose logits TRL holds at once."""


def step_loss(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    loss: Literal["model", "chunks"],
    *,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Mapping[str, Any]]:
    """The loss of a batch, as `TrainingStep.loss` names it, and the outputs that come with it.

    `inputs` are a model's: `input_ids` and `labels` of shape (batch, tokens), and more. `product_dtype` is that of
    matrix products where autocast changes it; None where they have the dtype of their inputs. TRL's outputs have no
    logits, and nothing in them matters: they are empty here.
    """
    if loss == "model":
        outputs = model(**inputs)
        return outputs.loss, outputs
    return _loss_in_tiles(model, inputs, product_dtype), {}


def _loss_in_tiles(model: PreTrainedModel, inputs: Mapping[str, Any], product_dtype: torch.dtype | None) -> Tensor:
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    outputs: Any = model.base_model(**rest)
    head: Any = model.get_output_embeddings()
    # the last token has none to predict
    hidden: Any = _Chosen.apply(outputs.last_hidden_state[:, :-1])
    targets = torch.empty(hidden.shape[0], dtype=torch.long, device=hidden.device)
    scores: Any = _LogProbabilities.apply(hidden, head.weight, head.bias, targets, product_dtype or hidden.dtype)
    loss = -scores.sum() / targets.numel()
    if inputs.get("output_router_logits"):
        loss = loss + _router_loss(model, outputs, inputs)
    return loss


def _router_loss(model: PreTrainedModel, outputs: Any, inputs: Mapping[str, Any]) -> Any:
    config: Any = model.config.get_text_config()
    loss_function = vars(sys.modules[type(model).__module__])["load_balancing_loss_func"]
    return loss_function(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, inputs.get("attention_mask")
    )


class _Chosen(torch.autograd.Function):
    """`hidden[labels != -100]`, a copy, where all are chosen: (batch, tokens, width) to (batch · tokens, width)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape = hidden.shape
        return hidden.new_empty(hidden.shape[:-1].numel(), hidden.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].new_empty(ctx.shape)


class _LogProbabilities(torch.autograd.Function):
    """As `ChunkedLogProbFunction`: (tokens, width) and (vocabulary, width) to (tokens,), in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        statistics = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(7)]
        tile = chunk = _tile(hidden, dtype)
        for some in hidden.split(TILE[0]):
            chunk = some.to(dtype)
            for part in weight.split(TILE[1]):
                part.to(dtype)
        log_z, entropy, scores = (torch.empty_like(statistics[0]) for _ in range(3))
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.dtype = dtype
        del tile, chunk
        return scores

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        hidden, weight, bias = ctx.saved_tensors[:3]
        given = (hidden, weight, bias)
        sums = [
            value.new_empty(value.shape, dtype=torch.float32) if wanted else None
            for value, wanted in zip(given, ctx.needs_input_grad[:3], strict=True)
        ]
        tile = chunk = rows = _tile(hidden, ctx.dtype)
        for some in hidden.split(TILE[0]):
            chunk = some.to(ctx.dtype)
            for part in weight.split(TILE[1]):
                rows = part.to(ctx.dtype)
        gradients = [one if one is None else one.to(value.dtype) for one, value in zip(sums, given, strict=True)]
        del tile, chunk, rows  # so long they are there
        return *gradients, None, None


def _tile(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory that all tiles take, one after another."""
    tokens, rows = TILE
    return hidden.new_empty(min(len(hidden), tokens), rows, dtype=dtype)
