"""Tiny random multimodal checkpoints as they are published: the whole model, under its own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
_QWEN_TEXT = {**TEXT, **LINEAR_ATTENTION}
_QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5", {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION}),
    "qwen3_5_moe": ("Qwen3_5Moe", {"text_config": {**_QWEN_TEXT, **_EXPERTS}, "vision_config": _QWEN_VISION}),
    "llama4": (
        "Llama4",
        {
            "text_config": {
                **TEXT, "intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 2,
            },
            "vision_config": {
                **_VISION, "intermediate_size": 128, "image_size": 16, "vision_output_dim": 32,
                "projector_input_dim": 32, "projector_output_dim": 32,
            },
        },
    ),
    "mllama": (
        "Mllama",
        {
            "text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": {
                **_VISION, "num_global_layers": 1, "attention_heads": 2, "image_size": 16, "vision_output_dim": 64,
                "intermediate_layers_indices": [0], "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
        },
    ),
    "dots3_note": (
        "Dots3Note",
        {
            "text_config": {
                **TEXT, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
                "v_head_dim": 16, "qk_nope_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32, "shared_experts_intermediate_size": 32, "index_head_dim": 16,
                "index_n_heads": 2, "index_topk": 8,
            },
            "vision_config": {
                **_VISION, "moe_intermediate_size": 16, "num_local_experts": 2, "adapter_in_dim": 32,
                "adapter_out_dim": 64, "mlp_layer_types": ["sparse"],
            },
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 64, "feature_size": 16,
            },
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": TEXT,
            "vision_config": {**_VISION, "model_type": "siglip_vision_model", "image_size": 16},
            "mm_tokens_per_image": 4,
        },
    ),
}  # fmt: skip
"""Model type to the beginning of transformers' class names and the arguments of its configuration."""


def write_published(directory: Path, model_type: str, *, vocab_size: int) -> None:
    """Write a random model in float32; every parameter is drawn, as a mix-up of ones and zeros could go unseen."""
    import torch
    import transformers

    name, arguments = PUBLISHED[model_type]
    text = {**arguments["text_config"], "vocab_size": vocab_size}
    config = getattr(transformers, f"{name}Config")(**{**arguments, "text_config": text})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.to(torch.float32).save_pretrained(directory)
