"""How a model is trained, as far as its memory depends on it beside the plan and Open Instruct's flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from ..trainers.interface import TrainingStep
from ..trainers.registry import TRAINERS
from .sharding import Sharding

if TYPE_CHECKING:
    from ..flags.declared import PlanOptions

MixedPrecision = Literal["no", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """Beside the plan and Open Instruct's flags."""

    trainer: str = "open-instruct"
    """By the name that `ftload recipe --for` takes."""
    mixed_precision: MixedPrecision = "bf16"
    """accelerate's flag of this name: `bf16` runs the forward pass under autocast."""
    sharding: Sharding | None = None
    """None: one GPU holds all."""

    @property
    def upcasts(self) -> bool:
        """Whether what is trained is held in float32: accelerate has it so where FSDP has mixed precision."""
        return self.mixed_precision == "bf16" and self.sharding is not None and self.sharding.is_fsdp

    @property
    def makes_bfloat16(self) -> bool:
        """Whether what is not quantised, adapters included, is made bfloat16: DeepSpeed does under mixed precision."""
        return self.mixed_precision == "bf16" and self.sharding is not None and not self.sharding.is_fsdp

    def has_autocast(self, *, trains_all: bool) -> bool:
        """Whether the forward pass is under autocast; FSDP2 and DeepSpeed compute in bfloat16 without it."""
        wanted = self.step.autocast == "always" or (self.step.autocast == "adapters" and not trains_all)
        return self.mixed_precision == "bf16" and self.sharding is None and wanted

    @property
    def step(self) -> TrainingStep:
        """How the trainer runs one step."""
        return TRAINERS[self.trainer].step


def training_run(options: PlanOptions) -> TrainingRun:
    """What the flags of `ftload plan` say of it."""
    sharding = None
    if options.fsdp is not None:
        sharding = Sharding(method="fsdp", gpus=options.fsdp)
    elif options.zero is not None:
        sharding = Sharding(method="zero", gpus=options.gpus, stage=options.zero)
    return TrainingRun(
        trainer=options.for_, mixed_precision=cast("MixedPrecision", options.mixed_precision), sharding=sharding
    )
