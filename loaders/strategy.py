"""What a strategy answers, and the four that there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .adapter.interface import Adapter
from .flags.request import Request
from .liger import Liger
from .lora import Lora
from .model.tensor_map import ModelTensor
from .qlora import Qlora
from .standard import Standard
from .steps.quantisation import Quantisation
from .steps.step import Step


class Strategy(Protocol):
    """How a model is prepared for one way of training it. Pure: it reads nothing and writes nothing."""

    @property
    def name(self) -> str:
        """The word for it in reports."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """The distributions that training with it needs, beyond torch and transformers."""
        ...

    @property
    def quantisation(self) -> Quantisation | None:
        """How weights of the base are quantised; None for 16-bit weights."""
        ...

    def configured(self, request: Request, stored: Mapping[str, Any] | None) -> Strategy:
        """The same with the settings that are asked for; `stored` is the checkpoint's own `quantization_config`.

        Raises `CheckpointError` for stored settings that have no meaning.
        """
        ...

    def adapter(self, request: Request) -> Adapter | None:
        """The adapter that is trained on a frozen base; None where all weights are trained."""
        ...

    def step(self, tensors: tuple[ModelTensor, ...]) -> Step:
        """How a group is written: one tensor of the model, or all that come out of one conversion.

        Raises `CheckpointError` or `MissingRequirementError` where they can't be.
        """
        ...

    def training_dtype(self, counted_as: str) -> str:
        """The dtype that `load_prepared` gives to base weights that are stored as `counted_as`."""
        ...


STRATEGIES: dict[str, Strategy] = {
    "standard": Standard(),
    "liger": Liger(),
    "lora": Lora(),
    "qlora": Qlora(),
}
