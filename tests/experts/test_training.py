"""Adapters on 4-bit experts by PEFT's own calls: trained, saved and loaded again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

from .checkpoints import MODELS, load

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def prepared(directory: Path) -> Any:
    model, _ = load(directory, device_map={"": "cpu"})
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def adapted(directory: Path, **settings: Any) -> Any:
    """With the names that PEFT is asked for, and another rank for experts."""
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "gate_up", "up", "down"],
        rank_pattern={r".*\.experts\.\d+\.(gate_up|up|down)": 4}, **settings,
    )  # fmt: skip
    return get_peft_model(prepared(directory), config)


def tokens() -> torch.Tensor:
    """Enough for every expert."""
    return torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in MODELS), ("qwen3_moe", True), ("gpt_oss", True)]
)
def test_steps_lower_the_loss_and_the_adapter_comes_back(
    written: Callable[[str], Path], tmp_path: Path, name: str, checkpointing: bool
) -> None:
    model, ids = adapted(written(name), lora_dropout=0.1), tokens()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    experts = adapted_experts(model)
    expected = len([name for name, _ in model.named_modules() if name.endswith((".gate_up", ".up", ".down"))])
    assert len(experts) == expected > 0
    for layer in map(model.get_submodule, experts):
        for lora in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            # on either layer: float32, drawn as bfloat16
            assert lora.dtype == torch.float32
            assert torch.equal(lora, lora.bfloat16().float())
        assert layer.lora_A["default"].weight.shape == (4, layer.in_features)
        assert layer.lora_B["default"].weight.shape == (layer.out_features, 4)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(6):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 1e-3, losses
    # but for experts that no token reached
    assert (
        sum(bool(model.get_submodule(expert).lora_B["default"].weight.any()) for expert in experts) > len(experts) / 2
    )

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(prepared(written(name_of(model))), tmp_path / "adapter")
    assert adapted_experts(again) == experts
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def adapted_experts(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A") and ".experts." in name]


def name_of(model: Any) -> str:
    return Path(model.config.name_or_path).name


def test_an_adapter_is_not_merged_into_a_transposed_layer(written: Callable[[str], Path]) -> None:
    """Its weight stays as it is."""
    model = adapted(written("gpt_oss_square"))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts.0.down")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    before = layer.base_layer.weight.clone()
    for safe in (False, True):
        with pytest.raises(RuntimeError):
            layer.merge(safe_merge=safe)
        with pytest.raises(RuntimeError):
            model.merge_and_unload(safe_merge=safe)
        assert torch.equal(layer.base_layer.weight, before)


def test_variants_that_read_the_weight_fail_on_a_transposed_layer(written: Callable[[str], Path]) -> None:
    """What PEFT would take for the weight are bytes: nothing is computed from them."""
    for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            adapted(written("gpt_oss_square"), **settings)


def few_tokens(rank: int) -> torch.Tensor:
    """Of other experts than another process's, so few that some have none."""
    return torch.tensor([[7, 11], [23, 5]])[[rank]]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_two_processes_average_their_gradients(written: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Without looking for unused parameters: an expert that no token reached has a gradient of zeros."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.experts.two_processes", str(written(name)), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone: list[dict[str, torch.Tensor]] = []
    for rank in range(2):
        model, ids = adapted(written(name)).train(), few_tokens(rank)
        model(input_ids=ids, labels=ids).loss.backward()
        alone.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    experts = [name for name in alone[0] if ".experts." in name and "lora_B" in name]
    idle = [[name for name in experts if not gradients[name].any()] for gradients in alone]
    assert all(idle)
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2)
