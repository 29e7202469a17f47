"""The simulated training step of mixtures: experts in 4 bits, and adapters of experts, against real steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ftload.loaders import load_prepared
from ftload.loaders.flags.declared import FlatArguments
from ftload.loaders.memory.estimate import compare_methods, estimate_training_memory
from ftload.loaders.memory.sharding import Sharding
from ftload.loaders.memory.step import recorded_step
from ftload.loaders.memory.step.setting import Batch, LoraSetting, Setting
from ftload.loaders.memory.step.simulation import Simulation
from ftload.loaders.memory.training_memory import NoEstimate, TrainingMemory
from ftload.loaders.memory.training_run import TrainingRun
from ftload.loaders.model.experts.fused import find_experts
from ftload.loaders.plan.plan import Plan

from ..cli.runs import prepare
from ..experts.checkpoints import MODELS, load, random_model, write_checkpoint
from ..tokenizers import write_llama
from .plans import make_plan
from .test_activations import VOCABULARY, measured_peak, saved_by, statistics_of

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 400}
WIDE = {
    "qwen3_moe": {**SIZES, "num_experts": 8},
    # not even an expert's rows are whole blocks
    "qwen3_moe_48": {**SIZES, "num_experts": 8},
    # a layer of ftload's own, and biases
    "gpt_oss": {**SIZES, "num_local_experts": 8, "intermediate_size": 96},
}


def route_evenly(model: Any) -> None:
    """Send the same number of tokens to each expert, or one more."""

    def reroute(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index, *more = args
        even = torch.arange(index.numel()).reshape(index.shape) % module.num_experts
        return (hidden, even, *more)

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(reroute)


def meta_model(name: str, **changes: Any) -> Any:
    config_class, arguments = MODELS[name]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")


def attention_of(model: Any) -> str:
    """What transformers chooses by itself."""
    return "eager" if model.config.model_type == "gpt_oss" else "sdpa"


def linear_layers(model: Any) -> frozenset[str]:
    """What bitsandbytes replaces: all linear layers but the head."""
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith("lm_head")
    )


def setting_of(meta: Any, *, rank: int, checkpointing: bool, dropout: float) -> Setting:
    adapted = frozenset(name for name, _ in meta.named_modules() if name.endswith(ATTENTION))
    experts = find_experts(meta)
    lora = LoraSetting(
        layers=adapted, rank=4, alpha=16, dropout=dropout, experts=experts if rank else (), expert_rank=rank
    )
    return Setting(
        attention=attention_of(meta), checkpointing=checkpointing, lora=lora, device="cpu",
        quantised=linear_layers(meta), quantised_experts=experts,
    )  # fmt: skip


def trained_model(directory: Path, *, rank: int, checkpointing: bool, dropout: float) -> Any:
    """The checkpoint loaded, prepared for k-bit training, and adapted, as `load_prepared` does it."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model, _ = load(directory, device_map={"": "cpu"}, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    layers = ["gate_up", "down"] if rank else []
    config = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=dropout, target_modules=[*ATTENTION, *layers],
        rank_pattern=dict.fromkeys(layers, rank), task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config).train()
    route_evenly(model)
    return model


