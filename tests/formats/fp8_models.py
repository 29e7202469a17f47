"""Tiny random checkpoints in FP8, in each of the ways in which such weights are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How the weights of a checkpoint are stored."""

    block: tuple[int, int] | None
    """Of the blocks; None for one scale a tensor."""
    scales: torch.dtype = torch.float32
    """uint8 and float8_e8m0fnu for powers of two."""
    section: dict[str, Any] = field(default_factory=dict)
    """What config.json says beside `quant_method` and `weight_block_size`."""
    method: str = "fp8"
    suffix: str = "weight_scale_inv"
    activation: str | None = None
    """The suffix of static activation scales, where there are some."""
    codes: torch.dtype = E4M3
    """int8 for packed FP4."""
    scale_shape: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda scales: scales)


def quantise(weight: torch.Tensor, stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (a grid) of a weight (…, rows, columns) in float32, the last blocks being smaller."""
    rows, columns = weight.shape[-2:]
    height, width = stored.block or (rows, columns)
    grid = [-(-rows // height), -(-columns // width)]
    padded = torch.zeros(*weight.shape[:-2], grid[0] * height, grid[1] * width)
    padded[..., :rows, :columns] = weight
    largest = padded.unflatten(-1, (grid[1], width)).unflatten(-3, (grid[0], height)).abs().amax(dim=(-1, -3))
    scales = largest.clamp(min=1e-6) / (6 if stored.codes == torch.int8 else torch.finfo(stored.codes).max)
    if stored.scales in (torch.uint8, E8M0):
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = scales.to(torch.float32 if stored.scales == torch.uint8 else stored.scales)
    wide = scales.float().repeat_interleave(height, -2).repeat_interleave(width, -1)[..., :rows, :columns]
    if stored.scales == torch.uint8:
        scales = (torch.log2(scales) + 127).to(torch.uint8)
    ratio = weight / wide
    if stored.codes != torch.int8:
        return ratio.clamp(-torch.finfo(stored.codes).max, torch.finfo(stored.codes).max).to(stored.codes), scales
    nibbles = (ratio.abs()[..., None] - _E2M1).abs().argmin(-1) + 8 * (ratio < 0)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8).view(torch.int8), scales


def pack(directory: Path, stored: Stored, *, only: str | tuple[str, ...] = "proj.weight") -> None:
    """Store the weights whose names end so in FP8, in the same files."""
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(only)]:
            codes, scales = quantise(tensors[name].float(), stored)
            tensors[name] = codes
            stem = name.removesuffix("weight") if name.endswith("weight") else f"{name}_"
            suffix = stored.suffix if name.endswith("weight") else stored.suffix.removeprefix("weight_")
            tensors[stem + suffix] = stored.scale_shape(scales)
            if stored.activation is not None:
                tensors[stem + stored.activation] = torch.tensor(0.5)
        save_file(tensors, path, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text())
        document["weight_map"] = {
            name: path.name for path in sorted(directory.glob("*.safetensors")) for name in load_file(path)
        }
        index.write_text(json.dumps(document))
    size = None if stored.block is None else list(stored.block)
    section = {"quant_method": stored.method, "activation_scheme": "dynamic", "weight_block_size": size}
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {**section, **stored.section}
    (directory / "config.json").write_text(json.dumps(config))
