"""PEFT's own layers in a cut model on `meta`: for every adapter other than the default.

What DoRA, saved modules, token rows or adapted parameters hold in a step is what PEFT's code allocates, so that code
runs. The default adapter, on which most models are trained, has a layer of its own (`meta_linear.py`): importing PEFT
and letting it look through a model takes seconds.

This module imports torch and PEFT: import it where a step is run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from .meta_linear import QuantisedLinear

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from .setting import PeftSetting, Setting


def add_peft_layers(model: PreTrainedModel, stack: Any, chosen: list[int], adapter: PeftSetting) -> None:
    """Let PEFT adapt a cut model, whose decoder layers `stack` are those of the numbers `chosen` in the whole one.

    PEFT chooses layers, and their ranks, by names, so that they stand under their own numbers meanwhile. One that is
    there twice is adapted once, and copied.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**json.loads(adapter.config))
    if any(isinstance(module, QuantisedLinear) for module in model.modules()):
        from peft.tuners.lora.bnb import Linear4bit

        config._register_custom_module({QuantisedLinear: Linear4bit})  # PEFT's documented way to adapt other layers
    _fill(stack, dict(zip(chosen, [*stack.children()], strict=True)))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # those that matter are the plan's
        get_peft_model(model, config, low_cpu_mem_usage=True)
    adapted = dict(zip(dict.fromkeys(chosen), [*stack.children()], strict=True))
    is_again = [number in chosen[:position] for position, number in enumerate(chosen)]
    layers = [
        deepcopy(adapted[number]) if again else adapted[number] for number, again in zip(chosen, is_again, strict=True)
    ]
    _fill(stack, dict(enumerate(layers)))
    if adapter.dtype == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)


def _fill(stack: Any, layers: Mapping[int, nn.Module]) -> None:
    """Let a `nn.ModuleList` hold these, under these numbers."""
    stack._modules.clear()
    for number, layer in layers.items():
        stack.add_module(str(number), layer)


@contextmanager
def autocast_for_peft(setting: Setting) -> Iterator[None]:
    """Answer PEFT's questions about autocast, for tensors on `meta` as for those on the setting's device.

    Its 4-bit layer asks whether CUDA has it; an adapted parameter turns it off, which PyTorch refuses for `meta`.
    """
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def is_autocast_enabled(*device_type: str) -> bool:
        return enabled(*device_type) if device_type else setting.autocast and setting.device == "cuda"

    def without(device_type: str, *args: Any, **kwargs: Any) -> Any:
        is_off = device_type == "meta" and kwargs.get("enabled") is False
        return torch._C.DisableTorchFunction() if is_off else autocast(device_type, *args, **kwargs)

    replaced: dict[str, Callable[..., Any]] = {"is_autocast_enabled": is_autocast_enabled, "autocast": without}
    try:
        for name, function in replaced.items():
            setattr(torch, name, function)
        yield
    finally:
        torch.is_autocast_enabled, torch.autocast = enabled, autocast
