"""Adapters as PEFT trains and saves them, and the same merged by PEFT: the reference, through public calls alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_adapter(
    base: Path, directory: Path, *, seed: int = 1, change: Callable[[Any], None] | None = None, **settings: Any
) -> None:
    """An adapter on `base`, all of whose trainable parameters were moved; `change` is done to the model before."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if change is not None:
        change(model)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    move(adapted)
    adapted.save_pretrained(str(directory))


def move(adapted: Any) -> None:
    """Take a step in a random direction, wide enough to be seen in bfloat16."""
    import torch

    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def merge_by_peft(
    base: Path, output: Path, *adapters: Path, change: Callable[[Any], None] | None = None, dequantize: bool = False
) -> None:
    """Load the base as bfloat16, merge each adapter in turn, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if dequantize:
        decode(model)
    if change is not None:
        change(model)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(output)


def decode(model: Any) -> None:
    """Decode a 4-bit model in place: the layers of a Conv1D become linear ones, (out, in)."""
    import torch
    from bitsandbytes.nn import Linear4bit

    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            # one row: where a block does not end with a row, its kernel for CPUs (0.50) takes another block's absmax
            state: Any = module.weight.quant_state
            shapes[name] = tuple(state.shape)
            state.shape = torch.Size((1, state.shape.numel()))
    model.dequantize()
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight.data.reshape(shape))


def logits(model: Any) -> Any:
    """What a model in evaluation says of a few tokens, in float32."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 17, 33, 65, 3]])).logits.float()
