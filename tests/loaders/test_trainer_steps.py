"""What `--for` changes of an estimate: each trainer's own dtypes, autocast, kernels and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.memory.estimate import estimate_training_memory
from ftload.loaders.memory.sharding import Sharding
from ftload.loaders.memory.step.setting import Batch, training_setting
from ftload.loaders.memory.step.simulation import Simulation
from ftload.loaders.memory.training_memory import TrainingMemory
from ftload.loaders.memory.training_run import TrainingRun

from .plans import make_plan


def estimated(model: Path, work: Path, trainer: str, *flags: str) -> tuple[Any, TrainingMemory]:
    plan, arguments = make_plan(model, work, *flags, "--max_seq_length", "16")
    memory = estimate_training_memory(plan, arguments, TrainingRun(trainer=trainer))
    assert isinstance(memory, TrainingMemory)
    return plan, memory


def part(memory: TrainingMemory, name: str) -> int:
    (size,) = (one.bytes for one in memory.parts if one.name == name)
    return size


def test_without_flash_attention_axolotl_holds_embeddings_norms_and_head_in_float32(
    llama: Path, tmp_path: Path
) -> None:
    plan, plain = estimated(llama, tmp_path, "trl", "--no_use_flash_attn")
    _, wide = estimated(llama, tmp_path, "axolotl", "--no_use_flash_attn")
    named = dict(plan.skeleton.model.named_parameters())
    parts = ("norm", "embed", "head")
    widened = sum(value.numel() for name, value in named.items() if any(one in name for one in parts))
    assert 0 < widened < sum(value.numel() for value in named.values())
    assert part(wide, "weights") - part(plain, "weights") == 2 * widened
    assert part(wide, "optimizer states") - part(plain, "optimizer states") == 4 * widened
    assert wide.gradient_bytes - plain.gradient_bytes == 2 * widened
    _, flash = estimated(llama, tmp_path, "axolotl")
    assert part(flash, "weights") == part(plain, "weights")


@pytest.mark.parametrize(
    ("trainer", "flags", "sharding", "expected"),
    [
        ("open-instruct", [], None, True),
        ("llamafactory", [], None, False),
        ("llamafactory", ["--use_lora"], None, True),
        ("accelerate-fsdp", ["--use_lora"], None, False),
        ("trl", [], Sharding(method="fsdp", gpus=2), False),
        ("trl", [], Sharding(method="zero", gpus=2), False),
    ],
)
def test_autocast(
    llama: Path, tmp_path: Path, trainer: str, flags: list[str], sharding: Sharding | None, expected: bool
) -> None:
    plan, arguments = make_plan(llama, tmp_path, *flags)
    run = TrainingRun(trainer=trainer, sharding=sharding)
    assert training_setting(plan, arguments, run).autocast == expected
    unmixed = TrainingRun(trainer=trainer, sharding=sharding, mixed_precision="no")
    assert not training_setting(plan, arguments, unmixed).autocast


def test_open_instruct_puts_no_liger_kernels_on_a_quantised_base(llama: Path, tmp_path: Path) -> None:
    for flags, expected in (["--use_lora"], True), (["--use_qlora"], False):
        plan, arguments = make_plan(llama, tmp_path, *flags, "--use_liger_kernel")
        assert training_setting(plan, arguments, TrainingRun()).liger == expected
        assert training_setting(plan, arguments, TrainingRun(trainer="trl")).liger


def test_under_accelerates_fsdp_an_8_bit_optimizer_is_not_taken_over(llama: Path, tmp_path: Path) -> None:
    flags = ("--use_qlora", "--use_8bit_optimizer", "--lora_rank", "64")
    plan, eight_bits = estimated(llama, tmp_path, "trl", *flags)
    _, torchs = estimated(llama, tmp_path, "accelerate-fsdp", *flags)
    tensors = plan.adapter_tensors()
    assert part(torchs, "optimizer states") == sum(8 * one.parameters + 4 for one in tensors)
    assert part(eight_bits, "optimizer states") < part(torchs, "optimizer states")


def test_beside_ligers_kernels_trls_loss_holds_as_much_as_without(llama: Path, tmp_path: Path) -> None:
    held = []
    for flags in ([], ["--use_liger_kernel"]):
        plan, arguments = make_plan(llama, tmp_path, *flags)
        setting = training_setting(plan, arguments, TrainingRun(trainer="trl"))
        assert setting.liger == bool(flags)
        loss = Simulation(plan.skeleton.model, setting).run(Batch(size=1, length=16)).moments[0]
        held.append(loss.total - loss.activations)
    # float32 and bfloat16 gradients of the head are more than all else of it
    assert held[0] == pytest.approx(held[1], rel=1e-3)
