"""The text of recipes that only configure a trainer: what it says, and what no path or name in it can do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tokenizers
from tests.conftest import Result
from tests.parity.models import write_model

Ftload = Callable[..., Result]
TRAINING = [
    *("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "5", "--learning_rate", "1e-4"),
    *("--lr_scheduler_type", "cosine", "--warmup_ratio", "0.1", "--weight_decay", "0.01", "--clip_grad_norm", "1"),
    *("--num_train_epochs", "4", "--max_train_steps", "7", "--seed", "11", "--max_seq_length", "96"),
    *("--checkpointing_steps", "50", "--keep_last_n_checkpoints", "2", "--logging_steps", "3"),
    *("--sft_messages_key", "turns", "--gradient_checkpointing", "--use_flash_attn", "false"),
]
"""Flags of which none has its default."""


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    directory = tmp_path / "mixture"
    tokenizers.write_smollm2(directory, vocab_size=128)
    write_model(directory, "qwen3_moe", vocab_size=128, dtype="bfloat16")
    return directory


def prepared(ftload: Ftload, llama: Path, output: Path, *flags: str | Path) -> Path:
    result = ftload("prepare", "--model", llama, "--lora_rank", "4", "--output_dir", output, "--quiet", *flags)
    assert result.code == 0, result.err
    return output


def recipe(ftload: Ftload, out: Path, trainer: str, *more: str | Path) -> str:
    result = ftload("recipe", out, "--for", trainer, *more)
    assert result.code == 0, result.err
    return result.out


def llama_factory(text: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What the recipe hands to `llamafactory-cli`, as bash runs it: the YAML, the data's descriptions, all words."""
    folder.mkdir()
    (folder / "recipe.sh").write_text(text)
    command = folder / "llamafactory-cli"
    command.write_text('#!/bin/bash\ncp "${3#dataset_dir=}"/* . && printf "%s\\0" "$@" > words\n')
    command.chmod(0o755)
    variables = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", "recipe.sh", "max_steps=2"], cwd=folder, env=variables, check=True, timeout=60)
    *words, end = (folder / "words").read_text().split("\0")
    assert end == ""
    # what was made for it is gone again
    assert not Path(words[1]).exists()
    keys = yaml.safe_load((folder / "train.yaml").read_text())
    return keys, json.loads((folder / "dataset_info.json").read_text()), words


def test_llama_factory_is_told_each_flag(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = prepared(ftload, llama, tmp_path / "out", "--use_qlora", *TRAINING)
    data = tmp_path / "chats.jsonl"
    data.write_text("{}\n")
    keys, sources, words = llama_factory(recipe(ftload, out, "llamafactory", "--data", data), tmp_path / "run")
    assert keys == {
        "model_name_or_path": str(out),
        "adapter_name_or_path": f"{out}/adapter",
        "finetuning_type": "lora",
        "stage": "sft",
        "do_train": True,
        "bf16": True,
        "flash_attn": "disabled",
        "use_reentrant_gc": False,
        "cutoff_len": 96,
        "output_dir": f"{out}-trained",
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "num_train_epochs": 4,
        "max_steps": 7,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "optim": "paged_adamw_32bit",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "seed": 11,
        "logging_steps": 3,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "dataset": "conversations_0",
    }
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "tool",
    }
    assert sources == {
        "conversations_0": {
            "file_name": str(data),
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": tags,
        }
    }
    assert words[0] == "train"
    assert words[2:] == [f"dataset_dir={Path(words[1]).parent}", "max_steps=2"]


