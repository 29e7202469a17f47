"""The QLoRA strategy (arXiv:2305.14314): a base in 4-bit NF4 with double quantisation, and a LoRA adapter on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from .checkpoint.formats.nf4 import STATE_SUFFIX
from .checkpoint.tensors import TORCH_NAMES
from .errors import MissingRequirementError
from .lora import Lora
from .model.tensor_map import ModelTensor
from .nf4.encode import stored_shapes
from .nf4.quantise import Quantize
from .steps.plain import All, Cast, plain_step
from .steps.step import OutputTensor, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Qlora(Lora):
    """Training of an adapter on a 4-bit base."""

    name: str = "qlora"
    packages: tuple[str, ...] = ("peft", "bitsandbytes")

    def step(self, tensors: tuple[ModelTensor, ...]) -> Step:
        """Quantise the weights of linear layers, pass through what is 4-bit already, treat the rest as standard.

        Raises `MissingRequirementError` where transformers could not load what would be written.
        """
        tensor = tensors[0]
        if tensor.four_bit_problem is not None:
            raise MissingRequirementError(
                f"transformers can't load this model in 4 bits: tensor `{tensor.name}` {tensor.four_bit_problem}",
                hint="train it with --use_lora, on a bfloat16 base",
            )
        if tensor.packed is not None:
            return _pass_through(tensor)
        if tensor.linear is None:
            return plain_step(tensors)
        transposed = tensor.linear.transposed
        shape = tensor.shape[::-1] if transposed else tensor.shape
        return Step(
            operation=Quantize(
                source=tensor.sources[0], name=tensor.name, transposed=transposed, dtype=tensor.quantised_from
            ),
            outputs=tuple(
                _part(tensor, tensor.name + suffix, stored, dtype)
                for suffix, (stored, dtype) in stored_shapes(shape, TORCH_NAMES[tensor.quantised_from]).items()
            ),
        )

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of the base: transformers' `BitsAndBytesConfig` as the reference builds it."""
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ).to_dict()

    def training_dtype(self, counted_as: str) -> str:
        """K-bit preparation turns everything that is 16-bit into float32."""
        return "float32" if counted_as in ("bfloat16", "float16") else counted_as


def _part(tensor: ModelTensor, name: str, shape: tuple[int, ...], dtype: str) -> OutputTensor:
    return OutputTensor(
        name=name,
        shape=shape,
        dtype=dtype,
        component=tensor.component,
        counted_as="nf4",
        parameters=prod(tensor.shape) if name == tensor.name else 0,
        variable=name.endswith(STATE_SUFFIX),
    )


def _pass_through(tensor: ModelTensor) -> Step:
    assert tensor.packed is not None
    weight = tensor.packed.name
    names = [tensor.name + part.name.removeprefix(weight) for part in tensor.packed.parts]
    copies = tuple(
        Cast(source=part, name=name, dtype=part.dtype, codes=part.name == weight)
        for part, name in zip(tensor.packed.parts, names, strict=True)
    )
    return Step(
        operation=All(operations=copies),
        outputs=tuple(
            replace(_part(tensor, name, part.shape, part.dtype), variable=False)
            for part, name in zip(tensor.packed.parts, names, strict=True)
        ),
    )
