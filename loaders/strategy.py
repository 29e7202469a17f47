"""What a strategy answers, and the four that there are."""

from __future__ import annotations

from typing import Any, Protocol

from .liger import Liger
from .lora import Lora
from .model.tensor_map import ModelTensor
from .qlora import Qlora
from .standard import Standard
from .steps.step import Step


class Strategy(Protocol):
    """How a model is prepared for one way of training it. Pure: it reads nothing and writes nothing."""

    @property
    def name(self) -> str:
        """The word for it in reports."""
        ...

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained on a frozen base; else all weights are trained."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """The distributions that training with it needs, beyond torch and transformers."""
        ...

    def step(self, tensors: tuple[ModelTensor, ...]) -> Step:
        """How one tensor of the model is written, or all that come out of one conversion.

        Raises `CheckpointError` or `MissingRequirementError` where they can't be.
        """
        ...

    def quantization_config(self) -> dict[str, Any] | None:
        """config.json's `quantization_config`, None for 16-bit weights."""
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
