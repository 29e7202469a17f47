"""A directory whose experts are 4-bit, with the adapter that was trained on them, becomes one plain model.

The directory is made by transformers and bitsandbytes alone, and so is what it has to become.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.cli.runs import prepare
from tests.experts.checkpoints import load, reference, write_checkpoint
from tests.merge.adapters import decode, move
from tests.merge.expert_layers import put_together, take_apart
from tests.merge.test_merge import SIMPLE
from tests.parity.compare import assert_same_tensors
from tests.tokenizers import write_llama


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "qwen3_moe_48", "mixtral", "gpt_oss", "gpt_oss_square", "nemotron_h", "granitemoe"]
)
def test_experts_are_decoded_and_merged(tmp_path: Path, name: str) -> None:
    base = write_checkpoint(tmp_path / "base", name, vocab_size=128)
    write_llama(base)
    model, _ = load(base)
    torch.manual_seed(1)
    settings = {"r": 8, "target_modules": ["q_proj", "up" if name == "nemotron_h" else "gate_up", "down"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    move(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))

    plain = reference(base)
    decode(plain)
    take_apart(plain)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload()
    put_together(merged)
    merged.save_pretrained(tmp_path / "reference")

    report = prepare(base, tmp_path / "output", "--merge_adapter", tmp_path / "adapter", *SIMPLE)

    assert_same_tensors(tmp_path / "output", tmp_path / "reference")
    assert "quantization_config" not in json.loads((tmp_path / "output/config.json").read_text())
    experts = [row for row in report["source"]["stored"] if row["component"] == "experts" and row["dtype"] == "nf4"]
    assert [row["tensors"] for row in experts] == [8 if name == "nemotron_h" else 4]
