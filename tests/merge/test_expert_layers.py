"""Adapters of experts that were trained as layers of their own, merged: PEFT's `merge_and_unload`, layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FineGrainedFP8Config, Mxfp4Config

from tests.cli.runs import prepare
from tests.conftest import Result
from tests.formats.fp8_models import Stored, pack
from tests.formats.test_mxfp4 import write_gpt_oss as write_mxfp4
from tests.merge.adapters import merge_by_peft, write_adapter
from tests.merge.expert_layers import load, merge_experts_by_peft, write_expert_adapter
from tests.merge.test_merge import SIMPLE, write_base
from tests.merge.test_spoilt import WEIGHTS, config, set_value, tensors
from tests.parity.compare import assert_same_tensors, read_tensors
from tests.parity.zoo import write_tiny
from tests.tokenizers import write_llama

Ftload = Callable[..., Result]

EXPERTS = {"target_modules": ["q_proj", "gate_up", "down"], "rank_pattern": {"gate_up": 4, "down": 4}}

FEATURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "one tensor an expert": ("mixtral", EXPERTS, 26),
    "many": ("qwen3_moe", EXPERTS, 26),
    "in one tensor, (in, out)": ("gpt_oss", EXPERTS, 6),
    "one projection": ("olmoe", {"target_modules": ["gate_up"]}, 16),
    "some layers": ("qwen3_moe", {"target_modules": ["down"], "layers_to_transform": [1]}, 4),
    "some experts": (
        "qwen3_moe",
        {"target_modules": [f"model.layers.{name}" for name in ("0.mlp.experts.2.gate_up", "1.mlp.experts.0.down")]},
        3,
    ),
    "some experts of one tensor": (
        "gpt_oss",
        {"target_modules": [f"model.layers.{name}" for name in ("0.mlp.experts.2.gate_up", "1.mlp.experts.0.down")]},
        2,
    ),
    "ranks and scales of their own": (
        "mixtral",
        {
            "target_modules": ["gate_up", "down"],
            "use_rslora": True,
            "rank_pattern": {"experts.1.gate_up": 2, "layers.1.mlp.experts.3.down": 3},
            "alpha_pattern": {"down": 5, "experts.0.gate_up": 3},
        },
        24,
    ),
    "dora": ("qwen3_moe", {"target_modules": ["gate_up", "down"], "use_dora": True}, 24),
}
"""Architecture, PEFT's settings, and how many tensors change."""


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_written_is_what_peft_merges(tmp_path: Path, feature: str) -> None:
    architecture, settings, changed = FEATURES[feature]
    base = write_base(tmp_path / "base", architecture)
    write_expert_adapter(base, tmp_path / "adapter", **{"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, **settings})
    merge_experts_by_peft(base, tmp_path / "reference", tmp_path / "adapter")

    report = prepare(base, tmp_path / "output", "--merge_adapter", tmp_path / "adapter", *SIMPLE)

    assert_same_tensors(tmp_path / "output", tmp_path / "reference")
    before, after = read_tensors(base), read_tensors(tmp_path / "output")
    assert sum(not value.equal(before[name]) for name, value in after.items()) == changed
    assert report["source"]["merged"][0]["tensors"] == changed


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "glm4_moe", "granitemoe", "qwen3_5_moe_text", "nemotron_h", "lfm2_moe"]
)
def test_experts_of_a_type_however_its_checkpoint_holds_them(tmp_path: Path, model_type: str) -> None:
    base = tmp_path / "base"
    write_tiny(base, model_type, vocab_size=144)
    write_llama(base)
    first = "up" if model_type == "nemotron_h" else "gate_up"
    write_expert_adapter(base, tmp_path / "adapter", r=4, target_modules=[first, "down"])
    merge_experts_by_peft(base, tmp_path / "reference", tmp_path / "adapter")
    prepare(base, tmp_path / "output", "--merge_adapter", tmp_path / "adapter", *SIMPLE)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")


