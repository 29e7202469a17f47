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
from ftload.loaders.memory.step.setting import Batch, training_setting
from ftload.loaders.memory.step.simulation import Simulation
from ftload.loaders.memory.training_run import MixedPrecision, TrainingRun

from ..cli.runs import prepare
from .plans import make_plan
from .test_activations import inputs_of, saved_by, write_model

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
IN_16_BITS = {"experts"}


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
@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [
        (name, strategy)
        for name in ADAPTERS
        for strategy in ("lora", "qlora")
        if (name, strategy) != ("experts", "qlora")
    ],
)
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
