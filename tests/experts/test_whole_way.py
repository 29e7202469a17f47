"""From a 16-bit checkpoint to an adapter that was trained on 4-bit experts, and back to a model in 16 bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.load import load_prepared
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from ..cli.runs import prepare
from ..conftest import Result
from ..merge.adapters import logits
from ..merge.expert_layers import merge_experts_by_peft, write_expert_adapter
from ..parity.compare import assert_same_tensors, read_tensors
from ..parity.reference import run_reference
from ..tokenizers import write_llama
from .checkpoints import load as load_by_transformers
from .checkpoints import random_model

SIMPLE = ("--get_tokenizer_fn", "get_tokenizer_simple_v1")
STEPS = 20
Ftload = Callable[..., Result]


def write_base(directory: Path, name: str) -> Path:
    random_model(name, vocab_size=144).save_pretrained(directory)
    write_llama(directory, vocab_size=128)
    return directory


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_48", "mixtral", "gpt_oss", "granitemoe"])
def test_what_is_merged_is_quantised_as_if_it_had_been_written_first(tmp_path: Path, name: str) -> None:
    """Each stored expert is merged while the stack is read; bitsandbytes quantises what PEFT has merged."""
    base = write_base(tmp_path / "base", name)
    write_expert_adapter(base, tmp_path / "adapter", r=8, target_modules=["q_proj", "gate_up", "down"])
    merge_experts_by_peft(base, tmp_path / "merged", tmp_path / "adapter")
    run_reference(tmp_path / "merged", tmp_path / "reference", strategy="qlora", tokenizer_size=0, targets=["q_proj"])
    flags = ("--use_qlora", "--min_quantized", "0")
    prepare(base, tmp_path / "output", *flags, "--merge_adapter", tmp_path / "adapter", *SIMPLE)
    prepare(base, tmp_path / "unmerged", *flags, *SIMPLE)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")
    found, before = read_tensors(tmp_path / "output"), read_tensors(tmp_path / "unmerged")
    experts = [key for key in found if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 4
    assert not any(found[key].equal(before[key]) for key in experts)


def tokens() -> torch.Tensor:
    """Enough for every expert."""
    return torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))


def train(model: Any, steps: int) -> list[float]:
    """Losses of so many steps without dropout, by a new optimizer."""
    ids = tokens()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_values(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:attention is:UserWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gpt_oss_square"])
def test_trained_moved_loaded_resumed_and_merged(ftload: Ftload, tmp_path: Path, name: str) -> None:
    base, output, trained = write_base(tmp_path / "base", name), tmp_path / "output", tmp_path / "trained"
    prepare(base, output, "--use_qlora", "--lora_experts", "4", "--lora_dropout", "0", *SIMPLE)
    model, _ = load_prepared(output)
    start = trained_values(model)
    experts = [key for key in start if ".experts." in key]
    assert len(experts) == 2 * 4 * 2 * 2  # layers, experts, projections, A and B
    losses = train(model, STEPS)
    assert losses[-1] < losses[0] - 0.05, losses
    after = trained_values(model)
    assert all(not after[key].equal(start[key]) for key in experts)
    model.save_pretrained(str(trained))
    expected = logits(model)

    moved = tmp_path / "moved"
    moved.mkdir()
    output, trained = (Path(shutil.move(directory, moved)) for directory in (output, trained))
    again = load_again(output, trained)
    assert logits(again).equal(expected)
    model.train()
    again.train()
    assert train(model, 2) == train(again, 2)  # an optimizer of its own for each
    resumed = trained_values(again)
    assert resumed.keys() == after.keys()
    for key, value in trained_values(model).items():
        assert resumed[key].equal(value), key
        assert not value.equal(after[key]), key

    # onto what it was trained on, and onto the model in 16 bits: merged, and beside it
    run(ftload, "merge", trained, "--model", output, "--output_dir", tmp_path / "decoded", *SIMPLE)
    run(ftload, "merge", trained, "--model", base, "--output_dir", tmp_path / "merged", *SIMPLE)
    run(ftload, "merge", trained, "--adapter_only", "--model", base, "--output_dir", tmp_path / "fused")
    merge_experts_by_peft(base, tmp_path / "by peft", trained)
    assert_same_tensors(tmp_path / "merged", tmp_path / "by peft")
    plain, whole = in_16_bits(base), in_16_bits(tmp_path / "merged")
    before = logits(plain)
    beside = logits(PeftModel.from_pretrained(plain, str(tmp_path / "fused")))
    moves = (beside - before).abs().max()
    assert moves > 0.1
    assert (logits(whole) - beside).abs().max() < 0.05 * moves
    assert (logits(in_16_bits(tmp_path / "decoded")) - expected).abs().max() < 0.05 * moves


def load_again(directory: Path, adapter: Path) -> Any:
    """By the libraries' own calls."""
    model, _ = load_by_transformers(directory)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def in_16_bits(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def run(ftload: Ftload, *words: str | Path) -> None:
    result = ftload(*words)
    assert result.code == 0, result.err
