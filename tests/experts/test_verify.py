"""Verifying a mixture: every expert that is trained gets tokens, a gradient, and moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.progress import Silent
from ftload.loaders.report.outputs import read_document
from ftload.loaders.verify.files import Context
from ftload.loaders.verify.training import check_training
from safetensors.torch import load_file, save_file

from ..tokenizers import write_llama
from .checkpoints import random_model
from .test_adapters import prepare_from


def _context(directory: Path) -> Context:
    return Context(root=directory, document=read_document(directory), trust_remote_code=False, progress=Silent())


def _prepared(directory: Path, name: str, *flags: str, **changes: Any) -> Path:
    random_model(name, vocab_size=144, **changes).save_pretrained(directory / "source")
    write_llama(directory / "source", vocab_size=128)
    prepare_from(directory / "source", directory / "out", "--lora_experts", "4", *flags)
    return directory / "out"


@pytest.mark.parametrize(
    ("name", "flags", "changes"),
    [
        ("qwen3_moe", ("--use_qlora",), {}),
        # more experts than the few tokens of other models could reach, two a token
        ("qwen3_moe", ("--use_qlora",), {"num_experts": 80, "moe_intermediate_size": 32}),
        ("gpt_oss", ("--use_qlora", "--min_quantized", "0"), {}),
        ("qwen3_moe", ("--use_lora",), {}),
    ],
)
def test_tokens_reach_every_expert(tmp_path: Path, name: str, flags: Any, changes: Any) -> None:
    out = _prepared(tmp_path, name, *flags, **changes)
    context = _context(out)
    assert list(check_training(context)) == []
    trained = len(load_file(out / "adapter" / "adapter_model.safetensors"))
    assert f"{trained} tensors with gradients, experts took tokens in turn, on " in context.found


def test_an_expert_that_does_not_move_is_named(tmp_path: Path) -> None:
    out = _prepared(tmp_path, "qwen3_moe", "--use_qlora")
    path = out / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.experts.3.down.lora_A.weight"
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, path, metadata={"format": "pt"})
    moved = name.replace("lora_A.weight", "lora_B.default.weight")
    assert list(check_training(_context(out))) == [f"`{moved}` did not move in one optimizer step"]
