"""LoRA (arXiv:2106.09685) as PEFT stores it: tensors, initial values and configuration."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from ..model.components import LinearLayer
from ..steps.step import Inputs, OutputTensor, Sink, Step, torch_dtype
from .targets import Targets

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, eq=False)
class InitLora:
    """The fresh adapter of one linear layer: A drawn, B zero, both float32.

    Draws from torch's global generator exactly as PEFT does when it wraps the layer: two `torch.nn.Linear` are made and
    then A is drawn again (peft/tuners/lora/layer.py, `update_layer`).
    """

    layer: LinearLayer
    rank: int
    names: tuple[str, str]
    """Output names of A (rank × in_features) and B (out_features × rank)."""
    rounded_to: str
    """safetensors code: PEFT moves a new adapter to its layer's dtype, and only then casts it to float32."""

    def memory(self, chunk_bytes: int) -> int:
        """A in float32 and rounded, and B twice."""
        return self.rank * (self.layer.in_features * 12 + self.layer.out_features * 8)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Draw A and write both."""
        import torch

        a = torch.nn.Linear(self.layer.in_features, self.rank, bias=False)
        b = torch.nn.Linear(self.rank, self.layer.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(a.weight, a=sqrt(5))
        weight = a.weight.detach().to(torch_dtype(self.rounded_to)).to(torch.float32)
        sink.write(self.names[0], weight)
        sink.write(self.names[1], torch.zeros_like(b.weight))


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
