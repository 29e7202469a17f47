"""Tiny random checkpoints of many architectures, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MOE = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama_tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 16}),
    "mistral": ("MistralConfig", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "olmo3": ("Olmo3Config", _LLAMA),
    "phi3": ("Phi3Config", _LLAMA),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "head_dim": 16}),
    "olmoe": ("OlmoeConfig", {**_MOE, "num_key_value_heads": 4}),
}
"""Name to transformers' configuration class and its arguments; the vocabulary's size is the caller's."""


def write_model(
    directory: Path,
    architecture: str,
    *,
    vocab_size: int,
    dtype: str = "float32",
    shards: bool = False,
    seed: int = 0,
) -> None:
    """Write a random model in `dtype`, in one file or in several."""
    import torch
    import transformers

    name, arguments = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**arguments, vocab_size=vocab_size)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # norms and biases too: at their initial ones and zeros, a mix-up of tensors could go unseen
            parameter.normal_(std=0.05)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="100KB" if shards else "50GB")