def step_of(model: Any, batch: Batch) -> Callable[[], None]:
    tokens = torch.randint(3, 90, (batch.size, batch.length))

    def step() -> None:
        # see `test_activations.py`
        with torch.backends.mkldnn.flags(enabled=False):
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
            output.loss.backward()

    return step


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("experts")

    def write(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else write_checkpoint(directory, name, **WIDE[name])

    return write


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("rank", [0, 8], ids=["", "lora_experts"])
@pytest.mark.parametrize("name", WIDE)
def test_saved_bytes_of_experts_in_four_bits_are_those_of_real_steps(
    written: Callable[[str], Path], name: str, rank: int, checkpointing: bool, autocast: bool
) -> None:
    model = trained_model(written(name), rank=rank, checkpointing=checkpointing, dropout=0.1)
    meta = meta_model(name, **WIDE[name])
    setting = replace(setting_of(meta, rank=rank, checkpointing=checkpointing, dropout=0.1), autocast=autocast)
    simulation = Simulation(meta, setting)
    for batch in (Batch(size=1, length=16), Batch(size=3, length=64), Batch(size=1, length=1)):
        tokens = torch.randint(3, 90, (batch.size, batch.length))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            real = saved_by(model, {"input_ids": tokens, "labels": tokens})
        assert simulation.run(batch).saved == pytest.approx(real, rel=0.01 if autocast else 0), batch


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("accumulate", [False, True], ids=["", "accumulate"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("rank", [0, 8], ids=["", "lora_experts"])
@pytest.mark.parametrize("name", WIDE)
def test_peak_of_experts_in_four_bits_is_that_of_real_steps(
    written: Callable[[str], Path], name: str, rank: int, checkpointing: bool, accumulate: bool
) -> None:
    model = trained_model(written(name), rank=rank, checkpointing=checkpointing, dropout=0.1)
    meta = meta_model(name, **WIDE[name])
    simulation = Simulation(meta, setting_of(meta, rank=rank, checkpointing=checkpointing, dropout=0.1))
    batch = Batch(size=4, length=128)
    step = step_of(model, batch)
    step()
    left = sum(value.grad.nbytes for value in model.parameters() if value.grad is not None) if accumulate else 0
    if not accumulate:
        model.zero_grad()
    # kernels have room to work in beside tensors
    assert simulation.run(batch, accumulate=accumulate).peak.total == pytest.approx(
        measured_peak(step) + left, rel=0.03
    )


@pytest.mark.parametrize("accumulate", [False, True], ids=["", "accumulate"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("rank", [0, 8], ids=["", "lora_experts"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_three_experts_stand_for_all_exactly(
    name: str, rank: int, checkpointing: bool, accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**WIDE[name], "num_hidden_layers": 2}
    changes["num_local_experts" if name == "gpt_oss" else "num_experts"] = 9
    meta = meta_model(name, **changes)
    # a GPU's allocator rounds what it gives out
    setting = replace(setting_of(meta, rank=rank, checkpointing=checkpointing, dropout=0.1), device="cuda")
    # of 9 experts, 5 get two tokens and 4 one; 6 get one and 3 none
    for batch in (Batch(size=1, length=7), Batch(size=1, length=3)):
        with monkeypatch.context() as context:
            context.setattr(recorded_step, "count_repeats", lambda *_: None)
            whole = Simulation(meta, setting).run(batch, accumulate=accumulate)
        assert Simulation(meta, setting).run(batch, accumulate=accumulate) == whole


def adapted_in_16_bits(name: str, *, checkpointing: bool) -> tuple[Any, Any, Setting]:
    """A real model whose experts PEFT adapts as parameters, the same on `meta`, and how it is trained."""
    from peft import LoraConfig, get_peft_model

    model = random_model(name, **WIDE[name])
    route_evenly(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    meta = meta_model(name, **WIDE[name])
    experts = find_experts(meta)
    config = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, target_modules=list(ATTENTION), task_type="CAUSAL_LM",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.gate_up_proj": 8, "experts.down_proj": 8},
    )  # fmt: skip
    setting = setting_of(meta, rank=8, checkpointing=checkpointing, dropout=0.0)
    setting = replace(setting, quantised=frozenset(), quantised_experts=())
    adapted = get_peft_model(model, config).train()
    trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    per_expert = sum(8 * (one.in_features + one.out_features) * one.experts for one in experts)
    assert trained > per_expert
    assert Simulation(meta, setting).gradients == 4 * trained
    return adapted, meta, setting


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", WIDE)
def test_experts_adapted_as_parameters_take_what_real_steps_take(name: str, checkpointing: bool) -> None:
    model, meta, setting = adapted_in_16_bits(name, checkpointing=checkpointing)
    simulation = Simulation(meta, setting)
    for batch in (Batch(size=1, length=16), Batch(size=3, length=64)):
        tokens = torch.randint(3, 90, (batch.size, batch.length))
        real = saved_by(model, {"input_ids": tokens, "labels": tokens})
        assert simulation.run(batch).saved == real, batch
    batch = Batch(size=4, length=128)
    step = step_of(model, batch)
    step()
    model.zero_grad()
    assert simulation.run(batch).peak.total == pytest.approx(measured_peak(step), rel=0.02)


def bytes_held(model: Any) -> int:
    """Of all parameters and their statistics; a slice counts as the whole that it is of, which counts once."""
    tensors = [value for parameter in model.parameters() for value in (parameter, *statistics_of(parameter))]
    # `load_prepared` counts no offset, 4 bytes a weight
    sizes = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors if value.dim()}
    return sum(sizes.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_64", "qwen3_moe_48", "gpt_oss"])
def test_weights_of_experts_in_four_bits_are_those_held_by_a_loaded_model(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "model", name)
    flags = ["--use_qlora", "--lora_rank", "8", "--lora_experts", "4", "--min_quantized", "0"]
    prepare(tmp_path / "model", tmp_path / "out", *flags)
    model, _ = load_prepared(tmp_path / "out")
    plan, arguments = make_plan(tmp_path / "model", tmp_path, *flags)
    assert len(plan.quantised_experts) == 4
    result = estimate_training_memory(plan, arguments)
    assert isinstance(result, TrainingMemory), result
    held = {part.name: part.bytes for part in result.parts}
    assert held["weights"] + held["adapter"] == bytes_held(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert held["adapter"] == result.gradient_bytes == sum(value.nbytes for value in trained)


def test_methods_side_by_side(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "qwen3_moe")
    shared = ["--lora_rank", "8", "--lora_experts", "4", "--min_quantized", "0"]

    def plan_of(*flags: str) -> tuple[Plan, FlatArguments]:
        return make_plan(tmp_path / "model", tmp_path, *flags, *(shared if flags else []))

    alone = [estimate_training_memory(*plan_of(*flags)) for flags in ([], ["--use_lora"], ["--use_qlora"])]
    # whichever of them was asked for
    for flags in (["--use_lora"], ["--use_qlora"]):
        assert list(compare_methods(*plan_of(*flags))) == alone
    left = make_plan(tmp_path / "model", tmp_path, "--use_lora", *shared, "--quantize_experts", "false")
    full, lora, qlora = compare_methods(*left)
    assert [full, lora] == alone[:2]
    experts = sum(one.experts * one.in_features * one.out_features for one in find_experts(left[0].skeleton.model))
    parts = {part.name: part.bytes for part in alone[2].parts} if isinstance(alone[2], TrainingMemory) else {}
    kept = {part.name: part.bytes for part in qlora.parts} if isinstance(qlora, TrainingMemory) else {}
    # four bytes a weight instead of half a byte, a byte for 64 of them, 4 bytes for 64 · 256, and two maps a parameter
    assert kept["weights"] - parts["weights"] == 4 * experts - experts // 2 - experts // 64 - experts // 4096 - 4 * 1088
    assert "as many tokens for each expert" in next(p.origin for p in alone[2].parts if p.name == "activations")
    sharded = estimate_training_memory(
        *plan_of("--use_qlora"), TrainingRun(sharding=Sharding(method="zero", gpus=4, stage=3))
    )
    assert isinstance(sharded, NoEstimate)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rank", [0, 2], ids=["", "lora_experts"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_step_holds_its_activations_and_less_than_one_layers_experts(tmp_path: Path, name: str, rank: int) -> None:
    count = {"num_local_experts": 32} if name == "gpt_oss" else {"num_experts": 32}
    changes = {**SIZES, **count, "intermediate_size": 256}
    directory = write_checkpoint(tmp_path / "model", name, **changes)
    model = trained_model(directory, rank=rank, checkpointing=False, dropout=0.0)
    batch = Batch(size=1, length=32)
    tokens = torch.randint(3, 90, (1, 32))
    saved = saved_by(model, {"input_ids": tokens, "labels": tokens})
    one_layers = 2 * sum(
        fused.experts * fused.in_features * fused.out_features
        for fused in find_experts(meta_model(name, **changes))[:2]
    )
    step = step_of(model, batch)
    step()
    model.zero_grad()
    assert saved < measured_peak(step) < saved + one_layers


def write_model(directory: Path, name: str) -> None:
    random_model(name, vocab_size=VOCABULARY).save_pretrained(directory)
    write_llama(directory)
