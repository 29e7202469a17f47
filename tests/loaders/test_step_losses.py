"""The losses of a simulated step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ftload.loaders.memory.step.losses import TILE, step_loss
from ftload.loaders.memory.step.meta_kernels import kernels_of

from ..parity.models import ARCHITECTURES
from ..trainers.trl_loss_on_meta import BATCH, LENGTH, VOCABULARY, WIDTH, Recorder, measure

TOKENS = BATCH * (LENGTH - 1)


def _in_chunks(model: Any, inputs: dict[str, Any], dtype: torch.dtype | None) -> torch.Tensor:
    return step_loss(model, inputs, "chunks", product_dtype=dtype)[0]


def test_of_a_frozen_bfloat16_head_a_tile_and_gradients_of_hidden_states_are_held() -> None:
    held = measure("lora", _in_chunks)
    tile = TILE[0] * TILE[1] * 2
    # hidden states, and three numbers a token
    assert held["saved"] == TOKENS * (WIDTH * 2 + 8 + 4 + 4)
    # their gradients in float32, then in bfloat16 too
    assert held["backward"] == pytest.approx(tile + TOKENS * WIDTH * 6, rel=1e-3)


def test_a_trained_head_has_a_gradient_in_float32_beside_its_own() -> None:
    trained, frozen = measure("full", _in_chunks), measure("lora", _in_chunks)
    assert trained["saved"] == frozen["saved"]
    assert trained["forward"] == frozen["forward"]
    assert trained["backward"] - frozen["backward"] == VOCABULARY * WIDTH * (4 + 2)


def test_under_autocast_a_float32_head_is_cast_a_part_at_a_time() -> None:
    held = measure("qlora", _in_chunks)
    tile, part, chunk = TILE[0] * TILE[1] * 2, TILE[1] * WIDTH * 2, TILE[0] * WIDTH * 2
    assert held["saved"] == TOKENS * (WIDTH * 4 + 8 + 4 + 4)
    # in the backward pass the last part is there while the next one is made
    assert held["backward"] == pytest.approx(tile + 2 * part + chunk + TOKENS * WIDTH * 4, rel=1e-2)


def test_the_models_own_loss_comes_with_its_logits() -> None:
    held: dict[str, Any] = {}

    def own(model: Any, inputs: dict[str, Any], _: torch.dtype | None) -> torch.Tensor:
        loss, outputs = step_loss(model, inputs, "model")
        held.update(outputs)
        return loss

    measure("lora", own)
    assert held["logits"].shape == (BATCH, LENGTH, VOCABULARY)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma3", "phi3", "olmoe", "mixtral"])
def test_loss_in_chunks_of_other_models(architecture: str) -> None:
    import transformers

    name, arguments = ARCHITECTURES[architecture]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    router = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    with kernels_of("cpu"), Recorder():
        loss, outputs = step_loss(model, {**inputs, **router}, "chunks")
        loss.backward()
    assert loss.shape == ()
    assert "logits" not in outputs
    assert all(value.grad is not None for value in model.get_output_embeddings().parameters())
