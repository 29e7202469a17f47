"""`--merge_adapter`: what is written is, tensor by tensor, what PEFT's `merge_and_unload` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.runs import prepare
from tests.formats.fp8_models import Stored, pack
from tests.merge.adapters import logits, merge_by_peft, write_adapter
from tests.parity.compare import assert_same_json, assert_same_tensors, read_tensors
from tests.parity.models import write_model
from tests.tokenizers import write_llama, write_smollm2

SIMPLE = ("--get_tokenizer_fn", "get_tokenizer_simple_v1")
"""No pad token is added, so that no embedding grows."""


def write_base(directory: Path, architecture: str, **options: Any) -> Path:
    if architecture == "gpt_oss":
        return write_gpt_oss(directory)
    write_model(directory, architecture, vocab_size=128, **{"dtype": "bfloat16", **options})
    write_llama(directory)
    return directory


_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def write_gpt_oss(directory: Path) -> Path:
    """Experts that lie (in, out), in one tensor."""
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.to(torch.bfloat16).save_pretrained(directory)
    write_llama(directory)
    return directory


FEATURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}, 4),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}, 14),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
        14,
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}, 4),
    "bias": ("gpt_neox", {"target_modules": ["query_key_value"], "lora_bias": True}, 4),
    "biases of all": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "lora_only"}, 4),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 6),
    "conv1d, not told": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}, 4),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}, 4),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 4),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, 1),
    "modules to save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
        6,
    ),
    "tied, head saved": ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 3),
    "tied, both saved": (
        "llama_tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        3,
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 127]}, 3),
    "tokens of both": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
        4,
    ),
    "tied tokens": ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 127]}, 3),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}, 26),
    "many experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}, 26),
    "some experts": ("olmoe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, 8),
    "a router": ("mixtral", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}, 2),
    "experts, stacked": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}, 6),
}
"""Architecture, PEFT's settings, and how many tensors change."""


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_written_is_what_peft_merges(tmp_path: Path, feature: str) -> None:
    architecture, settings, changed = FEATURES[feature]
    base = write_base(tmp_path / "base", architecture)
    write_adapter(base, tmp_path / "adapter", **{"r": 8, "lora_alpha": 16, **settings})
    merge_by_peft(base, tmp_path / "reference", tmp_path / "adapter")

    report = prepare(base, tmp_path / "output", "--merge_adapter", tmp_path / "adapter", *SIMPLE)

    assert_same_tensors(tmp_path / "output", tmp_path / "reference")
    assert_same_json(tmp_path / "output/config.json", tmp_path / "reference/config.json")
    before = read_tensors(base)
    after = read_tensors(tmp_path / "output")
    different = [name for name, value in after.items() if name not in before or not value.equal(before[name])]
    assert len(different) == changed
    (merged,) = report["source"]["merged"]
    assert merged["tensors"] == changed
    assert (merged["adapter"], merged["base"]) == (str(tmp_path / "adapter"), str(base))


def test_two_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    write_adapter(base, tmp_path / "first", r=8, target_modules=["q_proj", "up_proj"], use_dora=True)
    write_adapter(base, tmp_path / "second", r=4, target_modules=["q_proj", "v_proj"], use_dora=True, seed=2)
    adapters = tmp_path / "first", tmp_path / "second"
    for name, order in {"forth": adapters, "back": adapters[::-1]}.items():
        merge_by_peft(base, tmp_path / f"{name} by peft", *order)
        prepare(base, tmp_path / name, "--merge_adapter", *order, *SIMPLE)
        assert_same_tensors(tmp_path / name, tmp_path / f"{name} by peft")
    forth, back = (read_tensors(tmp_path / name) for name in ("forth", "back"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not forth[name].equal(back[name])


def test_the_base_is_cast_before_it_is_merged(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", dtype="float32", shards=True)
    write_adapter(base, tmp_path / "adapter", r=8, target_modules="all-linear")
    merge_by_peft(base, tmp_path / "reference", tmp_path / "adapter")
    prepare(base, tmp_path / "output", "--merge_adapter", tmp_path / "adapter", *SIMPLE)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")


def test_merged_weights_say_what_the_adapter_says(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", "llama")
    write_adapter(base, tmp_path / "adapter", r=8, lora_alpha=128, target_modules="all-linear")
    prepare(base, tmp_path / "output", "--merge_adapter", tmp_path / "adapter", *SIMPLE)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype=torch.bfloat16))
    assert (merged - adapted).abs().max() < 0.05 * (adapted - before).abs().max()


def grow(rows: int) -> Any:
    return lambda model: model.resize_token_embeddings(rows, mean_resizing=False)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_tokenizer_and_rows_of_the_training_win(tmp_path: Path, architecture: str) -> None:
    base = write_base(tmp_path / "base", architecture)
    adapter = tmp_path / "adapter"
    write_adapter(base, adapter, r=8, target_modules=["q_proj"], change=grow(144))
    write_smollm2(adapter, vocab_size=139)
    merge_by_peft(base, tmp_path / "reference", adapter, change=grow(144))
    report = prepare(base, tmp_path / "output", "--merge_adapter", adapter)
    assert_same_tensors(tmp_path / "output", tmp_path / "reference")
    assert report["embeddings"]["rows_before"] == 144
    assert report["tokenizer"]["size"] == 140
    config = json.loads((tmp_path / "output/config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"]) == (144, 139)
    assert (tmp_path / "output/tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()


def test_one_of_two_tied_embeddings_is_untied(tmp_path: Path) -> None:
    """PEFT adds the head's delta to the embedding too, which is the same tensor to it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", "llama_tied")
    write_adapter(base, tmp_path / "adapter", r=8, target_modules=["lm_head"])
    report = prepare(base, tmp_path / "output", "--merge_adapter", tmp_path / "adapter", *SIMPLE)
    (decision,) = [item for item in report["decisions"] if item["what"] == "tie_word_embeddings"]
    assert (decision["requested"], decision["effective"]) == ("true", "false")
    tensors, before = read_tensors(tmp_path / "output"), read_tensors(base)
    assert tensors["model.embed_tokens.weight"].equal(before["model.embed_tokens.weight"])
    assert not tensors["lm_head.weight"].equal(before["model.embed_tokens.weight"])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before_merge = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype=torch.bfloat16))
    assert (merged - adapted).abs().max() < 0.05 * (adapted - before_merge).abs().max()


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_base_in_fp8_is_decoded_and_merged(tmp_path: Path, architecture: str) -> None:
    """Against an adapter that PEFT merges into what transformers dequantises; experts are stored one by one."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    base, plain, adapter, ours, theirs = (tmp_path / name for name in ("base", "plain", "adapter", "ours", "theirs"))
    write_model(base, architecture, vocab_size=128, dtype="bfloat16")
    write_smollm2(base)
    pack(base, Stored(block=(32, 32)))
    AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).save_pretrained(plain)
    write_adapter(plain, adapter, r=8, target_modules="all-linear")
    merge_by_peft(plain, theirs, adapter)
    report = prepare(base, ours, "--merge_adapter", adapter, *SIMPLE)
    assert_same_tensors(ours, theirs)
    assert {row["format"] for row in report["source"]["stored"]} == {"FP8", None}
    assert report["source"]["merged"][0]["tensors"] == (14 if architecture == "llama" else 34)