def test_llama_factory_is_told_of_several_data_sets(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    mixture = ["--dataset_mixer_list", "a/b", "1.0", "c/d", "500", "--dataset_mixer_list_splits", "train", "test"]
    out = prepared(ftload, llama, tmp_path / "out", "--use_liger_kernel", "--packing", "true", *mixture)
    text = recipe(ftload, out, "llamafactory")
    keys, sources, _ = llama_factory(text, tmp_path / "run")
    assert keys["dataset"] == "conversations_0,conversations_1"
    first, second = sources.values()
    assert (first["hf_hub_url"], first["split"], "num_samples" in first) == ("a/b", "train", False)
    assert (second["hf_hub_url"], second["split"], second["num_samples"]) == ("c/d", "test", 500)
    # the whole model, in bfloat16 as it was prepared
    assert (keys["finetuning_type"], keys["pure_bf16"], "bf16" in keys) == ("full", True, False)
    assert (keys["enable_liger_kernel"], keys["packing"], keys["neat_packing"]) == (True, True, True)
    assert keys["disable_gradient_checkpointing"] is True
    assert keys["optim"] == "adamw_torch_fused"
    assert "pure_bf16 trains the bfloat16 weights, as Open Instruct does" in text


@pytest.mark.parametrize("name", ["a 'b' $HOME `id`", "one\nEND\ntouch two\n", "#: {x} !!python/name:os.system", "~ é"])
def test_a_path_stays_a_value(ftload: Ftload, llama: Path, tmp_path: Path, name: str) -> None:
    out = prepared(ftload, llama, tmp_path / name / "out", "--use_lora", "--base", "copy", "--sft_messages_key", name)
    data = tmp_path / name / "x.jsonl"
    data.write_text("{}\n")
    text = recipe(ftload, out, "llamafactory", "--data", data)
    keys, sources, _ = llama_factory(text, tmp_path / "run")
    assert (keys["model_name_or_path"], keys["adapter_name_or_path"]) == (str(out), f"{out}/adapter")
    assert keys["output_dir"] == f"{out}-trained"
    assert sources["conversations_0"]["file_name"] == str(data)
    assert sources["conversations_0"]["columns"] == {"messages": name}
    assert not (tmp_path / "run" / "two").exists()


@pytest.mark.parametrize(
    ("name", "flags", "reason", "hint"),
    [
        (
            "out",
            ["--use_lora"],
            "its base is elsewhere, and LLaMA-Factory takes the tokenizer from where the base is",
            "prepare it with --base copy",
        ),
        (
            "a,b",
            [],
            "its path has `,`, at which LLaMA-Factory divides names",
            "move it; `ftload verify --fix` follows",
        ),
        (
            "a${b}",
            [],
            "its path has `${`, which LLaMA-Factory replaces",
            "move it; `ftload verify --fix` follows",
        ),
    ],
)
def test_what_llama_factory_can_not_train_is_refused(
    ftload: Ftload, llama: Path, tmp_path: Path, name: str, flags: list[str], reason: str, hint: str
) -> None:
    out = prepared(ftload, llama, tmp_path / name, *flags)
    result = ftload("recipe", out, "--for", "llamafactory")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: LLaMA-Factory can't train `{out}`: {reason}\nhint: {hint}\n"


@pytest.mark.parametrize(
    ("flags", "reason", "hint"),
    [
        (
            ["--use_qlora"],
            "its experts are 4-bit; ftload.register needs transformers 5.17, and LLaMA-Factory refuses anything above "
            "5.6",
            "prepare it with --quantize_experts false, or take --for trl",
        ),
        (
            ["--use_lora", "--base", "copy", "--lora_experts", "2"],
            "its experts have adapters, which LLaMA-Factory's PEFT 0.18 can't load (size mismatch)",
            "prepare it without --lora_experts, or take --for trl",
        ),
    ],
)
def test_experts_that_llama_factory_can_not_load_are_refused(
    ftload: Ftload, mixture: Path, tmp_path: Path, flags: list[str], reason: str, hint: str
) -> None:
    out = prepared(ftload, mixture, tmp_path / "out", *flags)
    result = ftload("recipe", out, "--for", "llamafactory")
    assert result.code == 2
    assert result.err == f"error: LLaMA-Factory can't train `{out}`: {reason}\nhint: {hint}\n"
