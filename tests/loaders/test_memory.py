"""The estimate of training memory: what can be counted equals what real models and optimizers hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared
from ftload.loaders.flags.declared import FlatArguments
from ftload.loaders.memory import estimate as memory
from ftload.loaders.memory import what_fits
from ftload.loaders.memory.estimate import compare_methods, estimate_training_memory
from ftload.loaders.memory.optimizer import optimizer_bytes
from ftload.loaders.memory.sharding import Sharding
from ftload.loaders.memory.training_memory import Fit, NoEstimate, TrainingMemory
from ftload.loaders.memory.training_run import TrainingRun
from ftload.loaders.plan.plan import Plan

from ..cli.runs import FLAGS, prepare
from .plans import make_plan

GIGABYTES = (16, 24, 32, 40, 48, 80, 96, 141, 192)


def estimate(plan: Plan, flags: FlatArguments, *run: TrainingRun) -> TrainingMemory:
    result = estimate_training_memory(plan, flags, *run)
    assert isinstance(result, TrainingMemory), result
    return result


def part(result: TrainingMemory, name: str) -> int:
    (size,) = (part.bytes for part in result.parts if part.name == name)
    return size


def held_by(model: torch.nn.Module) -> int:
    """Bytes of all parameters and of the states of those that are quantised."""
    size = 0
    for parameter in model.parameters():
        size += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = (state.absmax, state.code, state.state2.absmax, state.state2.code)
            size += sum(part.nbytes for part in parts)
    return size


def states_of(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, each storage once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum({value.data_ptr(): value.nbytes for value in tensors}.values())


def train(model: Any, optimizer: torch.optim.Optimizer) -> int:
    """One step; returns the bytes of the gradients."""
    tokens = torch.randint(3, 100, (2, 16))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    gradients = sum(value.grad.nbytes for value in model.parameters() if value.grad is not None)
    optimizer.step()
    return gradients


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("eight_bit", [False, True], ids=["", "8bit"])
@pytest.mark.parametrize("strategy", FLAGS)
def test_weights_gradients_and_states_are_those_of_a_real_run(
    llama: Path, tmp_path: Path, strategy: str, eight_bit: bool
) -> None:
    rank = "100"  # some of the adapter's matrices have fewer than 4096 elements, some no multiple of 256
    flags = [*FLAGS[strategy], *(["--use_8bit_optimizer"] if eight_bit else []), "--lora_rank", rank]
    prepare(llama, tmp_path / "out", *flags)
    model, _ = load_prepared(tmp_path / "out")
    plan, arguments = make_plan(llama, tmp_path, *flags)
    result = estimate(plan, arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if strategy == "qlora":
        from bitsandbytes.optim import AdamW

        optimizer: torch.optim.Optimizer = AdamW(trained, optim_bits=8 if eight_bit else 32, is_paged=True)
    else:
        optimizer = torch.optim.AdamW(trained, fused=True)
    gradients = train(model, optimizer)
    assert part(result, "weights") + part(result, "adapter") == held_by(model)
    assert part(result, "adapter") == (sum(value.nbytes for value in trained) if "lora" in strategy else 0)
    assert part(result, "optimizer states") == states_of(optimizer)
    assert result.gradient_bytes == gradients


def test_an_unfused_optimizer_counts_its_steps_in_the_hosts_memory(llama: Path, tmp_path: Path) -> None:
    plan, flags = make_plan(llama, tmp_path, "--no_fused_optimizer")
    parameters = sum(value.nbytes for value in plan.skeleton.model.parameters())
    assert optimizer_bytes(plan, flags, TrainingRun()).bytes == 2 * parameters
    update = estimate(plan, flags).moments[-1]
    assert (update.name, update.gradients, update.temporary) == ("optimizer step", parameters, parameters)


@pytest.mark.parametrize("flags", [[], ["--use_lora"], ["--use_qlora", "--gradient_checkpointing"]], ids=" ".join)
def test_parts_are_those_of_the_highest_moment(llama: Path, tmp_path: Path, flags: list[str]) -> None:
    plan, arguments = make_plan(llama, tmp_path, *flags)
    result = estimate(plan, arguments)
    lasting = sum(part(result, name) for name in ("weights", "adapter", "optimizer states", "CUDA context"))
    assert result.total == lasting + max(moment.total for moment in result.moments)
    peak = next(moment for moment in result.moments if moment.name == result.moment)
    assert part(result, "gradients") == peak.gradients
    assert part(result, "activations") == peak.activations
    assert part(result, "logits and loss") == peak.logits
    assert part(result, "temporary buffers") == peak.temporary
    assert all(part.origin for part in result.parts)
    assert [fit.gigabytes for fit in result.fits] == list(GIGABYTES)
    assert all(fit.fits for fit in result.fits)


@pytest.mark.parametrize("flags", [[], ["--use_lora"], ["--use_qlora"]], ids=" ".join)
@pytest.mark.parametrize("sharding", [None, Sharding(method="fsdp", gpus=4)], ids=["", "fsdp"])
def test_what_gradient_checkpointing_alone_would_do(
    llama: Path, tmp_path: Path, flags: list[str], sharding: Sharding | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The total is the one that is estimated where it is on; there, and where the model has none, none is named."""
    run = TrainingRun(sharding=sharding)
    batch = ["--per_device_train_batch_size", "3", "--max_seq_length", "64"]
    plan, arguments = make_plan(llama, tmp_path, *flags, *batch)
    without = estimate(plan, arguments, run)
    checkpointed = estimate(*make_plan(llama, tmp_path, *flags, *batch, "--gradient_checkpointing"), run)
    assert without.with_checkpointing == checkpointed.total < without.total
    assert checkpointed.with_checkpointing is None
    monkeypatch.setattr(type(plan.skeleton.model), "supports_gradient_checkpointing", False)
    assert estimate(plan, arguments, run) == replace(without, with_checkpointing=None)


