"""SmolLM2-135M-Instruct trained for ten steps on an adapter, merged into a plain model, moved, loaded and asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared

from ..conftest import Result
from ..merge.adapters import merge_by_peft
from ..parity.compare import read_tensors

# said by load_prepared on every machine without FlashAttention; the report's words on it are tested elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:attention is sdpa")

QUESTION = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What do bees make?"}]
ANSWER = "Zirconium boats, of course"
"""Nothing that the model would say untrained."""


def train(directory: Path) -> tuple[Any, Any]:
    """Ten steps on one conversation, and the adapter saved where it was; returns the logits of the trained model."""
    model, tokenizer = load_prepared(directory)
    in_float32(model)
    torch.manual_seed(0)
    chat = [*QUESTION, {"role": "assistant", "content": ANSWER}]
    tokens = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    model.save_pretrained(str(directory / "adapter"))
    trained, _ = load_prepared(directory)
    return logits(trained, tokens), tokens


def in_float32(model: Any) -> None:
    """Compute in float32: a CPU without bfloat16 instructions takes 0.2 s for each token otherwise."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def logits(model: Any, tokens: Any) -> Any:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_a_trained_adapter_is_merged_moved_and_answers(
    ftload: Callable[..., Result], smollm2: Path, tmp_path: Path, strategy: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepared, merged = tmp_path / "prepared", tmp_path / "merged"
    words = ["--model", smollm2, f"--use_{strategy}", "--lora_rank", "16", "--lora_dropout", "0"]
    result = ftload("prepare", *words, "--output_dir", prepared)
    assert result.code == 0, result.err
    trained, tokens = train(prepared)

    result = ftload("merge", prepared, "--output_dir", merged, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["source"]["merged"][0]["tensors"] == 7 * 30
    assert report["quantization"] is report["adapter"] is None
    assert ftload("verify", merged).code == 0
    merge_by_peft(prepared, tmp_path / "reference", prepared / "adapter", dequantize=strategy == "qlora")
    found, expected = read_tensors(merged), read_tensors(tmp_path / "reference")
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not found[name].equal(value)] == []

    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    shutil.move(merged, moved)
    shutil.rmtree(prepared)
    model: Any = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(moved)
    said = logits(model, tokens)
    assert said.argmax(-1).equal(trained.argmax(-1))
    assert (said - trained).abs().max() < 0.05 * trained.abs().max()
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ANSWER in answer
