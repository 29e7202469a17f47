"""What nobody could load is refused, with a hint that leads somewhere: 4-bit weights, and embeddings that grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders import load_prepared
from ftload.loaders.errors import CheckpointError, MissingRequirementError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.prepare import prepare
from ftload.loaders.progress import Silent
from ftload.loaders.report.json_values import to_json
from safetensors.torch import load_file, save_file

from ..tokenizers import write_llama
from .compare import assert_same_json, assert_same_tensors
from .multimodal import LINEAR_ATTENTION, TEXT
from .reference import run_reference

_SMALL = {**TEXT, "pad_token_id": 0}
_BLT_PART = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "hrm_text": ("HrmTextConfig", {**_SMALL, "num_key_value_heads": 4}),
    "lara_mini": ("LaraMiniConfig", {**_SMALL, **LINEAR_ATTENTION}),
    "sarvam_moe": (
        "SarvamMoEConfig",
        {**_SMALL, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "inkling2_text": ("Inkling2TextConfig", {**_SMALL, "unpadded_vocab_size": 120, "num_local_experts": 4}),
    "blt": (
        "BltConfig",
        {
            "encoder_hash_byte_group_vocab": 64, "bos_token_id": 1, "eos_token_id": 2,
            "patcher_config": _BLT_PART, "encoder_config": {**_BLT_PART, "hidden_size_global": 64},
            "decoder_config": {**_BLT_PART, "hidden_size_global": 64}, "global_config": _BLT_PART,
        },
    ),
    "marian": (
        "MarianConfig",
        {
            "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "deepseek_v4": (
        "DeepseekV4Config",
        {
            **_SMALL, "moe_intermediate_size": 32, "q_lora_rank": 32, "num_experts_per_tok": 2, "n_routed_experts": 4,
            "layer_types": ["compressed_sparse_attention"] * 2, "mlp_layer_types": ["hash_moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "o_groups": 4, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
            "sliding_window": 16,
        },
    ),
}  # fmt: skip


def _write(directory: Path, model_type: str, *, rows: int) -> Path:
    import transformers

    name, arguments = _CONFIGS[model_type]
    config = getattr(transformers, name)(**arguments, vocab_size=rows)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.save_pretrained(directory)
    write_llama(directory, vocab_size=128)
    return directory


def _prepare(source: Path, output: Path, *flags: str) -> dict[str, Any]:
    words = ["--model", str(source), "--output_dir", str(output), "--lora_rank", "8"]
    outcome = prepare(parse_arguments([*words, "--embedding_init", "reference", *flags]), Silent())
    assert outcome is not None
    return to_json(outcome.report)


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("hrm_text", "model.L_module.layers.0.attn.gqkv_proj.weight"),
        ("lara_mini", "model.layers.0.linear_attn.in_proj.weight"),
        ("sarvam_moe", "model.layers.0.attention.query_key_value.weight"),
    ],
)
def test_merged_linear_layers_are_refused_in_4_bits_alone(tmp_path: Path, model_type: str, tensor: str) -> None:
    source = _write(tmp_path / "source", model_type, rows=128)
    with pytest.raises(MissingRequirementError) as raised:
        _prepare(source, tmp_path / "qlora", "--use_qlora", "--min_quantized", "0")
    assert raised.value.message == (
        f"transformers can't load this model in 4 bits: tensor `{tensor}` is merged or split into linear layers on "
        "loading, which it can't do with 4-bit weights"
    )
    # where the hint leads
    assert raised.value.hint == "train it with --use_lora, on a bfloat16 base"
    for strategy, flags in {"standard": [], "lora": ["--use_lora", "--base", "copy"]}.items():
        _prepare(source, tmp_path / strategy, *flags)
        targets = None
        if strategy == "lora":
            targets = json.loads((tmp_path / "lora/adapter/adapter_config.json").read_text())["target_modules"]
        reference = tmp_path / f"reference-{strategy}"
        run_reference(source, reference, strategy=strategy, tokenizer_size=129, targets=targets)
        assert_same_tensors(tmp_path / strategy, reference)
    assert_same_tensors(tmp_path / "lora/adapter", reference / "adapter")


@pytest.mark.parametrize(
    ("model_type", "class_name", "parameter", "shape", "expected"),
    [
        ("inkling2_text", "Inkling2ForCausalLM", "lm_head.weight", [136, 64], [120, 64]),
        ("blt", "BltForCausalLM", "model.local_encoder.embed_tokens.weight", [136, 64], [128, 64]),
        ("marian", "MarianForCausalLM", "model.decoder.embed_tokens.weight", [136, 64], [128, 64]),
        ("deepseek_v4", "DeepseekV4ForCausalLM", "model.layers.0.mlp.gate.tid2eid", [128, 2], [136, 2]),
    ],
)
def test_embeddings_that_grow_out_of_their_configuration_are_refused(
    tmp_path: Path, model_type: str, class_name: str, parameter: str, shape: list[int], expected: list[int]
) -> None:
    source = _write(tmp_path / "source", model_type, rows=128)
    with pytest.raises(CheckpointError) as raised:
        _prepare(source, tmp_path / "out")
    assert raised.value.message == (
        f"the embeddings have to grow, and nobody could load `{class_name}` after that: `{parameter}` has shape "
        f"{shape}, the configuration then asks for {expected}"
    )
    assert raised.value.hint == (
        "use a tokenizer with no more tokens than the embeddings have rows; an added pad token counts"
    )
    # where the hint leads
    write_llama(source, vocab_size=127)
    _prepare(source, tmp_path / "out")


def test_the_padding_of_a_head_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    source = _write(tmp_path / "source", "inkling2_text", rows=144)
    tensors = load_file(source / "model.safetensors")
    (head,) = [name for name, value in tensors.items() if name.endswith("unembed.weight") and value.shape[0] == 144]
    assert not tensors[head][120:].any()
    tensors[head][120:] = 1.0  # a published checkpoint may hold anything there: it is cut off on loading
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = _prepare(source, tmp_path / "out")
    run_reference(source, tmp_path / "reference", strategy="standard", tokenizer_size=129)
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")
    assert_same_json(tmp_path / "out/config.json", tmp_path / "reference/config.json", pad_token_id=128)
    assert not load_file(tmp_path / "out/model.safetensors")[head][120:].any()
    model, _ = load_prepared(tmp_path / "out")
    assert report["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("parameter", "found"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.self_attn.indexer.weights_proj.weight", True),
        ("model.layers.0.mlp_hyper_connection.block_inject_weight.weight", False),
    ],
)
def test_whether_statistics_are_found_is_transformers_own_answer(parameter: str, found: bool) -> None:
    from ftload.loaders.model.transformers_internals import finds_statistics
    from transformers.core_model_loading import Concatenate, WeightConverter, rename_source_key
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    assert finds_statistics(parameter) is found
    for suffix in ("absmax", "nested_absmax", "quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4"):
        patterns = WeightConverter(Bnb4BitHfQuantizer.serialized_names["weight"], "weight", [Concatenate()])
        assert (rename_source_key(f"{parameter}.{suffix}", [], [patterns])[0] == parameter) is found
