"""Tiny mixtures of experts whose experts are 4-bit, made by transformers and bitsandbytes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"
_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_DEEPSEEK = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_GPT_OSS = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "head_dim": 16, "moe_intermediate_size": 256}),
    # an expert is no multiple of 256 blocks, its rows are whole blocks
    "qwen3_moe_64": ("Qwen3MoeConfig", {**_MOE, "head_dim": 16}),
    # down_proj has rows of 48: blocks cross rows, and at 3 x 35 experts and bytes too
    "qwen3_moe_48": ("Qwen3MoeConfig", {**_MOE, "head_dim": 16, "moe_intermediate_size": 48}),
    "qwen3_moe_odd": (
        "Qwen3MoeConfig",
        {**_MOE, "head_dim": 16, "hidden_size": 35, "moe_intermediate_size": 13, "num_experts": 5},
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {**_MOE, "num_key_value_heads": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_MOE, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_DEEPSEEK,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", {**_DEEPSEEK, "head_dim": 16}),
    "granitemoe": ("GraniteMoeConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {**_GPT_OSS, "intermediate_size": 48, "layer_types": None}),
    "gpt_oss_square": ("GptOssConfig", {**_GPT_OSS, "intermediate_size": 64}),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {
            **_MOE,
            "head_dim": 16,
            "shared_expert_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_LLAMA,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "layers_block_type": ["attention", "moe", "mamba", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "head_dim": 16,
        },
    ),
}
"""Name to transformers' configuration class and its arguments."""


def four_bit_config(**settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **settings,
    )


def random_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model in bfloat16, in which no parameter has its initial value: a mix-up could go unseen."""
    import transformers

    config_class, arguments = MODELS[name]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.to(torch.bfloat16)


def fused_names(model: Any) -> list[str]:
    """The fused parameters of its experts."""
    return [
        name
        for name, parameter in model.named_parameters()
        if name.endswith((".experts.gate_up_proj", ".experts.up_proj", ".experts.down_proj")) and parameter.dim() == 3
    ]


def pack_experts(model: Any) -> None:
    """Let bitsandbytes quantise the fused parameters in place."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for name in fused_names(model):
        path, _, leaf = name.rpartition(".")
        replace_parameter_4bit(
            model.get_submodule(path), leaf, compress_statistics=True, quant_type="nf4", blocksize=64
        )


def write_checkpoint(directory: Path, name: str, **changes: Any) -> Path:
    """The model as transformers writes it in 4 bits, with bitsandbytes' state of the experts in their place.

    Beside it, in `DIRECTORY plain`, stands the model in bfloat16.
    """
    import transformers

    plain = directory.with_name(f"{directory.name} plain")
    random_model(name, **changes).save_pretrained(plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=four_bit_config(), device_map={"": "cpu"}
    )
    fused = fused_names(model)
    assert fused
    taken = {}
    for parameter in fused:
        path, _, leaf = parameter.rpartition(".")
        taken[parameter] = model.get_submodule(path)._parameters.pop(leaf)
    model.save_pretrained(directory)
    for parameter, value in taken.items():
        path, _, leaf = parameter.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, value)
    pack_experts(model)
    state = model.state_dict()
    experts = {key: value for key, value in state.items() if key.startswith(tuple(fused)) and "_bias" not in key}
    assert len(experts) == 6 * len(fused)
    stored = load_file(directory / FILE)
    save_file({**stored, **experts}, directory / FILE, metadata={"format": "pt"})
    return directory


def unpacked(directory: Path) -> dict[str, torch.Tensor]:
    """The fused parameters, by name, as bitsandbytes quantises and dequantises those of the model in bfloat16.

    As one row: where rows are no whole blocks, its kernel for CPUs (0.50) multiplies by the absmax of other blocks.
    """
    import transformers
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory.with_name(f"{directory.name} plain"), dtype=torch.bfloat16
    )
    values = {}
    for name in fused_names(model):
        parameter = model.get_parameter(name)
        codes, state = quantize_4bit(parameter.data, blocksize=64, compress_statistics=True, quant_type="nf4")
        state.shape = torch.Size((1, parameter.numel()))
        values[name] = dequantize_4bit(codes, state).reshape(parameter.shape)
    return values


def reference(directory: Path) -> Any:
    """The same model with the experts as bitsandbytes dequantises them, in bfloat16; the rest is 4-bit."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory.with_name(f"{directory.name} plain"),
        dtype=torch.bfloat16,
        quantization_config=four_bit_config(),
        device_map={"": "cpu"},
        experts_implementation="eager",
    )
    for name, value in unpacked(directory).items():
        model.get_parameter(name).data = value
    keep_in_place(model)
    return model


def keep_in_place(model: Any) -> None:
    """Let no 4-bit layer repack its weight: see `load_prepared`."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load(directory: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model, loaded by transformers after the registration, and what it says of the loading."""
    import ftload.register  # noqa: F401
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **settings)
    keep_in_place(model)
    return model, info
