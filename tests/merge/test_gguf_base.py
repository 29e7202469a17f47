"""Adapters merged onto GGUF files: against PEFT on what transformers decodes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from tests.cli.runs import prepare
from tests.formats.gguf_models import write_tiny
from tests.merge.adapters import merge_by_peft, write_adapter
from tests.merge.expert_layers import merge_experts_by_peft, write_expert_adapter
from tests.merge.test_merge import SIMPLE
from tests.parity.compare import assert_same_tensors
from tests.tokenizers import write_llama

FUSED = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
        ("qwen3_moe", FUSED),
        ("qwen3_moe", {"target_modules": ["q_proj", "gate_up", "down"]}),
    ],
    ids=["dense", "experts by target_parameters", "one layer an expert"],
)
def test_what_is_written_is_what_peft_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    # transformers asks for the same table of names at every module, which takes seconds
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    file, plain, adapter, ours, theirs = (tmp_path / part for part in ("m.gguf", "plain", "adapter", "ours", "theirs"))
    write_tiny(file, name, tokens=128)
    AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).save_pretrained(plain)
    write_llama(plain)
    is_of_layers = "gate_up" in settings["target_modules"]
    (write_expert_adapter if is_of_layers else write_adapter)(plain, adapter, r=8, **settings)
    (merge_experts_by_peft if is_of_layers else merge_by_peft)(plain, theirs, adapter)
    prepare(file, ours, "--merge_adapter", adapter, "--tokenizer_name_or_path", plain, *SIMPLE)
    assert_same_tensors(ours, theirs)
