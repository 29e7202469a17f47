# ruff: noqa: E501 -- an adapter a line
"""A directory that ftload prepared, with the adapter that was trained in it, becomes one plain model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.runs import FLAGS, prepare
from tests.merge.adapters import merge_by_peft
from tests.merge.test_merge import SIMPLE, write_base
from tests.parity.compare import assert_same_json, assert_same_tensors, read_tensors


def train(adapter: Path, *, seed: int = 3) -> None:
    """Give every tensor of an adapter another value, in its file."""
    generator = torch.Generator().manual_seed(seed)
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name: (value + torch.randn(value.shape, generator=generator) * 0.05).to(value.dtype)
        for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A finished QLoRA run on a Llama whose embeddings have grown for a pad token."""
    base = write_base(tmp_path / "base", "llama")
    prepare(base, tmp_path / "prepared", "--use_qlora")
    train(tmp_path / "prepared/adapter")
    return tmp_path / "prepared"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "llama_tied"])
def test_a_finished_qlora_run_becomes_a_plain_model(tmp_path: Path, architecture: str) -> None:
    base = write_base(tmp_path / "base", architecture)
    output = tmp_path / "prepared"
    # transformers alone loads it: 4-bit experts are in `test_expert_layers_prepared.py`
    prepare(base, output, "--use_qlora", "--min_quantized", "0", "--quantize_experts", "false")
    train(output / "adapter")
    merge_by_peft(output, tmp_path / "reference", output / "adapter", dequantize=True)

    report = prepare_without_model(tmp_path / "output", "--merge_adapter", output / "adapter")

    found, expected = read_tensors(tmp_path / "output"), read_tensors(tmp_path / "reference")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # a Conv1D holds (in, out); transformers' `dequantize` leaves a linear layer in its place
        is_turned = architecture == "gpt2" and ".c_" in name and value.dim() == 2
        assert value.equal(expected[name].T if is_turned else expected[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "output/config.json").read_text())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert report["embeddings"]["resized"] is False
    assert report["source"]["path"] == str(output)
    assert report["source"]["merged"][0]["path"] == str(output / "adapter")
    assert report["tokenizer"]["pad_token_id"] == 128


def tie_copies(adapter: Path) -> None:
    """In training they are one."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True, "use_rslora": True}),
    "dora, Conv1D": ("gpt2", {"use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}, "exclude_modules": ["k_proj"]}),
    "pissa": ("llama", {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 4}}),
    "pissa, Conv1D": ("gpt2", {"init_lora_weights": "pissa_niter_4"}),
    "olora": ("llama_tied", {"init_lora_weights": "olora", "use_rslora": True}),
    "modules": ("llama", {"modules_to_save": ["lm_head", "model.norm"]}),
    "tied copies": ("llama_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "one of two that were tied": ("llama_tied", {"modules_to_save": ["lm_head"]}),
    "rows": ("llama", {"trainable_token_indices": [3, 128]}),
    "rows of both": ("llama_tied", {"trainable_token_indices": [3, 128]}),
    "biases": ("gpt2", {"bias": "all", "lora_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["--use_lora", "--use_qlora"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_run_of_another_adapter_becomes_a_plain_model(tmp_path: Path, variant: str, strategy: str) -> None:
    architecture, settings = VARIANTS[variant]
    base, output = write_base(tmp_path / "base", architecture), tmp_path / "prepared"
    (tmp_path / "lora.json").write_text(json.dumps(settings))
    prepare(base, output, strategy, "--min_quantized", "0", "--lora_config", tmp_path / "lora.json")
    train(output / "adapter")
    if "ensure_weight_tying" in settings:
        tie_copies(output / "adapter")
    merge_by_peft(output, tmp_path / "reference", output / "adapter", dequantize=strategy == "--use_qlora")

    prepare_without_model(tmp_path / "output", "--merge_adapter", output / "adapter")

    found, expected = read_tensors(tmp_path / "output"), read_tensors(tmp_path / "reference")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        is_turned = architecture == "gpt2" and strategy == "--use_qlora" and ".c_" in name and value.dim() == 2
        if is_turned and "use_dora" in settings:
            # lengths are summed along rows of what was decoded, along columns of a Conv1D: the last bit of a few differs
            torch.testing.assert_close(value, expected[name].T, rtol=2**-7, atol=0)
        else:
            assert value.equal(expected[name].T if is_turned else expected[name]), name


def prepare_without_model(output: Path, *flags: str | Path) -> dict[str, Any]:
    """Run `ftload prepare` without --model."""
    import contextlib
    import io

    from ftload.cli.app import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run(["prepare", *map(str, (*flags, "--output_dir", output)), "--json"])
    assert code == 0, out.getvalue()
    return json.loads(out.getvalue())


def test_the_prepared_directory_may_have_been_moved(tmp_path: Path, prepared: Path) -> None:
    prepare_without_model(tmp_path / "before", "--merge_adapter", prepared / "adapter")
    moved = tmp_path / "moved"
    shutil.move(prepared, moved)
    for name, given in {"directory": moved, "adapter": moved / "adapter"}.items():
        report = prepare_without_model(tmp_path / name, "--merge_adapter", given)
        assert_same_tensors(tmp_path / name, tmp_path / "before")
        assert report["source"]["path"] == str(moved)
        assert {item["what"] for item in report["decisions"]} == {"attention"}


def test_a_trainers_checkpoint_names_its_base(tmp_path: Path, prepared: Path) -> None:
    """It has the tokenizer beside it, and names the directory that it was trained in."""
    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(prepared / "adapter", checkpoint)
    for file in prepared.glob("*token*"):
        shutil.copy(file, checkpoint)
    report = prepare_without_model(tmp_path / "output", "--merge_adapter", checkpoint)
    prepare_without_model(tmp_path / "same", "--merge_adapter", prepared)
    assert_same_tensors(tmp_path / "output", tmp_path / "same")
    assert report["source"]["path"] == str(prepared)


@pytest.mark.parametrize("strategy", FLAGS)
def test_a_merged_model_goes_through_every_strategy(tmp_path: Path, prepared: Path, strategy: str) -> None:
    """As if the merged model had been written first."""
    prepare_without_model(tmp_path / "merged", "--merge_adapter", prepared)
    flags = [*FLAGS[strategy], "--base", "copy", "--lora_rank", "8"]
    prepare_without_model(tmp_path / "at once", "--merge_adapter", prepared, *flags)
    prepare(tmp_path / "merged", tmp_path / "in two", *flags)
    assert_same_tensors(tmp_path / "at once", tmp_path / "in two")
    for file in ("config.json", "generation_config.json"):
        assert_same_json(tmp_path / "at once" / file, tmp_path / "in two" / file)
    if strategy in ("lora", "qlora"):
        assert_same_tensors(tmp_path / "at once/adapter", tmp_path / "in two/adapter")


def test_an_adapter_that_refers_to_its_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    prepare(base, tmp_path / "prepared", "--use_lora", *SIMPLE)
    assert not list((tmp_path / "prepared").glob("*.safetensors"))
    train(tmp_path / "prepared/adapter")
    merge_by_peft(base, tmp_path / "reference", tmp_path / "prepared/adapter")
    report = prepare_without_model(tmp_path / "output", "--merge_adapter", tmp_path / "prepared", *SIMPLE)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")
    assert report["source"]["path"] == str(base)
