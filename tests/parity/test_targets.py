"""Every adapter that ftload chooses, PEFT makes and loads again; other towers are left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ftload.cli.app import run
from ftload.loaders.errors import UsageError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json

from ..tokenizers import write_llama
from .compare import assert_same_adapter_config, assert_same_tensors, read_tensors
from .models import write_model
from .reference import REFERENCE_TARGETS, run_reference
from .zoo import write_tiny

MAMBA = "Module 'out_proj' is incompatible with Mamba-based models"
TARGETS = {
    # names that modules of other kinds have as well
    "ctrl": (None, "has none of these"),
    "git": (None, "this architecture has no o_proj, gate_proj, up_proj, down_proj"),
    "zamba2": (None, "all linear layers of its blocks are trained instead"),
    "reformer": (None, "all linear layers of its blocks are trained instead"),
    # what PEFT forbids
    "mamba": ({"in_proj", "x_proj", "dt_proj"}, MAMBA),
    "mamba2": ({"in_proj"}, MAMBA),
    "falcon_mamba": ({"in_proj", "x_proj", "dt_proj"}, MAMBA),
    "nemotron_h": (
        {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
        "the rest alone is trained; PEFT refuses `out_proj`: ",
    ),
    # what it rewrites where weights are merged on loading
    "afmoe": ({"q_proj", "k_proj", "v_proj", "o_proj"}, "PEFT refuses `gate_proj`"),
    "beam": ({"q_proj", "k_proj", "v_proj", "o_proj"}, "PEFT refuses `gate_proj`"),
}
"""Type to the last parts of its targets' names, where a few say them, and to words of the reason."""


@pytest.mark.parametrize("model_type", TARGETS)
def test_peft_makes_what_is_chosen(tmp_path: Path, model_type: str) -> None:
    write_tiny(tmp_path / "source", model_type, vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    report = _prepare(tmp_path)
    targets = list(report["adapter"]["targets"])
    expected, words = TARGETS[model_type]
    assert expected is None or {target.rpartition(".")[2] for target in targets} == expected
    (decision,) = (decision for decision in report["decisions"] if decision["what"] == "LoRA targets")
    assert decision["requested"] == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert decision["effective"] == " ".join(targets)
    assert words in decision["reason"]
    run_reference(tmp_path / "source", tmp_path / "theirs", strategy="lora", tokenizer_size=129, targets=targets)
    assert_same_tensors(tmp_path / "out" / "adapter", tmp_path / "theirs" / "adapter")
    assert_same_adapter_config(tmp_path / "out" / "adapter", tmp_path / "theirs" / "adapter")
    _load(tmp_path / "out")


def test_mamba_beside_attention_that_has_the_usual_names(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", "falcon_h1", vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    report = _prepare(tmp_path)
    assert report["adapter"]["targets"] == dict.fromkeys(REFERENCE_TARGETS, 2)
    assert "LoRA targets" not in {decision["what"] for decision in report["decisions"]}
    _load(tmp_path / "out")


def test_image_and_audio_towers_get_no_adapter(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", "phi4_multimodal", vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    _prepare(tmp_path)
    names = [name for name in read_tensors(tmp_path / "out" / "adapter") if ".lora_A." in name]
    assert len(names) == 8
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    with pytest.raises(UsageError, match="lies outside the language model's layers and was not asked for") as raised:
        _prepare(tmp_path, "--lora_target_modules", "q_proj", output="named")
    assert raised.value.hint == "name the layers in full, with a dot in each name"


@pytest.mark.parametrize(
    ("model_type", "names", "message"),
    [
        ("mamba", ["in_proj", "out_proj"], MAMBA),
        ("mixtral", ["gate_proj"], "no linear layer is called `gate_proj`"),
        ("afmoe", ["q_proj", "gate_proj"], "PEFT can't adapt these layers: "),
    ],
)
def test_what_is_asked_for_and_peft_refuses(tmp_path: Path, model_type: str, names: list[str], message: str) -> None:
    write_tiny(tmp_path / "source", model_type, vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    with pytest.raises(UsageError) as raised:
        _prepare(tmp_path, "--lora_target_modules", *names)
    assert message in raised.value.message
    assert not (tmp_path / "out").exists()


def test_a_name_twice_is_a_name(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama", vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    report = _prepare(tmp_path, "--lora_target_modules", "q_proj", "v_proj", "q_proj")
    assert report["adapter"]["targets"] == {"q_proj": 2, "v_proj": 2}
    stored = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["q_proj", "v_proj"]
    _load(tmp_path / "out")


def test_the_usual_targets_need_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "source", "llama", vocab_size=144)
    write_llama(tmp_path / "source", vocab_size=128)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert set(_prepare(tmp_path)["adapter"]["targets"]) == set(REFERENCE_TARGETS)
    write_model(tmp_path / "other", "phi3", vocab_size=144)
    write_llama(tmp_path / "other", vocab_size=128)
    words = ["prepare", "--model", str(tmp_path / "other"), "--output_dir", str(tmp_path / "no"), "--use_lora"]
    assert run(words) == 5


def _prepare(directory: Path, *flags: str, output: str = "out") -> dict[str, Any]:
    words = [
        "--model", str(directory / "source"), "--output_dir", str(directory / output), "--use_lora", "--base", "copy",
        "--lora_rank", "8",
    ]  # fmt: skip
    outcome = prepare(parse_arguments([*words, *flags]), Silent())
    assert outcome is not None
    return to_json(outcome.report)


def _load(directory: Path) -> None:
    """Load the adapter on its base: nothing is missing, and it is trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(directory / "adapter"), is_trainable=True)
    stored = read_tensors(directory / "adapter")
    trained = {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == stored.keys()
    assert all(torch.equal(trained[name], value) for name, value in stored.items())
