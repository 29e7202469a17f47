"""The memory of training adapters other than the default, against real ones: what is there, and what a step saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared
from ftload.loaders.memory.estimate import compare_methods, least_bytes
from ftload.loaders.memory.step.setting import Batch, training_setting
from ftload.loaders.memory.step.simulation import Simulation
from ftload.loaders.memory.trained import beside_base
from ftload.loaders.memory.training_memory import TrainingMemory
from ftload.loaders.memory.training_run import MixedPrecision, TrainingRun

from ..cli.runs import prepare
from .plans import make_plan
from .test_activations import TINY, inputs_of, measured_peak, saved_by, write_model
from .test_memory import estimate, held_by, part, states_of, train

BATCHES = (Batch(size=1, length=16), Batch(size=2, length=40, padded=True), Batch(size=3, length=64))
RANKS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 32, "layers.[23].mlp.down_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 8},
}
ADAPTERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "dora": ("llama", ["--use_dora"], {}),
    "dora without dropout": ("llama", ["--use_dora", "--lora_dropout", "0"], {}),
    "dora of Conv1D": ("gpt2", ["--use_dora"], {}),
    "rslora": ("qwen3", ["--use_rslora"], {}),
    "ranks": ("llama", [], RANKS),
    "some layers": ("llama", [], {"layers_to_transform": [1, 4]}),
    "head": ("llama", ["--lora_modules_to_save", "lm_head"], {}),
    "embedding": ("llama", ["--lora_modules_to_save", "embed_tokens", "lm_head"], {}),
    "norms": ("qwen3", ["--lora_modules_to_save", "input_layernorm"], {}),
    "rows": ("llama", ["--trainable_token_indices", "3", "7"], {}),
    "rows of a tied model": ("gemma2", ["--trainable_token_indices", "3", "7"], {}),
    "biases": ("gpt2", [], {"bias": "all"}),
    "lora_bias": ("gpt2", [], {"lora_bias": True}),
    "experts": ("qwen3_moe", ["--lora_target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {}),
}

PAIRS = [
    (name, strategy)
    for name in ADAPTERS
    for strategy in ("lora", "qlora")
    if (name, strategy) != ("experts", "qlora")  # refused: PEFT adapts floating-point parameters alone
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def source(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = tmp_path_factory.mktemp(architecture) / "model"
            write_model(written[architecture], architecture)
        return written[architecture]

    return source


def flags_of(adapter: str, strategy: str, directory: Path) -> tuple[str, list[str]]:
    """The architecture, and what asks for the adapter."""
    architecture, flags, fields = ADAPTERS[adapter]
    flags = [f"--use_{strategy}", *flags]
    if fields:
        file = directory / "lora.json"
        file.write_text(json.dumps(fields))
        flags += ["--lora_config", str(file)]
    if architecture == "gemma2":
        flags.append("--no_use_flash_attn")
    return architecture, [*flags, "--lora_rank", "8"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(("adapter", "strategy"), PAIRS)
def test_saved_bytes_are_those_of_real_steps(
    sources: Callable[[str], Path], tmp_path: Path, adapter: str, strategy: str
) -> None:
    architecture, flags = flags_of(adapter, strategy, tmp_path)
    for checkpointing in ([], ["--gradient_checkpointing"]):
        output = tmp_path / f"out{len(checkpointing)}"
        prepare(sources(architecture), output, *flags, *checkpointing)
        model, _ = load_prepared(output)
        plan, arguments = make_plan(sources(architecture), tmp_path / "plan", *flags, *checkpointing)
        precisions: tuple[MixedPrecision, ...] = ("no", "bf16")
        for precision in precisions:
            setting = training_setting(plan, arguments, TrainingRun(mixed_precision=precision))
            setting = replace(setting, attention=model.config._attn_implementation, device="cpu")
            simulation = Simulation(plan.skeleton.model, setting)
            for batch in BATCHES:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    real = saved_by(model, inputs_of(batch))
                assert simulation.run(batch).saved == pytest.approx(real, rel=0.03), (precision, checkpointing, batch)


def held_beside_parameters(model: Any) -> int:
    """Bytes of the rows' originals, which PEFT keeps as buffers."""
    return sum(value.nbytes for name, value in model.named_buffers() if "trainable_tokens_original" in name)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [
        pair
        for pair in PAIRS
        if pair[0] not in ("dora without dropout", "rslora")
        # bitsandbytes makes the biases of 4-bit layers bfloat16 in the first forward pass
        and pair != ("biases", "qlora")
    ],
)
def test_weights_gradients_and_states_are_those_of_a_real_run(
    sources: Callable[[str], Path], tmp_path: Path, adapter: str, strategy: str
) -> None:
    architecture, flags = flags_of(adapter, strategy, tmp_path)
    prepare(sources(architecture), tmp_path / "out", *flags)
    model, _ = load_prepared(tmp_path / "out")
    plan, arguments = make_plan(sources(architecture), tmp_path / "plan", *flags)
    result = estimate(plan, arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, fused=True)
    if strategy == "qlora":
        from bitsandbytes.optim import AdamW

        optimizer = AdamW(trained, is_paged=True)
    assert part(result, "weights") + part(result, "adapter") == held_by(model) + held_beside_parameters(model)
    gradients = train(model, optimizer)
    assert part(result, "optimizer states") == states_of(optimizer)
    assert result.gradient_bytes == gradients
    setting = training_setting(plan, arguments, TrainingRun())
    assert Simulation(plan.skeleton.model, setting).gradients == gradients


