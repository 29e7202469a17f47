"""A model on `meta` that PEFT has adapted: what it wrapped, and what it will store."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import DTYPE_CODES
from ..errors import MissingRequirementError, said_by
from ..model.experts.fused import by_module, empty_layer, take_apart
from ..system.quiet import quiet_transformers
from .experts import Experts
from .targets import ADAPTED, lora_names

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


class RefusalError(Exception):
    """PEFT does not adapt the model so; the text says why, in its words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of an adapter's file."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors code."""
    is_base: bool = False
    """Whether it is a parameter of the base, which is trained where it is: a bias."""

    @property
    def parameters(self) -> int:
        """Its elements."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class WrappedModule:
    """A module that PEFT has wrapped, once or, for several of its parameters, one time for each."""

    name: str
    parameters: tuple[str, ...]
    """Those that are adapted, by their whole names; none of a layer."""
    tensors: Mapping[str, StoredTensor]
    """What is stored of its adapter."""
    expected: Mapping[str, tuple[int, ...]]
    """The shapes of A and B that its forward pass takes, by the names of these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptedModel:
    """What PEFT made of a model; of 4-bit experts the first of each layer stands for all."""

    config: LoraConfig
    """With which it was asked."""
    modules: Mapping[str, WrappedModule]
    """By name, in the model's order."""
    others: Mapping[str, StoredTensor]
    """What is stored of the base itself: modules that are saved, rows, biases."""
    lost: tuple[str, ...]
    """What it would not find again on loading."""
    target_modules: frozenset[str]
    """As it keeps them: of many whole names, the shortest ends that no other module shares."""
    target_parameters: frozenset[str]
    modules_to_save: tuple[str, ...]
    """As it keeps them: with those that are tied to them, where it keeps ties."""
    warnings: tuple[str, ...]

    @property
    def layers(self) -> frozenset[str]:
        """The names of all layers that are adapted."""
        return frozenset(name for name, module in self.modules.items() if not module.parameters)


def adapt(model: PreTrainedModel, config: LoraConfig, experts: Experts) -> AdaptedModel:
    """Adapt a copy of `model` with a copy of `config`, and load the adapter's own tensor names into it again.

    Raises `RefusalError` where PEFT does not.
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    model, asked = deepcopy(model), config
    own = {id(value): value for value in model.parameters()}  # held: an id is used again once its value is gone
    config = deepcopy(config)
    for name, together in by_module(experts.packed).items():
        take_apart(model.get_submodule(name), together, empty_layer, (0,))
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with torch.device("meta"):  # no initialisation takes time or memory
                    adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
            # what it calls the tensors when it saves them, it must find again when it loads them
            tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            held = adapted.state_dict(keep_vars=True)
            held = get_peft_model_state_dict(adapted, state_dict=held, save_embedding_layers=False)
            loaded = set_peft_model_state_dict(adapted, dict(tensors), low_cpu_mem_usage=True)
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
            raise RefusalError(_in_order(said_by(error).partition(". ")[0])) from error
    stored = {
        name: StoredTensor(
            shape=tuple(value.shape),
            dtype=DTYPE_CODES[str(value.dtype).removeprefix("torch.")],
            is_base=id(held[name]) in own,
        )
        for name, value in tensors.items()
    }
    modules = _wrapped_modules(adapted.base_model.model, stored)
    of_modules = {name for module in modules.values() for name in module.tensors}
    return AdaptedModel(
        config=asked,
        modules=modules,
        others={name: tensor for name, tensor in stored.items() if name not in of_modules},
        lost=(*sorted(name for name in loaded.missing_keys if ".lora_" in name), *sorted(loaded.unexpected_keys)),
        target_modules=frozenset(
            (config.target_modules,) if isinstance(config.target_modules, str) else config.target_modules or ()
        ),
        target_parameters=frozenset(config.target_parameters or ()),
        modules_to_save=tuple(config.modules_to_save or ()),
        warnings=tuple(dict.fromkeys(_in_order(str(found.message)) for found in caught if _tells_something(found))),
    )


def import_peft() -> None:
    """Import PEFT, which takes seconds. Raises `MissingRequirementError` where that fails."""
    try:
        with quiet_transformers():  # bitsandbytes tells which kernels it lacks
            import peft  # noqa: F401
    except Exception as error:  # a broken build raises whatever it likes
        raise MissingRequirementError(
            f"PEFT does not import: {said_by(error)}", hint="`ftload doctor` says how to fix it"
        ) from error


def _wrapped_modules(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, WrappedModule]:
    from peft.tuners.lora import LoraLayer

    of_wrapper: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        of_wrapper.setdefault(key.removeprefix(ADAPTED).rpartition(".lora_")[0], {})[key] = tensor
    together: dict[str, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # a module is wrapped once for each of its parameters, one around another
            together.setdefault(name.replace(".base_layer", ""), []).append((name, module))
    return {
        name: WrappedModule(
            name=name,
            parameters=tuple(
                f"{name}.{module.parameter_name}" for _, module in wrappers if hasattr(module, "parameter_name")
            ),
            tensors={key: tensor for wrapper, _ in wrappers for key, tensor in of_wrapper[wrapper].items()},
            expected={key: shape for wrapper, module in wrappers for key, shape in _expected(wrapper, module).items()},
        )
        for name, wrappers in together.items()
    }


def _expected(name: str, layer: Any) -> dict[str, tuple[int, ...]]:
    rank = layer.r["default"] * getattr(layer, "num_experts", 1)
    a, b = lora_names(name)
    return {a: (rank, layer.in_features), b: (layer.out_features, rank)}


def _tells_something(warning: warnings.WarningMessage) -> bool:
    """Whether PEFT says something that a user could change: not that it sets `fan_in_fan_out` by the layer."""
    return "peft" in warning.filename and not str(warning.message).startswith("fan_in_fan_out is set to")


def _in_order(text: str) -> str:
    """PEFT lists sets, in an order that differs from process to process."""
    return re.sub(r"\{'[^{}]*'\}", lambda found: "{" + ", ".join(sorted(found[0][1:-1].split(", "))) + "}", text)
