"""What is trained, tensor by tensor, in the dtypes in which it is held; and what an adapter holds beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .step.setting import wide_parameters

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..steps.step import OutputTensor
    from .training_run import TrainingRun

Kind = Literal["A and B", "DoRA's magnitudes", "saved modules", "token rows", "biases", "weights"]
_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensor:
    """A tensor that is trained."""

    kind: Kind
    elements: int
    width: int
    """Bytes of an element, as it is held."""

    @property
    def nbytes(self) -> int:
        """Bytes of it, and of its gradient."""
        return self.elements * self.width


def trained_tensors(plan: Plan, run: TrainingRun) -> list[TrainedTensor]:
    """All of them; what is tied to another is no tensor of its own.

    Copies of the base have the dtype in which that is held, the rest of an adapter the trainer's.
    """
    if plan.adapter is not None:
        return [_of_adapter(plan, run, tensor) for tensor in plan.adapter_tensors() if tensor.parameters]
    wide = wide_parameters(plan, run)
    return [
        TrainedTensor(
            kind="weights",
            elements=value.numel(),
            width=4 if run.upcasts or name in wide else value.element_size(),
        )
        for name, value in plan.skeleton.model.named_parameters()
        if name not in plan.skeleton.never_trained
    ]


def _of_adapter(plan: Plan, run: TrainingRun, tensor: OutputTensor) -> TrainedTensor:
    kind = _kind_of(tensor)
    own = 2 if run.step.adapter_dtype == "bfloat16" else 4
    copies = _width_of_copies(run, stored=tensor.dtype, quantised=plan.quantization_config is not None)
    width = copies if kind in ("saved modules", "biases") else own
    return TrainedTensor(
        kind=kind, elements=tensor.parameters, width=4 if run.upcasts else 2 if run.makes_bfloat16 else width
    )


def _width_of_copies(run: TrainingRun, *, stored: str, quantised: bool) -> int:
    """As the base itself is held, which was stored as it is after k-bit preparation."""
    return 2 if stored in ("BF16", "F16") or (quantised and run.step.unquantised_dtype == "bfloat16") else 4


def _kind_of(tensor: OutputTensor) -> Kind:
    if tensor.name.endswith(_ROWS):
        return "token rows"
    if ".lora_magnitude_vector" in tensor.name:
        return "DoRA's magnitudes"
    if ".lora_" in tensor.name:
        return "A and B"
    return "biases" if tensor.shared else "saved modules"


def beside_base(plan: Plan, run: TrainingRun) -> Mapping[str, int]:
    """Bytes that an adapter adds to the base's, by what they are; biases of the base are there in any case.

    Of rows that are trained PEFT keeps the originals, in the same dtype.
    """
    if plan.adapter is None:
        return {}
    found: Counter[str] = Counter()
    for one in trained_tensors(plan, run):
        if one.kind != "biases":
            found[one.kind] += one.nbytes
        if one.kind == "token rows":
            found["originals of token rows"] += one.nbytes
    return found
