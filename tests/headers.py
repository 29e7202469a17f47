"""Checkpoints of any size that take no room: the headers of one file, and a hole where the weights would be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from .tokenizers import write_llama


def write_headers(directory: Path, config_class: str, arguments: dict[str, Any], *, packed: bool = False) -> Path:
    """Headers of a checkpoint of this configuration; `packed` stores experts in MXFP4, as gpt-oss is published."""
    import transformers
    from transformers import AutoModelForCausalLM

    config = getattr(transformers, config_class)(**arguments)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    write_llama(directory, vocab_size=128)
    config.save_pretrained(directory)
    tensors: dict[str, tuple[str, list[int]]] = {}
    for name, value in model.state_dict().items():
        if packed and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, rows, columns = value.shape
            tensors[f"{name}_blocks"] = "U8", [experts, columns, rows // 32, 16]
            tensors[f"{name}_scales"] = "U8", [experts, columns, rows // 32]
        else:
            tensors[name] = "F32" if value.dtype == torch.float32 else "BF16", list(value.shape)
    if packed:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * {"U8": 1, "BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    return directory
