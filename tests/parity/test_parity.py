"""What ftload writes against what the libraries write: names, dtypes, shapes and bytes of every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from safetensors import safe_open

from ..tokenizers import write_llama
from .compare import assert_same_adapter_config, assert_same_json, assert_same_tensors, read_tensors
from .models import ARCHITECTURES, write_model
from .reference import REFERENCE_TARGETS, run_reference

VOCABULARY = 128
"""Of the tokenizer; with the pad token that is added, 129 tokens."""

# what the reference's seven names can't express, and what ftload documents that it uses instead
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "olmoe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

# stored dtype, in shards, and rows of the embedding: 128 must grow to 136, 144 holds all tokens
SOURCES = [("float32", True, 144), ("float16", False, 128), ("bfloat16", True, 128), ("bfloat16", False, 144)]


@pytest.mark.parametrize(("dtype", "shards", "rows"), SOURCES)
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_strategy_equals_the_reference(
    tmp_path: Path, architecture: str, dtype: str, shards: bool, rows: int
) -> None:
    source = tmp_path / "source"
    write_model(source, architecture, vocab_size=rows, dtype=dtype, shards=shards)
    write_llama(source, vocab_size=VOCABULARY)
    assert len(list(source.glob("*.safetensors"))) > 1 if shards else (source / "model.safetensors").exists()
    for strategy, flags in (
        ("standard", []),
        ("lora", ["--use_lora", "--base", "copy"]),
        ("qlora", ["--use_qlora", "--min_quantized", "0"]),
    ):
        report = _prepare(source, tmp_path / strategy, *flags)
        reference = tmp_path / f"reference-{strategy}"
        run_reference(
            source,
            reference,
            strategy=strategy,
            tokenizer_size=VOCABULARY + 1,
            targets=TARGETS.get(architecture, REFERENCE_TARGETS),
        )
        assert report["embeddings"]["rows_after"] == (136 if rows == VOCABULARY else rows)
        assert_same_tensors(tmp_path / strategy, reference)
        for name in ("config.json", "generation_config.json"):
            assert_same_json(tmp_path / strategy / name, reference / name, pad_token_id=VOCABULARY)
        if strategy != "standard":
            assert_same_tensors(tmp_path / strategy / "adapter", reference / "adapter")
            assert_same_adapter_config(tmp_path / strategy / "adapter", reference / "adapter")


def test_a_file_of_fixed_sizes_is_what_the_library_writes_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source, "llama", vocab_size=144, dtype="float32")
    write_llama(source, vocab_size=VOCABULARY)
    _prepare(source, tmp_path / "out")
    run_reference(source, tmp_path / "reference", strategy="standard", tokenizer_size=129)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "reference" / "model.safetensors"
    ).read_bytes()


def test_a_float64_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source, "llama", vocab_size=144, dtype="float64")
    write_llama(source, vocab_size=VOCABULARY)
    _prepare(source, tmp_path / "out", "--use_qlora")
    run_reference(source, tmp_path / "reference", strategy="qlora", tokenizer_size=129)
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")


def test_another_seed_gives_another_adapter(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source, "llama", vocab_size=144, dtype="bfloat16")
    write_llama(source, vocab_size=VOCABULARY)
    _prepare(source, tmp_path / "out", "--use_lora", "--base", "copy", "--seed", "7")
    run_reference(source, tmp_path / "seven", strategy="lora", tokenizer_size=129, seed=7)
    run_reference(source, tmp_path / "eight", strategy="lora", tokenizer_size=129, seed=8)
    assert_same_tensors(tmp_path / "out" / "adapter", tmp_path / "seven" / "adapter")
    with pytest.raises(AssertionError):
        assert_same_tensors(tmp_path / "out" / "adapter", tmp_path / "eight" / "adapter")


def test_shards_of_the_output_hold_the_same_tensors(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source, "llama", vocab_size=144, dtype="bfloat16")
    write_llama(source, vocab_size=VOCABULARY)
    for strategy, flag in (("standard", "--no_use_lora"), ("qlora", "--use_qlora")):
        out = tmp_path / strategy
        _prepare(source, out, flag, "--max_shard_size", "40KB")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in out.glob("model-*.safetensors"))
        assert len(files) > 2
        assert sorted(set(index["weight_map"].values())) == files
        tensors = read_tensors(out)
        assert set(index["weight_map"]) == set(tensors)
        for name, file in index["weight_map"].items():
            with safe_open(out / file, "pt") as opened:
                assert torch.equal(opened.get_tensor(name), tensors[name])
        run_reference(source, tmp_path / f"reference-{strategy}", strategy=strategy, tokenizer_size=129)
        assert_same_tensors(out, tmp_path / f"reference-{strategy}")


def _prepare(source: Path, output: Path, *flags: str) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), "--lora_rank", "8"]
    outcome = prepare(parse_arguments([*words, "--embedding_init", "reference", *flags]), Silent())
    assert outcome is not None
    return to_json(outcome.report)