@pytest.mark.parametrize("fused", [False, True], ids=["one layer an expert", "target_parameters"])
@pytest.mark.parametrize("stored", ["FP8", "MXFP4"])
def test_a_base_in_few_bits_is_decoded_and_merged(tmp_path: Path, stored: str, fused: bool) -> None:
    """Against an adapter that PEFT merges into what transformers dequantises."""
    base, plain, adapter, ours, theirs = (tmp_path / name for name in ("base", "plain", "adapter", "ours", "theirs"))
    settings: Any
    if stored == "FP8":
        write_base(base, "qwen3_moe")
        pack(base, Stored(block=(32, 32)))
        settings = FineGrainedFP8Config(dequantize=True)
    else:
        write_mxfp4(base)
        settings = Mxfp4Config(dequantize=True)
    load(base, quantization_config=settings).save_pretrained(plain)
    if fused:
        write_adapter(plain, adapter, r=8, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
        merge_by_peft(plain, theirs, adapter)
    else:
        write_expert_adapter(plain, adapter, r=8, **EXPERTS)
        merge_experts_by_peft(plain, theirs, adapter)
    report = prepare(base, ours, "--merge_adapter", adapter, *SIMPLE)
    assert_same_tensors(ours, theirs)
    assert {row["format"] for row in report["source"]["stored"]} == {stored, None}
    assert report["source"]["merged"][0]["tensors"] == (26 if stored == "FP8" else 6)


def test_one_adapter_on_another(tmp_path: Path) -> None:
    """Experts trained as layers, after experts that were trained in one tensor."""
    base, first, second = write_base(tmp_path / "base", "qwen3_moe"), tmp_path / "first", tmp_path / "second"
    write_adapter(base, first, r=4, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    write_expert_adapter(base, second, r=8, **EXPERTS)
    merge_by_peft(base, tmp_path / "between", first)
    merge_experts_by_peft(tmp_path / "between", tmp_path / "reference", second)
    prepare(base, tmp_path / "output", "--merge_adapter", first, second, *SIMPLE)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")


P = "base_model.model.model.layers.1.mlp.experts"
SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "B of an expert is missing": (
        tensors(lambda found: found.pop(f"{P}.2.down.lora_B.weight")),
        f"lacks the tensor `{P}.2.down.lora_B.weight`",
    ),
    "an expert is missing": (
        tensors(lambda found: [found.pop(f"{P}.3.gate_up.lora_{which}.weight") for which in "AB"]),
        f"lacks the tensor `{P}.3.gate_up.lora_A.weight`",
    ),
    "all experts are missing": (
        tensors(lambda found: [found.pop(name) for name in list(found) if ".experts." in name]),
        f"lacks the tensor `{P.replace('.1.', '.0.')}.0.down.lora_A.weight`",
    ),
    "an expert too many": (
        tensors(lambda found: found.update({f"{P}.4.down.lora_A.weight": torch.zeros(4, 32)})),
        f"tensor `{P}.4.down.lora_A.weight` of the adapter `ADAPTER` belongs to no layer",
    ),
    "a projection that is not there": (
        tensors(lambda found: found.update({f"{P}.0.up.lora_A.weight": torch.zeros(4, 64)})),
        f"tensor `{P}.0.up.lora_A.weight` of the adapter `ADAPTER` belongs to no layer",
    ),
    "another rank": (
        tensors(lambda found: found.update({f"{P}.0.down.lora_A.weight": torch.zeros(5, 32)})),
        f"tensor `{P}.0.down.lora_A.weight` of the adapter `ADAPTER` has shape [5, 32], the model asks for [4, 32]",
    ),
    "gate alone": (
        tensors(lambda found: found.update({f"{P}.1.gate_up.lora_B.weight": torch.zeros(32, 4)})),
        f"tensor `{P}.1.gate_up.lora_B.weight` of the adapter `ADAPTER` has shape [32, 4], the model asks for [64, 4]",
    ),
    "experts that are no targets": (
        config(target_modules=["q_proj", "gate_up"]),
        f"tensor `{P.replace('.1.', '.0.')}.0.down.lora_A.weight` of the adapter `ADAPTER` belongs to no layer",
    ),
    "NaN": (
        set_value(f"{P}.1.gate_up.lora_A.weight", float("nan")),
        f"tensor `{P}.1.gate_up.lora_A.weight` of the adapter's `{WEIGHTS}` holds NaN or infinity",
    ),
    "fused and in layers": (
        tensors(lambda found: found.update({f"{P}.lora_A.weight": torch.zeros(16, 32)})),
        f"tensor `{P}.lora_A.weight` of the adapter `ADAPTER` belongs to no layer",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with what can be spoilt; tests copy it."""
    directory = tmp_path_factory.mktemp("sound")
    write_expert_adapter(write_base(directory / "base", "qwen3_moe"), directory / "adapter", r=8, **EXPERTS)
    return directory / "adapter"


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_adapter_is_refused(ftload: Ftload, sound: Path, tmp_path: Path, case: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(sound, adapter)
    spoil, says = SPOILT[case]
    spoil(adapter)
    assert_refused(ftload("merge", adapter, "--output_dir", tmp_path / "out"), says.replace("ADAPTER", str(adapter)))
    assert not (tmp_path / "out").exists()


def assert_refused(result: Result, says: str) -> None:
    assert result.code == 4, result.err
    assert says in result.err
    assert "Traceback" not in result.err
    assert result.err.count("\n") <= 2


def test_the_sound_one_is_taken(ftload: Ftload, sound: Path, tmp_path: Path) -> None:
    assert ftload("merge", sound, "--output_dir", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("architecture", "settings", "name"),
    [
        ("gpt_oss", {"target_modules": ["down"], "use_dora": True}, "0.down"),
        ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts.2.gate_up"]}, "2.gate_up"),
    ],
    ids=["DoRA of experts that lie (in, out)", "an expert that was trained whole"],
)
def test_what_can_t_be_followed_is_refused(
    ftload: Ftload, tmp_path: Path, architecture: str, settings: dict[str, Any], name: str
) -> None:
    base = write_base(tmp_path / "base", architecture)
    write_expert_adapter(base, tmp_path / "adapter", r=4, **settings)
    result = ftload("merge", tmp_path / "adapter", "--output_dir", tmp_path / "out")
    assert_refused(result, f"changes `model.layers.0.mlp.experts.{name}.weight`, which is one of a model's experts")
