"""Checkpoints that the package `compressed-tensors` quantised: scales from the extremes, then its own compressors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
IGNORED = ["lm_head", "re:.*embed_tokens", "re:.*norm", "re:.*\\.gate$"]


def scheme(form: str, *, targets: tuple[str, ...] = ("Linear",), **weights: Any) -> QuantizationScheme:
    """A group of config.json."""
    return QuantizationScheme(targets=list(targets), weights=QuantizationArgs(**weights), format=form)


def compress(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """What a module's weight is stored as, by the last part of the names."""
    args = scheme.weights
    assert args is not None
    assert scheme.format is not None
    scale, zero_point = calculate_qparams(*_extremes(weight, args), args)
    assert args.zp_dtype is not None
    state = {
        "weight": weight,
        "weight_scale": scale.to(weight.dtype),
        "weight_zero_point": zero_point.to(args.zp_dtype),
    }
    return BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)


def decompress(state: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The weight again, in the scale's dtype."""
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(dict(state), scheme)["weight"]


def _extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "group":
        parts, dims = weight.unflatten(-1, (-1, args.group_size or 0)), (-1,)
    elif args.strategy == "block":
        height, width = args.block_structure or (0, 0)
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        parts, dims = padded.unflatten(-1, (-1, width)).unflatten(0, (-1, height)), (1, 3)
    else:
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return parts.amin(dims), parts.amax(dims)


def compress_checkpoint(
    directory: Path,
    groups: Mapping[str, QuantizationScheme],
    *,
    shards: int = 1,
    ignored: Sequence[str] = IGNORED,
) -> None:
    """Quantise every linear layer of the checkpoint in `directory` by the first group that means it.

    Without pattern, a group means all. Tensors of one module may come into different shards.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        group = None if any(match_name(module, name) for name in ignored) else _group_of(module, groups)
        if part != "weight" or tensor.dim() != 2 or group is None:
            stored[name] = tensor
            continue
        stored |= {f"{module}.{key}": value.contiguous() for key, value in compress(tensor, group).items()}
    files = [FILE] if shards == 1 else [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    names = sorted(stored)
    weight_map = {name: files[n % shards] for n, name in enumerate(names)}
    for file in files:
        chosen = {name: stored[name] for name in names if weight_map[name] == file}
        save_file(chosen, directory / file, metadata={"format": "pt"})
    if shards > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    set_config(directory, groups)


def set_config(directory: Path, groups: Mapping[str, QuantizationScheme]) -> None:
    """Write config.json's `quantization_config` as the package dumps it."""
    forms = {group.format for group in groups.values()}
    config = QuantizationConfig(
        config_groups=dict(groups),
        format=forms.pop() if len(forms) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=IGNORED,
    )
    path = directory / "config.json"
    section = json.loads(config.model_dump_json())
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))


def _group_of(module: str, groups: Mapping[str, QuantizationScheme]) -> QuantizationScheme | None:
    for group in groups.values():
        if any(match_name(module, target) for target in group.targets):
            return group
    return next((group for group in groups.values() if "Linear" in group.targets), None)
