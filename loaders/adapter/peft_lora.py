"""LoRA (arXiv:2106.09685) as PEFT makes and stores it: tensors, initial values and configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..flags.request import Request
from ..steps.step import Inputs, OutputTensor, Sink, Step, torch_dtype
from ..system.quiet import quiet_bitsandbytes
from .interface import AdaptedLayer, BaseModel
from .targets import FusedTarget, Target, Targets, lora_names

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class InitLora:
    """The fresh adapter of one linear layer, or of the experts in one parameter: A random, B zero, both float32.

    Takes from torch's global generator what PEFT takes when it wraps the layer: two `torch.nn.Linear` are initialised,
    then A once more (peft/tuners/lora/layer.py, `update_layer`). Numbers are drawn one after another: the pieces of a
    matrix, one expert's at a time, are the whole one.
    """

    in_features: int
    out_features: int
    rank: int
    """Of one expert."""
    experts: int
    """In the parameter; 1 for a layer."""
    names: tuple[str, str]
    """Output names of A (experts · rank × in_features) and B (out_features × experts · rank)."""
    rounded_to: str
    """safetensors code: PEFT moves a new adapter to its layer's dtype, and only then casts it to float32."""

    def memory(self, chunk_bytes: int) -> int:
        """A in float32 and rounded, or B: of one expert."""
        return self.rank * max(self.in_features * 12, self.out_features * 4)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Initialise A and write both."""
        import torch

        for width in (self.in_features, self.out_features):
            for _ in range(self.experts):
                _draw(self.rank, width)
        for _ in range(self.experts):
            a = _draw(self.rank, self.in_features)
            sink.write(self.names[0], a.to(torch_dtype(self.rounded_to)).to(torch.float32))
        for _ in range(self.experts):
            sink.write(self.names[1], torch.zeros(self.rank, self.out_features))


def _draw(rows: int, columns: int) -> Tensor:
    """As `torch.nn.Linear` is initialised, whose weight that is: (out, in)."""
    import torch

    return torch.nn.init.kaiming_uniform_(torch.empty(rows, columns), a=sqrt(5))


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftLora:
    """A fresh LoRA adapter: A (rank × in_features) is initialised at random, B (out_features × rank) is zero.

    Where E experts are one parameter, A is (E · rank × in_features) and B (out_features × rank · E): PEFT's own shapes.
    """

    rank: int
    experts_rank: int | None = None
    """Of fused experts; None where they are not trained."""
    alpha: float
    dropout: float

    @classmethod
    def of(cls, request: Request) -> PeftLora:
        """The adapter that is asked for."""
        return cls(
            rank=request.lora_rank,
            experts_rank=request.lora_experts,
            alpha=request.lora_alpha,
            dropout=request.lora_dropout,
        )

    @property
    def changes_base(self) -> bool:
        """False."""
        return False

    @property
    def reads_base(self) -> bool:
        """False."""
        return False

    @property
    def plain(self) -> PeftLora:
        """It is one."""
        return self

    @property
    def chooses(self) -> str | None:
        """None: layers are chosen by names."""
        return None

    def fitted(self, targets: Targets) -> tuple[PeftLora, tuple[Decision, ...]]:
        """Without dropout where a parameter is adapted."""
        return without_dropout(self) if targets.fused else (self, ())

    def adapted(self, targets: Targets, base: Callable[[], BaseModel]) -> tuple[PeftLora, Targets]:
        """As it is: what PEFT makes of it is known."""
        return self, targets

    def tensors(self, layer: Target) -> Mapping[str, tuple[int, ...]]:
        """A and B, in this order."""
        matrices, (a, b) = _matrices(layer), lora_names(layer.name)
        rank = self._rank_of(layer) * matrices.count
        return {a: (rank, matrices.in_features), b: (matrices.out_features, rank)}

    def _rank_of(self, layer: Target) -> int:
        of_expert = isinstance(layer, FusedTarget) or layer.fused
        return self.experts_rank if of_expert and self.experts_rank is not None else self.rank

    def steps(self, layers: Iterable[AdaptedLayer]) -> tuple[Step, ...]:
        """One step a layer; nothing of the base is read."""
        return tuple(self._step(adapted) for adapted in layers)

    def _step(self, adapted: AdaptedLayer) -> Step:
        shapes, matrices = self.tensors(adapted.layer), _matrices(adapted.layer)
        a, b = shapes
        return Step(
            operation=InitLora(
                in_features=matrices.in_features, out_features=matrices.out_features, experts=matrices.count,
                rank=self._rank_of(adapted.layer), names=(a, b), rounded_to=adapted.dtype,
            ),
            in_turn=True,
            outputs=tuple(
                OutputTensor(
                    name=name, shape=shape, dtype="F32", component="adapter", counted_as="float32",
                    parameters=prod(shape),
                )
                for name, shape in shapes.items()
            ),
        )  # fmt: skip

    def _rank_pattern(self, targets: Targets) -> dict[str, int]:
        """PEFT's `rank_pattern`: the ranks that differ from `r`."""
        if self.experts_rank is None or self.experts_rank == self.rank:
            return {}
        return dict.fromkeys(sorted((*targets.of_experts, *targets.parameters)), self.experts_rank)

    def peft_fields(self, targets: Targets) -> dict[str, Any]:
        """The fields of PEFT's `LoraConfig` for these targets."""
        return {
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(targets.patterns),
            "target_parameters": list(targets.parameters) or None,
            "rank_pattern": self._rank_pattern(targets),
        }

    def peft_config(self, targets: Targets) -> LoraConfig:
        """PEFT's `LoraConfig` for a causal language model."""
        with quiet_bitsandbytes():
            from peft import LoraConfig

        return LoraConfig(**self.peft_fields(targets))

    def config(self, targets: Targets, *, base: str, revision: str | None) -> dict[str, Any]:
        """The same as adapter_config.json holds it, without PEFT's defaults."""
        ranks = self._rank_pattern(targets)
        of_experts: dict[str, Any] = {"rank_pattern": ranks} if ranks else {}
        if targets.parameters:
            of_experts["target_parameters"] = sorted(targets.parameters)
        config = {
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
            **of_experts,
        }
        return dict(sorted(config.items()))

    def facts(self) -> dict[str, Any]:
        """Ranks, alpha and dropout, as the report names them."""
        return {
            "r": self.rank,
            "experts_r": self.experts_rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "settings": {},
            "changes_base": False,
        }


def without_dropout(adapter: PeftLora) -> tuple[PeftLora, tuple[Decision, ...]]:
    """The adapter as PEFT can make it of a parameter, to whose input it could not apply dropout."""
    if not adapter.dropout:
        return adapter, ()
    decision = Decision(
        what="lora_dropout",
        requested=f"{adapter.dropout:g}",
        effective="0",
        reason="experts that are not 4-bit are adapted as parameters, and PEFT's `lora.ParamWrapper does not work "
        "with lora_dropout != 0`",
    )
    return replace(adapter, dropout=0.0), (decision,)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrices:
    """The weights of a target: so many of one shape."""

    count: int
    in_features: int
    out_features: int


def _matrices(layer: Target) -> _Matrices:
    if isinstance(layer, FusedTarget):
        fused = layer.experts
        return _Matrices(count=fused.experts, in_features=fused.in_features, out_features=fused.out_features)
    return _Matrices(count=1, in_features=layer.in_features, out_features=layer.out_features)
