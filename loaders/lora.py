"""The LoRA strategy: the standard base, frozen, and a fresh low-rank adapter (arXiv:2106.09685) in float32.

Tensor names and adapter_config.json are PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .catalog import LinearLayer, Targets
from .operations import InitLora, OutputTensor, Step
from .standard import Standard


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora(Standard):
    """Training of an adapter on a bfloat16 base."""

    name: str = "lora"
    has_adapter: bool = True
    packages: tuple[str, ...] = ("peft",)


def adapter_steps(targets: Targets, *, rank: int, dtypes: dict[str, str]) -> tuple[Step, ...]:
    """One step a layer, in the order in which PEFT draws them.

    `dtypes` maps a layer's name to the safetensors code of the dtype that PEFT finds it to have.
    """
    return tuple(_adapter_step(layer, rank, dtypes[layer.name]) for layer in targets.layers)


def _adapter_step(layer: LinearLayer, rank: int, dtype: str) -> Step:
    prefix = f"base_model.model.{layer.name}"
    shapes = {
        f"{prefix}.lora_A.weight": (rank, layer.in_features),
        f"{prefix}.lora_B.weight": (layer.out_features, rank),
    }
    a, b = shapes
    return Step(
        operation=InitLora(layer=layer, rank=rank, names=(a, b), rounded_to=dtype),
        outputs=tuple(
            OutputTensor(
                name=name, shape=shape, dtype="F32", component="adapter", counted_as="float32",
                parameters=shape[0] * shape[1],
            )
            for name, shape in shapes.items()
        ),
    )  # fmt: skip


def adapter_config(
    targets: Targets, *, rank: int, alpha: float, dropout: float, base: str, revision: str | None
) -> dict[str, Any]:
    """The contents of adapter_config.json: PEFT's `LoraConfig` for a causal language model, without its defaults."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        # GPT-2's Conv1D stores (in, out)
        "fan_in_fan_out": any(layer.transposed for layer in targets.layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": revision,
        "target_modules": sorted(targets.patterns),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
