"""How several GPUs divide weights, gradients and optimizer states: ZeRO (arXiv:1910.02054) and FSDP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..report.report import base_in_training, data_bytes
from .step.setting import wide_parameters
from .step.simulation import Moment

if TYPE_CHECKING:
    from ..plan.layout import OutputTensor
    from ..plan.plan import Plan
    from .training_run import TrainingRun


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How several GPUs divide the states of training."""

    method: Literal["fsdp", "zero"]
    gpus: int
    stage: int = 3
    """1 divides optimizer states, 2 gradients too, 3 weights too (arXiv:1910.02054); FSDP is 3."""

    @property
    def is_fsdp(self) -> bool:
        """Whether it is PyTorch's."""
        return self.method == "fsdp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Into how many parts weights, gradients and optimizer states are divided; each GPU holds one part of each."""

    weights: int
    gradients: int
    optimizer: int
    widening: int = 1
    """How many times the bytes of a gradient of the step one is that is held."""

    def divide_gradients(self, moment: Moment, gathered: int) -> Moment:
        """A moment on one GPU; `gathered` are the bytes of weights that it holds whole to work with them."""
        gradients = one_share(self.widening * moment.gradients, self.gradients)
        return replace(moment, gradients=gradients, temporary=moment.temporary + gathered)


def shares_of(run: TrainingRun, *, accumulates: bool) -> Shares:
    """What is divided; `accumulates` says whether an optimizer step follows several backward passes."""
    sharding = run.sharding
    if sharding is None:
        return Shares(weights=1, gradients=1, optimizer=1)
    stage = 3 if sharding.is_fsdp else sharding.stage
    # FSDP keeps whole gradients while it accumulates (`no_sync`, which accelerate enters then)
    whole = sharding.is_fsdp and accumulates
    return Shares(
        weights=sharding.gpus if stage >= 3 else 1,
        gradients=sharding.gpus if stage >= 2 and not whole else 1,
        optimizer=sharding.gpus if stage >= 1 else 1,
        widening=2 if run.upcasts else 1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedBase:
    """The base's weights as `load_prepared` returns them, where FSDP divides all that it can."""

    divided: int
    """Bytes."""
    whole: int
    """Bytes that each GPU holds all the same."""
    codes: Mapping[str, int]
    """Bytes of the quantised weights among those divided, by name."""
    reason: str
    """Why some are whole."""

    @classmethod
    def of(cls, plan: Plan, run: TrainingRun) -> DividedBase:
        """Count it. Statistics of quantised weights are no parameters, so that nothing divides them."""
        quantisation, tensors = plan.strategy.quantisation, tuple(_as_held(plan, run))
        if quantisation is None:
            return cls(divided=data_bytes(tensors), whole=0, codes={}, reason="")
        experts = {one.parameter: one for one in plan.skeleton.experts}
        quantised = [tensor for tensor in tensors if tensor.counted_as == quantisation.tag]
        codes = {
            tensor.name: tensor.nbytes
            for tensor in quantised
            if quantisation.is_divided(tensor, experts.get(tensor.name))
        }
        whole = data_bytes(quantised) - sum(codes.values())
        reason = "statistics of quantised weights are no parameters"
        if quantisation.mixed_precision is None:
            reason = "quantised weights are uint8, and FSDP divides floats alone: see --bnb_4bit_quant_storage"
        return cls(divided=data_bytes(tensors) - whole, whole=whole, codes=codes, reason=reason)


def _as_held(plan: Plan, run: TrainingRun) -> Iterator[OutputTensor]:
    """The base's tensors in the dtypes that they are held in."""
    is_trained, wide = plan.adapter is None, wide_parameters(plan, run)
    is_bfloat16 = run.makes_bfloat16 or run.step.unquantised_dtype == "bfloat16"
    for tensor in base_in_training(plan):
        if tensor.name in wide or (is_trained and run.upcasts and tensor.name not in plan.skeleton.never_trained):
            yield replace(tensor, dtype="F32")
        elif plan.strategy.quantisation is not None and is_bfloat16 and tensor.counted_as == "float32":
            yield replace(tensor, dtype="BF16")
        else:
            yield tensor


def one_share(size: int, shares: int) -> int:
    """Bytes of the largest of so many equal shares."""
    return -(-size // shares)


def with_share(origin: str, shares: int) -> str:
    """The origin of a number that is one of so many shares."""
    return origin if shares == 1 else f"{origin}; a share of 1/{shares}"
