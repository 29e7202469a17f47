"""A model built on the `meta` device, with bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MissingRequirementError, said_by
from ..system.quiet import quiet_transformers
from .transformers_internals import no_tie_weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


def load_on_meta(
    model_class: type[PreTrainedModel], config: PretrainedConfig, state: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load names, shapes and dtypes into a model; the second value is transformers' loading info."""
    import torch

    loaded: Any = model_class.from_pretrained(
        None,
        config=_without_quantization(config),  # packed tensors stand in `state` with their logical shapes
        state_dict=state,
        dtype=torch.bfloat16,
        device_map={"": "meta"},
        attn_implementation="eager",  # works everywhere, and nothing that is saved depends on it
        ignore_mismatched_sizes=True,  # reported by us, all of them, with names
        output_loading_info=True,
    )
    return loaded


def empty_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model on `meta` that was never loaded into, nor its weights tied."""
    import torch

    with torch.device("meta"), no_tie_weights():
        return model_class(_without_quantization(config))


def _without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    config = deepcopy(config)
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            delattr(part, "quantization_config")
    return config


@contextmanager
def building(model_class: type[PreTrainedModel], most_parts: int) -> Iterator[None]:
    """Build a model: what its code raises is told as the configuration's fault, and its size is bounded."""
    try:
        with quiet_transformers(), _bounded(most_parts):
            yield
    except ImportError as error:
        raise MissingRequirementError(f"this model's code needs more: {said_by(error)}") from error
    except (
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        raise CheckpointError(
            f"transformers can't build `{model_class.__name__}` from this configuration: {said_by(error)}"
        ) from error


PARTS_A_TENSOR = 200
LEAST_PARTS = 3000
"""A model has some three modules and parameters for each stored tensor; hundreds if one holds many experts."""


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Raise `CheckpointError` when more modules and parameters than `most` are made.

    A configuration of a few bytes can ask for any number of layers, and each of them takes time and memory.
    """
    from torch.nn.modules.module import (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    parts = 0

    def count(*_: object) -> None:
        nonlocal parts
        parts += 1
        if parts > most:
            raise CheckpointError(
                "the configuration asks for a model of far more parts than there are tensors",
                hint="config.json and the weights must belong together",
            )

    hooks = register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
