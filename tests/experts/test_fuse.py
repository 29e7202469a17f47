"""An adapter of experts that were layers, written for the model that has them in parameters: the same deltas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.errors import CheckpointError, OutputError
from ftload.loaders.fuse import fuse
from ftload.loaders.load import load_prepared
from ftload.loaders.progress import Silent
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..conftest import Result
from ..hub import LoopbackHub
from ..merge.adapters import move
from ..merge.expert_layers import load, put_together, take_apart, write_expert_adapter
from .checkpoints import random_model
from .test_adapters import prepare_from, write_source

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
SETTINGS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "gate_up", "up", "down"],
    "rank_pattern": {r".*\.\d+\.(gate_up|up|down)": 4},
}


def written(directory: Path, name: str, **settings: Any) -> tuple[Path, Path]:
    """The model in 16 bits, and an adapter on its experts as layers."""
    base, adapter = directory / "base", directory / "adapter"
    random_model(name).save_pretrained(base)
    write_expert_adapter(base, adapter, **{**SETTINGS, **settings})
    return base, adapter


def merged_weights(base: Path, adapter: Path, *, apart: bool) -> dict[str, torch.Tensor]:
    """What PEFT makes of the model in float32, so that deltas are not rounded."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if apart:
        take_apart(model)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    if apart:
        put_together(merged)
    return merged.state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha_pattern": {"down": 32}, "rank_pattern": {"down": 2, "q_proj": 16}},
        {"use_rslora": True},
        {"rank_pattern": {}},
    ],
    ids=["rank", "patterns", "rslora", "plain"],
)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gpt_oss_square", "nemotron_h", "mixtral", "granitemoe"])
def test_every_expert_has_its_delta(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    base, adapter = written(tmp_path, name, **settings)
    fused = fuse(str(adapter), str(base), None, tmp_path / "fused", Silent())
    config = json.loads((tmp_path / "fused" / "adapter_config.json").read_text())
    first = "up" if name == "nemotron_h" else "gate_up"
    assert config["target_parameters"] == ["experts.down_proj", f"experts.{first}_proj"]
    assert config["target_modules"] == ["q_proj"]
    assert config["lora_dropout"] == 0
    assert config["base_model_name_or_path"] == str(base)
    ours, theirs = (merged_weights(base, tmp_path / "fused", apart=False), merged_weights(base, adapter, apart=True))
    plain = load(base).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
        if key.endswith(("experts.down_proj", f"experts.{first}_proj", "q_proj.weight")):
            moved = (value - plain[key].float()).flatten(1).norm(dim=1)
            assert (moved > 1e-3).all()  # of each expert
    tensors = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert fused.tensors == len(tensors)
    assert fused.parameters == sum(value.numel() for value in tensors.values())
    source = load_file(adapter / "adapter_model.safetensors")
    kept = [key for key in source if "q_proj" in key]
    assert kept
    assert all(torch.equal(tensors[key], source[key]) for key in kept)
    assert sum(value.numel() for value in source.values()) == fused.parameters


def test_what_was_trained_on_an_output(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen3_moe")
    prepare_from(source, tmp_path / "out", "--use_qlora", "--lora_experts", "4", "--lora_dropout", "0.1")
    model, _ = load_prepared(tmp_path / "out")
    move(model)
    model.save_pretrained(str(tmp_path / "trained"))
    base = tmp_path / "source"
    fuse(str(tmp_path / "trained"), str(base), None, tmp_path / "fused", Silent())
    ours = merged_weights(base, tmp_path / "fused", apart=False)
    theirs = merged_weights(base, tmp_path / "trained", apart=True)
    plain = load(base).state_dict()
    moved = [key for key, value in theirs.items() if not torch.equal(value, plain[key].float())]
    assert len(moved) == 12
    for key in moved:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


def spoil_one(adapter: Path) -> None:
    """Leave an expert's layer out."""
    path = adapter / "adapter_model.safetensors"
    left = {key: value for key, value in load_file(path).items() if "layers.1.mlp.experts.2.down." not in key}
    save_file(left, path, metadata={"format": "pt"})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "it has DoRA's magnitudes (`base_model.model.model.layers.0.mlp.experts.0."),
    "ranks": ({"rank_pattern": {r"experts\.2\.down": 2}}, "its experts differ in rank or scale"),
    "scales": ({"alpha_pattern": {r"experts\.2\.down": 2}}, "its experts differ in rank or scale"),
    "layers": ({"rank_pattern": {r"layers\.1\..*\.down": 2}}, "ranks or scales of `experts.down_proj` differ"),
    "none": ({"target_modules": ["q_proj"], "rank_pattern": {}}, "has no layers of experts"),
    "some": ({"target_modules": r".*(q_proj|experts\.[013]\.down)", "rank_pattern": {}}, "1 of 4 experts have none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_parameters_can_not_hold_is_refused(tmp_path: Path, case: str) -> None:
    settings, words = REFUSED[case]
    # of Qwen's types PEFT takes a pattern for the last names that it hits
    base, adapter = written(tmp_path, "gpt_oss" if case == "some" else "qwen3_moe", **settings)
    with pytest.raises(CheckpointError) as raised:
        fuse(str(adapter), str(base), None, tmp_path / "fused", Silent())
    assert words in raised.value.message
    assert not (tmp_path / "fused").exists()


def test_what_is_damaged_or_another_models_is_refused(tmp_path: Path) -> None:
    base, adapter = written(tmp_path, "qwen3_moe")
    spoil_one(adapter)
    with pytest.raises(CheckpointError, match=r"lacks the tensor `.*layers\.1\.mlp\.experts\.2\.down"):
        fuse(str(adapter), str(base), None, tmp_path / "fused", Silent())
    random_model("mixtral").save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="has shape"):
        fuse(str(adapter), str(tmp_path / "other"), None, tmp_path / "fused", Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_the_command(tmp_path: Path, ftload: Any) -> None:
    base, adapter = written(tmp_path, "qwen3_moe")
    words = ("merge", str(adapter), "--adapter_only", "--model", str(base), "--output_dir", str(tmp_path / "fused"))
    done: Result = ftload(*words, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["target_parameters"] == {"experts.down_proj": 2, "experts.gate_up_proj": 2}
    assert ftload(*words).code == 8
    with pytest.raises(OutputError, match="exists and is not empty"):
        fuse(str(adapter), str(base), None, tmp_path / "fused", Silent())
    again = ftload(*words[:-1], str(tmp_path / "again"))
    assert again.out.startswith(str(tmp_path / "again"))
    assert "experts.down_proj ×2, experts.gate_up_proj ×2" in again.out


def test_the_model_may_lie_on_a_hub(tmp_path: Path) -> None:
    base, adapter = written(tmp_path, "qwen3_moe")
    with LoopbackHub() as hub:
        commit = hub.add("org/model", base, tags=("v1",))
        hub.add("org/model", {"config.json": b"{}"})  # what the branch holds by now
        words = ["merge", adapter, "--adapter_only", "--model", "org/model", "--model_revision", "v1", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "ftload.cli", *words], cwd=tmp_path, env=hub.env(tmp_path / "home"),
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert hub.sent("*.safetensors") < (base / "model.safetensors").stat().st_size  # headers
    said = json.loads(done.stdout)
    assert (said["directory"], said["base"], said["revision"]) == (str(tmp_path / "output"), "org/model", commit)
    config = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", commit)
