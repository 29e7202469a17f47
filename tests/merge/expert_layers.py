"""Experts as linear layers, one an expert, made of a 16-bit model without ftload: adapters of them are tried on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.merge.adapters import move


def fused(model: Any) -> Iterator[tuple[Any, tuple[str, str]]]:
    """The modules of fused experts, with the names of their parameters."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter) and module.down_proj.dim() == 3:
            yield module, ("gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj", "down_proj")


def take_apart(model: Any) -> None:
    """Put layers `0.gate_up`, `0.down`, `1.gate_up` … in the place of fused experts; biases stay."""
    for module, names in fused(model):
        weights = {name: getattr(module, name).detach() for name in names}
        for name in names:
            delattr(module, name)
        for expert in range(len(weights["down_proj"])):
            holder = torch.nn.Module()
            for name, values in weights.items():
                matrix = values[expert].T if module.is_transposed else values[expert]
                layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
                layer.weight = torch.nn.Parameter(matrix.contiguous().clone())
                holder.add_module(name.removesuffix("_proj"), layer)
            module.add_module(str(expert), holder)


def put_together(model: Any) -> None:
    """Undo `take_apart`, with the weights that the layers have now."""
    for module in list(model.modules()):
        if not hasattr(getattr(module, "0", None), "down"):
            continue
        holders = [child for name, child in module.named_children() if name.isdigit()]
        for name in [name for name, _ in holders[0].named_children()]:
            matrices = [getattr(holder, name).weight.detach() for holder in holders]
            stack = torch.stack([matrix.T if module.is_transposed else matrix for matrix in matrices])
            module.register_parameter(f"{name}_proj", torch.nn.Parameter(stack))
        for expert in range(len(holders)):
            delattr(module, str(expert))


def load(base: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **settings)


def write_expert_adapter(base: Path, directory: Path, *, seed: int = 1, **settings: Any) -> None:
    """An adapter of experts on what lies in `base` as 16 bits, all of whose parameters were moved."""
    from peft import LoraConfig, get_peft_model

    model = load(base)
    take_apart(model)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    move(adapted)
    adapted.save_pretrained(str(directory))


def merge_experts_by_peft(base: Path, output: Path, *adapters: Path) -> None:
    """Merge adapters of experts, layer by layer, and save the model as transformers saves it."""
    from peft import PeftModel

    model = load(base)
    take_apart(model)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    put_together(model)
    model.save_pretrained(output)
