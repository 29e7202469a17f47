"""The recipe for accelerate's FSDP2, run by two processes with gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Result

from .conftest import write_conversations
from .script_runs import (
    CASES,
    check_batch,
    check_end,
    check_liger,
    check_start,
    check_step,
    needs_environment,
    run_recipe,
)

COLOURS = ("red", "blue", "green", "brown")
Ftload = Callable[..., Result]


@needs_environment
@pytest.mark.parametrize("case", CASES)
def test_the_recipe_trains_what_was_prepared(
    ftload: Ftload, case: str, tiny_llama: Path, tiny_mixture: Path, conversations: Path, tmp_path: Path
) -> None:
    model = tiny_mixture if "experts" in case else tiny_llama
    flags = [*CASES[case], "--lora_dropout", "0", "--per_device_train_batch_size", "2"]
    run = run_recipe(
        ftload, "accelerate-fsdp", model, conversations, tmp_path, *flags, options=("--fsdp",), processes=2
    )
    check_start(run, dtype=torch.float32)
    check_step(run, "accelerate-fsdp", sharded=True)
    check_batch(run, 2)
    check_end(run)
    assert run.facts["checkpointing"] == ("checkpointing" in case)
    packed, sharded = set(run.facts["packed"]), set(run.facts["sharded"])
    assert sharded
    if "bfloat16" in case:
        assert packed
        assert packed <= sharded
    else:
        assert not {name for name in packed & sharded if ".experts." not in name}


@needs_environment
@pytest.mark.parametrize("case", ["standard", "qlora as bfloat16, checkpointing"])
def test_two_processes_take_the_steps_of_one(ftload: Ftload, case: str, tiny_llama: Path, tmp_path: Path) -> None:
    # as many trained tokens in each conversation: the mean over a batch is that of its halves
    data = write_conversations(
        tmp_path / "alike.jsonl", [[("user", f"What is {word}?"), ("assistant", "A colour.")] for word in COLOURS]
    )
    ends = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        flags = [*CASES[case], "--lora_dropout", "0", "--per_device_train_batch_size", str(4 // processes)]
        run = run_recipe(
            ftload, "accelerate-fsdp", tiny_llama, data, folder, *flags, options=("--fsdp",), processes=processes
        )
        name = "adapter_model.safetensors" if (run.prepared / "adapter").exists() else "model.safetensors"
        ends.append((run, load_file(run.trained / name)))
    (one, alone), (_, together) = ends
    moved = torch.cat([(value - one.before[name]).flatten() for name, value in alone.items()])
    apart = torch.cat([(together[name] - value).flatten() for name, value in alone.items()])
    assert moved.norm() > 0
    assert apart.norm() < 0.01 * moved.norm()


@needs_environment
def test_liger_kernels_are_in_place_before_the_first_forward_pass(
    ftload: Ftload, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    kernels = check_liger(ftload, "accelerate-fsdp", tiny_llama, conversations, tmp_path, processes=2)
    assert kernels == ["LigerRMSNorm.forward", "LigerSwiGLUMLP.forward", "lce_forward"]