def test_the_length_where_none_is_given(llama: Path, tmp_path: Path) -> None:
    plan, flags = make_plan(llama, tmp_path)
    result = estimate(plan, flags)
    assert (result.batch_size, result.length) == (8, 64)
    assert result.length_origin == "max_seq_length is not given: the longest that the model takes"
    plan.skeleton.config.max_position_embeddings = 100_000
    assert estimate(plan, flags).length == 4096
    assert estimate(plan, replace(flags, max_seq_length=32)).length_origin == "max_seq_length"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, attention is what works on it")
def test_attention_is_what_was_asked_for_whether_this_machine_has_it_or_not(llama: Path, tmp_path: Path) -> None:
    plan, flags = make_plan(llama, tmp_path)
    assert plan.attention.effective == "sdpa"
    assert estimate(plan, flags).attention == "flash_attention_2"
    plan, flags = make_plan(llama, tmp_path, "--no_use_flash_attn")
    assert estimate(plan, flags).attention == "eager"


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_train_batch_size", "4", "--max_seq_length", "256"],
        ["--per_device_train_batch_size", "1", "--max_seq_length", "512", "--use_lora", "--gradient_checkpointing"],
        ["--per_device_train_batch_size", "2", "--max_seq_length", "256", "--no_use_flash_attn"],
        ["--per_device_train_batch_size", "4", "--max_seq_length", "256", "--packing", "--use_qlora"],
        ["--per_device_train_batch_size", "4", "--max_seq_length", "256", "--gradient_accumulation_steps", "2"],
    ],
    ids=" ".join,
)
def test_the_largest_that_fits_fits_and_one_more_does_not(
    llama: Path, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun(sharding=Sharding(method="fsdp", gpus=4) if "--use_lora" in flags else None)
    monkeypatch.setattr(what_fits, "GIGABYTE", 10**6)
    monkeypatch.setattr(memory, "CONTEXT_BYTES", 0)
    plan, arguments = make_plan(llama, tmp_path, *flags)

    def total(size: int, length: int) -> int:
        changed = replace(arguments, per_device_train_batch_size=size, max_seq_length=length)
        return estimate(plan, changed, run).total

    result = estimate(plan, arguments, run)
    for fit in (result.fits[0], result.fits[5]):
        room = fit.gigabytes * 10**6
        assert fit.fits == (result.total <= room) == (fit.largest_batch >= result.batch_size)
        assert fit.fits == (fit.largest_length >= result.length)
        # a mean over lengths: blocks of 512 bytes and what depends on the length alone are small against a batch
        assert total(fit.largest_batch, result.length) <= 1.005 * room
        assert total(fit.largest_batch + 1, result.length) > 0.995 * room
        assert total(result.batch_size, fit.largest_length) <= 1.005 * room
        assert total(result.batch_size, fit.largest_length + max(1, fit.largest_length // 100)) > 0.995 * room


def test_nothing_fits_where_the_weights_do_not(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(what_fits, "GIGABYTE", 1000)
    result = estimate(*make_plan(llama, tmp_path))
    assert result.fits[0] == Fit(gigabytes=16, fits=False, largest_batch=0, largest_length=0)


def test_shares_of_several_gpus(llama: Path, tmp_path: Path) -> None:
    plan, flags = make_plan(llama, tmp_path)
    alone = estimate(plan, flags)
    trained = sum(value.numel() for value in plan.skeleton.model.parameters())

    def quarter(size: int) -> int:
        return -(-size // 4)

    shares = {
        stage: estimate(plan, flags, TrainingRun(sharding=Sharding(method="zero", gpus=4, stage=stage)))
        for stage in (1, 2, 3)
    }
    for stage, result in shares.items():
        # float32: the weight and AdamW's two states
        assert part(result, "optimizer states") == quarter(12 * trained)
        weights, gradients = part(alone, "weights"), alone.gradient_bytes
        assert part(result, "weights") == (quarter(weights) if stage == 3 else weights)
        assert result.gradient_bytes == (gradients // 4 if stage >= 2 else gradients)
        assert result.saved_bytes == alone.saved_bytes
    sharded = estimate(plan, flags, TrainingRun(sharding=Sharding(method="fsdp", gpus=4)))
    tensors = sum(1 for _ in plan.skeleton.model.parameters())
    # under mixed precision all that is trained is float32, and gathered in bfloat16
    assert part(sharded, "weights") == quarter(4 * trained)
    assert part(sharded, "optimizer states") == quarter(8 * trained + 4 * tensors)
    assert sharded.gradient_bytes == 4 * trained // 4
    assert "a share of 1/4" in sharded.parts[0].origin
    layer = sum(value.nbytes for value in plan.skeleton.model.model.layers[0].parameters())
    outside = part(alone, "weights") - 2 * layer
    gathered = sharded.moments[0].temporary - alone.moments[0].temporary
    assert gathered == 2 * layer + outside


def test_methods_side_by_side(llama: Path, tmp_path: Path) -> None:
    plan, flags = make_plan(llama, tmp_path, "--use_lora", "--lora_rank", "8", "--base", "reference")
    full, lora, qlora = compare_methods(plan, flags)
    for other, result in ((["--use_lora"], lora), (["--use_qlora"], qlora), ([], full)):
        assert result == estimate(*make_plan(llama, tmp_path, "--lora_rank", "8", *other))
    assert [result.method for result in (full, lora, qlora)] == ["full", "lora", "qlora"]


def test_methods_that_a_checkpoint_can_not_have(llama: Path, tmp_path: Path) -> None:
    prepare(llama, tmp_path / "four", "--use_qlora")
    plan, flags = make_plan(tmp_path / "four", tmp_path, "--use_qlora", "--lora_rank", "8")
    full, lora, qlora = compare_methods(plan, flags)
    assert isinstance(full, NoEstimate)
    assert isinstance(lora, NoEstimate)
    assert full.reason.startswith("the checkpoint is already quantised to 4 bits")
    assert qlora == estimate(*make_plan(llama, tmp_path, "--use_qlora", "--lora_rank", "8"))


def test_a_model_whose_step_can_not_be_simulated(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, flags = make_plan(llama, tmp_path)

    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for meta.\nmore")

    monkeypatch.setattr(type(plan.skeleton.model), "forward", forward)
    expected = NoEstimate(method="full", reason="its training step can't be simulated: no kernel for meta")
    assert estimate_training_memory(plan, flags) == expected