def test_origins_name_what_an_adapter_consists_of(sources: Callable[[str], Path], tmp_path: Path) -> None:
    flags = ["--use_qlora", "--use_dora", "--lora_modules_to_save", "lm_head", "--trainable_token_indices", "3", "7"]
    plan, arguments = make_plan(sources("llama"), tmp_path, *flags, "--lora_rank", "8")
    parts = {part.name: part for part in estimate(plan, arguments).parts}
    told = parts["adapter"].origin
    head = plan.skeleton.model.get_output_embeddings().weight.numel()
    width = plan.skeleton.config.hidden_size
    assert f"saved modules in float32 {4 * head:,}" in told
    assert f"token rows in float32 {4 * 2 * width:,}, originals of token rows {4 * 2 * width:,}" in told
    assert "A and B in float32 " in told and "DoRA's magnitudes in float32 " in told
    assert (
        ", DoRA: the norms of each whole weight anew, saved modules, token rows: the whole embedding anew"
        in parts["activations"].origin
    )


@pytest.mark.parametrize("flags", [["--use_dora"], ["--lora_modules_to_save", "lm_head", "--use_rslora"]], ids=" ".join)
def test_other_methods_and_the_least_memory_keep_the_adapter_that_was_asked_for(
    sources: Callable[[str], Path], tmp_path: Path, flags: list[str]
) -> None:
    """LoRA and QLoRA are compared with all of it; what training takes at least counts all of it."""
    plan, arguments = make_plan(sources("llama"), tmp_path, "--use_lora", *flags)
    _, lora, qlora = compare_methods(plan, arguments)
    kinds = beside_base(plan, TrainingRun()).keys()
    for result in (lora, qlora):
        assert isinstance(result, TrainingMemory)
        told = next(part.origin for part in result.parts if part.name == "adapter")
        assert all(kind in told for kind in kinds)
    result = estimate(plan, arguments)
    lasting = sum(part(result, name) for name in ("weights", "adapter", "optimizer states", "CUDA context"))
    assert least_bytes(plan, arguments) == lasting + result.gradient_bytes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("strategy", ["lora", "qlora"])
@pytest.mark.parametrize("adapter", ["dora", "head", "rows"])
def test_peak_is_that_of_real_steps(
    tmp_path: Path, adapter: str, strategy: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, settings = TINY["llama"]
    # DoRA's norms of a whole weight are the peak then, in the last layer's forward pass
    monkeypatch.setitem(TINY, "llama", (name, {**settings, "hidden_size": 512, "intermediate_size": 768}))
    write_model(tmp_path / "model", "llama")
    _, flags = flags_of(adapter, strategy, tmp_path)
    prepare(tmp_path / "model", tmp_path / "out", *flags)
    model, _ = load_prepared(tmp_path / "out")
    plan, arguments = make_plan(tmp_path / "model", tmp_path / "plan", *flags)
    setting = training_setting(plan, arguments, TrainingRun(mixed_precision="bf16" if autocast else "no"))
    setting = replace(setting, attention="sdpa", device="cpu", keeps_outputs=True)
    batch = Batch(size=2, length=64)
    inputs = inputs_of(batch)

    def step() -> None:
        # oneDNN's kernels take room that has to do with the processor alone
        with torch.backends.mkldnn.flags(enabled=False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                output = model(**inputs, use_cache=False)
            output.loss.backward()

    step()
    model.zero_grad()
    peak = Simulation(plan.skeleton.model, setting).run(batch).peak
    assert peak.total == pytest.approx(measured_peak(step), rel=0.03)
