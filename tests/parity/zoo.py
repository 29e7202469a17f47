"""A tiny random checkpoint of every type of model that transformers has.

A configuration is made from its class's own defaults, with small numbers for the keys by which the field calls sizes;
what does not fit together then stands in a table by type.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WIDTH, _HEADS, _HEAD, _INNER, _LAYERS, _EXPERTS = 64, 4, 16, 96, 2, 4

_SIZES_IN_WORDS: tuple[tuple[int, str], ...] = (
    (_WIDTH, """
        hidden_size hidden_size_global d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size
        output_embedding_size word_embed_proj_dim lru_width mamba_d_ssm output_dim vision_output_dim projector_dim
        attention_hidden_size pronunciation_embed_dim shape_embed_dim backbone_hidden_size ple_embed_dim
    """),
    (_HEADS, """
        num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads
        linear_num_value_heads linear_num_key_heads mamba_n_heads mamba_num_heads index_n_heads
    """),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (_HEAD, """
        head_dim swa_head_dim attention_head_dim d_head dim_head v_head_dim qk_nope_head_dim linear_head_dim
        linear_key_head_dim linear_value_head_dim index_head_dim attention_head_size kv_channels
    """),
    (8, """
        hidden_size_per_layer_input qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size d_rel
        gated_norm_rank laurel_rank
    """),
    (24, "qk_head_dim"),
    (32, "q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim adapter_rank loop_gate_rank hc_lowrank"),
    (_INNER, """
        intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim ffn_hidden_size n_inner d_inner dff dim_ff
        feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size shared_intermediate_size
    """),
    (32, """
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size router_hidden_size
    """),
    (_LAYERS, """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers num_blocks depth
    """),
    (_EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "zero_expert_num num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    (1, "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers n_groups mamba_n_groups"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    (256, """
        max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions
        max_target_positions original_max_position_embeddings model_max_length
    """),
    (16, "sliding_window sliding_window_size attention_window_size window_size local_attention index_topk"),
    (8, "chunk_size mamba_chunk_size attention_chunk_size rel_extent"),
    (1, "bos_token_id"),
    (2, "eos_token_id decoder_start_token_id forced_eos_token_id"),
    (0, "pad_token_id"),
    (32, "image_size"),
    (16, "patch_size num_mel_bins"),
)  # fmt: skip
"""What is small in any configuration that has such a key."""

_SIZES = {key: size for size, keys in _SIZES_IN_WORDS for key in keys.split()}

_DORY = ("n_input_layers", "n_recurrent_layers", "n_output_layers")
_DOTS3 = {
    "head_dim": _HEAD,
    "num_key_value_heads": _HEADS,
    "swa_num_attention_heads": _HEADS,
    "swa_num_key_value_heads": _HEADS,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "split_ngram_parts": 2,
    "ngram_vocab_size_base": 100,
}

_VOCABULARIES = (
    "vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "shape_vocab_size", "pronunciation_vocab_size",
    "encoder_hash_byte_group_vocab", "decoder_vocab_size",
)  # fmt: skip

_BY_TYPE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": None,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": _WIDTH, "adapter_out_dim": _WIDTH},
    "dots3_note_vision_encoder": {"adapter_in_dim": _WIDTH, "adapter_out_dim": _WIDTH},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size": _WIDTH,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_attention_heads": _HEADS,
            "num_key_value_heads": 2,
            "head_dim": _HEAD,
            "global_head_dim": _HEAD,
            "intermediate_size": _INNER,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 1, "num_layers_per_stack": 1},
    "inkling2_loop_text": {
        "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    "lfm2": {"num_hidden_layers": 2, "full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_hidden_layers": 2, "layer_types": None, "no_rope_layers": None, "moe_layers": [1]},
    "mamba2": {"num_heads": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"qk_dim_factor": 1.0},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 8], "axial_pos_embds_dim": [32, 32]},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 2 * _WIDTH,
        "attention_head_dim": 2 * _HEAD,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # its own; else loading zeroes that row of the embedding
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beside or instead of that."""


def causal_types() -> list[str]:
    """Every type that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_types() -> list[str]:
    """Those of them that are published as multimodal models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return [name for name in causal_types() if name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]


def tiny_config(model_type: str, *, vocab_size: int) -> PretrainedConfig:
    """A configuration of this type for a model of some hundred thousand parameters, whose tokens are `vocab_size`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**_small(CONFIG_MAPPING[model_type], model_type, vocab_size))


def _small(config_class: type[PretrainedConfig], model_type: str, vocab_size: int) -> dict[str, Any]:
    """Arguments of `config_class`, and in turn of the configurations within it, for small sizes."""
    sizes = _SIZES | dict.fromkeys(_VOCABULARIES, vocab_size)
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in sizes.items() if key in fields}
    if "kv_lora_rank" in fields:  # DeepSeek's attention: only these are rotated, and no heads are shared
        values |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": _HEADS}
    extra = _BY_TYPE.get(model_type, {})
    try:
        defaults = config_class()
    except Exception:  # gemma4_assistant's own defaults are none
        return values | extra
    for key in defaults.sub_configs:
        inner = getattr(defaults, key, None)
        if inner is not None and key not in extra:
            values[key] = _small(type(inner), inner.model_type, vocab_size) | {"model_type": inner.model_type}
    return values | _layers(defaults) | extra


def _layers(defaults: PretrainedConfig) -> dict[str, Any]:
    """Two layers, or one of each kind: what the defaults list layer by layer is cut to as many."""
    whole = getattr(defaults, "num_hidden_layers", None)
    lists = {
        key: value
        for key, value in vars(defaults).items()
        if isinstance(value, list) and len(value) == whole and not key.startswith("_") and key not in _SIZES
    }
    chosen: list[tuple[Any, ...]] = []
    for row in zip(*lists.values(), strict=True):
        if row not in chosen:
            chosen.append(row)
    if not chosen:
        return {}
    if len(chosen) < _LAYERS:
        chosen *= _LAYERS
    return {"num_hidden_layers": len(chosen)} | {key: [row[n] for row in chosen] for n, key in enumerate(lists)}


def write_tiny(directory: Path, model_type: str, *, vocab_size: int, whole: bool = False) -> None:
    """Write a model of this type in float32, all its tensors drawn (std 0.05): norms, biases and buffers too.

    At their initial ones and zeros, a mix-up of tensors could go unseen. The class is the causal one, or with `whole`
    the multimodal one that such a checkpoint is published as.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    torch.manual_seed(0)
    auto_class = AutoModelForMultimodalLM if whole else AutoModelForCausalLM
    model = auto_class.from_config(tiny_config(model_type, vocab_size=vocab_size))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.05)
    model.save_pretrained(directory)
