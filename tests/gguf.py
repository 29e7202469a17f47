"""GGUF files as llama.cpp's converter makes them from the tiny models of `parity/models.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

TOKENS = 144
"""More than the 129 that a tokenizer of 128 and its new pad token make."""

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}


def gguf_tensors(model: Path, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint under the names, and in the order of rows, that llama.cpp gives them."""
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], 2)
    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    stored = load_file(model / "model.safetensors")
    for name in sorted(name for name in stored if ".experts." in name):
        experts.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(stored.pop(name))
    stored |= {name: torch.stack(values) for name, values in experts.items()}
    for name, value in stored.items():
        stem, _, kind = name.rpartition(".")
        values = value.to(torch.float32).numpy()
        if architecture == "llama" and stem.endswith((".q_proj", ".k_proj")):
            values = _permuted(values, heads=4 if stem.endswith(".q_proj") else 2)
        known = names.get_name(stem)
        assert known is not None, name
        tensors[f"{known}.{kind}"] = values
    return tensors


def write_gguf(
    path: Path, architecture: str, tensors: Mapping[str, np.ndarray], *, most_tensors: int = 0, **tokens: int
) -> None:
    """Write `tensors` with the metadata of the tiny models; `tokens` are ids of special tokens: `pad=2`.

    With `most_tensors`, they are split into files of so many, as `…-00001-of-00003.gguf`.
    """
    name = gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[architecture]]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=most_tensors)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    if architecture == "qwen3_moe":
        writer.add_key_length(16)
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>"]
    writer.add_token_list([*special, *(f"▁{n}" for n in range(TOKENS - len(special)))])
    writer.add_token_scores([-float(n) for n in range(TOKENS)])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (TOKENS - 3))
    for name, token in {"bos": 1, "eos": 2, **tokens}.items():
        getattr(writer, f"add_{name}_token_id")(token)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(values: np.ndarray, *, heads: int) -> np.ndarray:
    """Rows as llama.cpp's rotary embedding wants them (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
