"""Tiny GGUF files of every architecture that transformers reads, with random blocks of every type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN = 256
"""The elements of the largest block: a row may be of any type."""
BLOCK_TYPES = tuple(kind for kind in Type if kind in gguf.quants._type_traits and kind is not Type.BF16)
"""Every type that `gguf` decodes and whose blocks are no plain numbers."""


def random_blocks(rng: np.random.Generator, kind: Type, shape: Sequence[int]) -> np.ndarray:
    """Rows of random blocks, all of whose values are finite and small: bytes, the last dimension being a row's."""
    if kind in (Type.F32, Type.F16, Type.BF16):
        values = rng.normal(scale=0.05, size=shape).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // elements, size), dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(blocks, kind)
        bad = ~(np.abs(values) < 8).all(axis=1)
        if not bad.any():
            return blocks.reshape(*shape[:-1], shape[-1] // elements * size)
        blocks[bad] = rng.integers(0, 256, (int(bad.sum()), size), dtype=np.uint8)


_DENSE = {
    "context_length": 64,
    "block_count": 2,
    "embedding_length": HIDDEN,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}
_LAYER_NORM = {**_DENSE, "attention.layer_norm_epsilon": 1e-5}
_EXPERTS = {"expert_count": 4, "expert_used_count": 2}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """An architecture as llama.cpp calls it, and what a file of it says."""

    architecture: str
    metadata: Mapping[str, Any] = field(default_factory=lambda: _DENSE)
    stored: Callable[[str, tuple[int, ...]], Shapes] = lambda name, shape: {name: shape}
    """The tensors and shapes that one tensor of the model is stored as."""
    hints: tuple[str, ...] = ()
    """Tensors whose presence tells of the configuration."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Ends of parameters' names that the package does not know, and of the tensors that llama.cpp makes of them."""
    pad: int | None = None
    always_tied: bool = False


def _experts(name: str, shape: tuple[int, ...]) -> Shapes:
    """Gate and up apart, without what a dimension of one adds."""
    if "gate_up_exps" in name:
        count, rows, columns = shape
        halves = (count, rows // 2, columns)
        return {name.replace("gate_up", part): halves for part in ("gate", "up")}
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return {name: shape[1:]}
    return {name: shape}


def _transposed(name: str, shape: tuple[int, ...]) -> Shapes:
    parts = ("attn_qkv.weight", "ffn_up.weight", "ffn_down.weight", "attn_output.weight")
    return {name: shape[::-1] if name.endswith(parts) else shape}


def _squeezed(name: str, shape: tuple[int, ...]) -> Shapes:
    """Convolutions without their dimension of one."""
    return {name: (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape}


def _qwen35(name: str, shape: tuple[int, ...]) -> Shapes:
    return {n: s for part, size in _experts(name, shape).items() for n, s in _squeezed(part, size).items()}


_LINEAR = {
    "attention.key_length": 64,
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 64,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 256,
    "rope.dimension_count": 16,
    "rope.dimension_sections": [2, 3, 3, 0],
}
_SSM = {"linear_attn.dt_bias": "ssm_dt.bias", "linear_attn.A_log": "ssm_a"}

TINY = {
    "llama": Tiny(architecture="llama"),
    "qwen2": Tiny(architecture="qwen2"),
    "qwen3": Tiny(architecture="qwen3"),
    "qwen2_moe": Tiny(architecture="qwen2moe", metadata={**_DENSE, **_EXPERTS}, stored=_experts),
    "qwen3_moe": Tiny(
        architecture="qwen3moe", metadata={**_DENSE, **_EXPERTS, "attention.key_length": 64}, stored=_experts
    ),
    "falcon": Tiny(architecture="falcon", metadata=_LAYER_NORM),
    "phi3": Tiny(architecture="phi3", pad=0),
    "bloom": Tiny(architecture="bloom", metadata=_LAYER_NORM),
    "stablelm": Tiny(architecture="stablelm", metadata=_LAYER_NORM, hints=("blk.0.ffn_norm.weight",)),
    "gpt2": Tiny(architecture="gpt2", metadata=_LAYER_NORM, stored=_transposed),
    "starcoder2": Tiny(architecture="starcoder2", metadata=_LAYER_NORM),
    "mamba": Tiny(
        architecture="mamba",
        metadata={
            **_DENSE, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 16, "ssm.inner_size": 512
        },
        stored=_squeezed,
    ),
    "nemotron": Tiny(architecture="nemotron"),
    "gemma2": Tiny(architecture="gemma2", metadata={**_DENSE, "attention.key_length": 64}, always_tied=True),
    "gemma3": Tiny(architecture="gemma3", metadata={**_DENSE, "attention.key_length": 64}),
    "gemma4": Tiny(architecture="gemma4", metadata={**_DENSE, "attention.key_length": 64}),
    "minimax_m2": Tiny(
        architecture="minimax-m2",
        metadata={**_DENSE, **_EXPERTS, "attention.key_length": 64, "rope.dimension_count": 32}, stored=_experts,
        names={"mlp.e_score_correction_bias": "exp_probs_b.bias"},
    ),
    "lfm2": Tiny(
        architecture="lfm2", metadata={**_DENSE, "attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
        stored=_squeezed,
    ),
    "qwen35": Tiny(architecture="qwen35", metadata={**_DENSE, **_LINEAR}, stored=_qwen35, names=_SSM),
    "qwen35moe": Tiny(
        architecture="qwen35moe",
        metadata={
            **_DENSE, **_LINEAR, **_EXPERTS, "expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 256
        },
        stored=_qwen35, names=_SSM,
    ),
}  # fmt: skip


Tensors = dict[str, tuple[Type, np.ndarray]]


def write_tiny(
    path: Path,
    name: str,
    *,
    tokens: int,
    tied: bool = False,
    types: Sequence[Type] = BLOCK_TYPES,
    seed: int = 0,
    spoil: Callable[[dict[str, Any], Tensors], object] = lambda metadata, tensors: None,
) -> None:
    """Write a file whose matrices have one type after another of `types`; vectors are float32.

    `spoil` may change what the metadata say of the architecture, and the tensors.
    """
    tiny = TINY[name]
    tied = tied or tiny.always_tied
    hints = [*tiny.hints, "token_embd.weight", *([] if tied else ["output.weight"])]
    _write(path, tiny, {hint: (Type.F32, np.zeros((1, 1), np.float32)) for hint in hints}, tokens)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    known = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == tiny.architecture]
    names = gguf.get_tensor_name_map(known[0], config.num_hidden_layers)
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    skipped = {"lm_head.weight"} if tied else set()
    for parameter, value in model.state_dict().items():
        if parameter in skipped:
            continue
        stored = tiny.stored(_stored_name(tiny, parameter, names), tuple(value.shape))
        kind = len(tensors)  # of all that becomes one parameter: transformers decodes experts of several types wrongly
        tensors |= {key: _random(rng, key, shape, types, kind) for key, shape in stored.items()}
    metadata = dict(tiny.metadata)
    spoil(metadata, tensors)
    _write(path, replace(tiny, metadata=metadata), tensors, tokens)


def _random(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], types: Sequence[Type], number: int
) -> tuple[Type, np.ndarray]:
    if name.endswith("ssm_a"):
        return Type.F32, -rng.uniform(0.5, 2, shape).astype(np.float32)
    fitting = [kind for kind in types if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0]
    kind = fitting[number % len(fitting)] if len(shape) > 1 and fitting and "conv" not in name else Type.F32
    return kind, random_blocks(rng, kind, shape)


def _stored_name(tiny: Tiny, parameter: str, names: Any) -> str:
    for end, stored in tiny.names.items():
        if parameter.endswith(end):
            return f"blk.{parameter.split('.')[2]}.{stored}"
    for stem, suffix in ((parameter.rpartition(".")[0], "." + parameter.rpartition(".")[2]), (parameter, "")):
        rest = stem
        while rest:
            known = names.get_name(rest)
            if known is not None:
                return known + (suffix or (".weight" if "_exps" in known else ""))
            rest = rest.partition(".")[2]
    if parameter.endswith(".experts.gate_up_proj"):
        return f"blk.{parameter.split('.')[2]}.ffn_gate_up_exps.weight"
    raise LookupError(parameter)


def _write(path: Path, tiny: Tiny, tensors: Mapping[str, tuple[Type, np.ndarray]], tokens: int) -> None:
    writer = gguf.GGUFWriter(path, tiny.architecture)
    for key, value in {**tiny.metadata, "vocab_size": tokens}.items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ]
        add(f"{tiny.architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}" for number in range(tokens)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if tiny.pad is not None:
        writer.add_pad_token_id(tiny.pad)
    for name, (kind, values) in tensors.items():
        if kind is Type.F32:
            writer.add_tensor(name, np.ascontiguousarray(values.view(np.float32)))
        else:
            writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
