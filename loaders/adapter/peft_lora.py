"""LoRA (arXiv:2106.09685) as PEFT makes and stores it: tensors, initial values and configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from ..flags.request import Request
from ..model.components import LinearLayer
from ..steps.step import Inputs, OutputTensor, Sink, Step, torch_dtype
from .interface import AdaptedLayer
from .targets import Targets

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class InitLora:
    """The fresh adapter of one linear layer: A random, B zero, both float32.

    Takes from torch's global generator what PEFT takes when it wraps the layer: two `torch.nn.Linear` are initialised,
    then A once more (peft/tuners/lora/layer.py, `update_layer`).
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
        """Initialise A and write both."""
        import torch

        a = torch.nn.Linear(self.layer.in_features, self.rank, bias=False)
        b = torch.nn.Linear(self.rank, self.layer.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(a.weight, a=sqrt(5))
        weight = a.weight.detach().to(torch_dtype(self.rounded_to)).to(torch.float32)
        sink.write(self.names[0], weight)
        sink.write(self.names[1], torch.zeros_like(b.weight))


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftLora:
    """A fresh LoRA adapter: A (rank × in_features) is initialised at random, B (out_features × rank) is zero."""

    rank: int
    alpha: float
    dropout: float

    @classmethod
    def of(cls, request: Request) -> PeftLora:
        """The adapter that is asked for."""
        return cls(rank=request.lora_rank, alpha=request.lora_alpha, dropout=request.lora_dropout)

    def tensors(self, layer: LinearLayer) -> Mapping[str, tuple[int, ...]]:
        """A and B, in this order."""
        prefix = f"base_model.model.{layer.name}"
        return {
            f"{prefix}.lora_A.weight": (self.rank, layer.in_features),
            f"{prefix}.lora_B.weight": (layer.out_features, self.rank),
        }

    def steps(self, layers: Iterable[AdaptedLayer]) -> tuple[Step, ...]:
        """One step a layer; nothing of the base is read."""
        return tuple(self._step(adapted) for adapted in layers)

    def _step(self, adapted: AdaptedLayer) -> Step:
        shapes = self.tensors(adapted.layer)
        a, b = shapes
        return Step(
            operation=InitLora(layer=adapted.layer, rank=self.rank, names=(a, b), rounded_to=adapted.dtype),
            outputs=tuple(
                OutputTensor(
                    name=name, shape=shape, dtype="F32", component="adapter", counted_as="float32",
                    parameters=prod(shape),
                )
                for name, shape in shapes.items()
            ),
        )  # fmt: skip

    def peft_config(self, patterns: Iterable[str]) -> LoraConfig:
        """PEFT's `LoraConfig` for a causal language model."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] - any number works
            lora_dropout=self.dropout,
            target_modules=list(patterns),
        )

    def config(self, targets: Targets, *, base: str, revision: str | None) -> dict[str, Any]:
        """The same as adapter_config.json holds it, without PEFT's defaults."""
        return {
            "base_model_name_or_path": base,
            "bias": "none",
            # GPT-2's Conv1D stores (in, out)
            "fan_in_fan_out": any(layer.transposed for layer in targets.layers),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "revision": revision,
            "target_modules": sorted(targets.patterns),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }

    def facts(self) -> dict[str, Any]:
        """Rank, alpha and dropout, as the report names them."""
        return {"r": self.rank, "alpha": self.alpha, "dropout": self.dropout}
