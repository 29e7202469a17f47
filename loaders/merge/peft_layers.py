"""PEFT asked what a trained adapter changes of a model, on `meta`: which layers it wraps, and with which tensors.

It matches names by ends and patterns, ranks and scales differ from layer to layer, and what it saves under one name it
may load under another. So PEFT itself wraps the model and loads the adapter's headers into it, and that is read off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensors import TORCH_NAMES, TensorMeta
from ..errors import CheckpointError, MissingRequirementError, said_by
from ..model.experts.fused import FusedExperts
from ..system.quiet import quiet_transformers
from .adapter import CONFIG_FILE, AdapterWeights, TrainedAdapter
from .changes import AddedBias, Change, Changed, Factors, LowRank, Rows
from .expert_layers import join_experts, split_experts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
"""What PEFT puts before the base's names."""
_NAME = "default"
"""What the adapter is called while PEFT holds it."""


@dataclass(kw_only=True, eq=False)
class _Reading:
    """What is read off a wrapped model."""

    weights: AdapterWeights
    loaded: dict[str, TensorMeta]
    """The wrapped model's names of what was loaded, and the adapter's tensors."""
    used: set[str] = field(default_factory=set)
    changes: dict[str, Changed] = field(default_factory=dict)
    """By the names of the model before it was wrapped."""

    def factors(self, *names: str) -> Factors:
        self.used.update(names)
        return Factors(reader=self.weights.reader, tensors=tuple(self.loaded[name] for name in names))

    def add(self, parameter: str, change: Change) -> None:
        if parameter in self.changes:
            raise CheckpointError(f"the adapter `{self.weights.adapter.name}` changes `{parameter}` in two ways")
        self.changes[parameter] = Changed(change=change)


def find_changes(model: PreTrainedModel, weights: AdapterWeights) -> dict[str, Changed]:
    """What an adapter changes, by the names of `model`'s parameters; PEFT wraps `model` for good.

    Parameters that are one and the same stand here under each name that the adapter has something for. Raises
    `CheckpointError` for what PEFT can't load, and naming a tensor of the adapter that finds no place, or is missing.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wrapped, loaded, split = _wrap(model, weights)
    reading = _Reading(weights=weights, loaded=loaded)
    for name, module in _outermost(wrapped.base_model.model):
        _read_module(reading, name, module)
    for experts in split:
        join_experts(reading.changes, experts, weights.adapter)
    for key in loaded.keys() - reading.used:
        # an embedding that has grown, or a bias that was trained: PEFT loads it into the base itself
        parameter = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if parameter not in names:
            raise _unplaced(weights.adapter, loaded[key].name)
        change = reading.changes.get(parameter, Changed())
        reading.changes[parameter] = Changed(replaced_by=loaded[key], change=change.change)
    missing = reading.changes.keys() - names
    if missing:
        raise CheckpointError(
            f"the adapter `{weights.adapter.name}` changes `{min(missing)}`, which the model does not have"
        )
    return reading.changes


def _wrap(
    model: PreTrainedModel, weights: AdapterWeights
) -> tuple[Any, dict[str, TensorMeta], tuple[FusedExperts, ...]]:
    """The model as PEFT wraps it, the adapter's tensors by the wrapped model's names, and the experts taken apart."""
    import torch
    from torch.nn.modules.module import _IncompatibleKeys

    try:
        with quiet_transformers():
            from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    except Exception as error:  # a broken build raises whatever it likes
        raise MissingRequirementError(
            f"PEFT does not import: {said_by(error)}", hint="`ftload doctor` says how to fix it"
        ) from error
    adapter = weights.adapter
    state = {
        tensor.name: torch.empty(tensor.shape, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]), device="meta")
        for tensor in weights.tensors.values()
    }
    given: dict[str, Tensor] = {}

    def load(tensors: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        given.update(tensors)
        return _IncompatibleKeys([], [])

    with quiet_transformers():
        try:
            config = PeftConfig.from_peft_type(**adapter.config)
            _check_known(adapter, config)
            split = split_experts(model, weights, config)
            with torch.device("meta"):  # `low_cpu_mem_usage` would separate modules that are tied
                wrapped: Any = get_peft_model(model, config, adapter_name=_NAME)
            wrapped.load_state_dict = load  # for this call: the names that it is given tell which tensor goes where
            set_peft_model_state_dict(wrapped, state, adapter_name=_NAME)
        except KeyError as error:
            raise CheckpointError(
                f"the adapter `{adapter.name}` lacks the tensor `{error.args[0]}`", hint=_INCOMPLETE
            ) from error
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError, re.error) as error:
            raise CheckpointError(
                f"PEFT can't load the adapter `{adapter.name}` into this model: {said_by(error).partition('. ')[0]}",
                hint="is it the model that the adapter was trained on?",
            ) from error
    by_storage = {_storage(value): weights.tensors[name] for name, value in state.items()}
    found = {key: by_storage.get(_storage(value)) for key, value in given.items()}
    return wrapped, _check_loaded(wrapped, weights, found), split


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor shares with those that PEFT makes of it without computing anything."""
    return tensor.untyped_storage()._cdata, tuple(tensor.shape), tensor.stride()


_INCOMPLETE = "it was not saved whole, or was trained on another model"


def _check_known(adapter: TrainedAdapter, config: Any) -> None:
    """Raise `CheckpointError` for settings of a newer PEFT, which this one would leave out without an error."""
    unknown = [key for key, value in adapter.config.items() if value and not hasattr(config, key)]
    if unknown:
        raise CheckpointError(
            f"`{CONFIG_FILE}` of `{adapter.name}` has `{sorted(unknown)[0]}`, which the installed PEFT does not know",
            hint="pip install --upgrade peft",
        )


def _check_loaded(
    wrapped: Any, weights: AdapterWeights, given: Mapping[str, TensorMeta | None]
) -> dict[str, TensorMeta]:
    """What PEFT would load, by name; raises `CheckpointError` unless it is all that there is, and all that it needs."""
    adapter, expected = weights.adapter, wrapped.state_dict()
    loaded = {}
    for key, tensor in given.items():
        if tensor is None:
            raise CheckpointError(
                f"the adapter `{adapter.name}` was trained before transformers merged experts: `{key}` would be made "
                "of several of its tensors",
                hint="load it with PEFT and save it again",
            )
        if key not in expected:
            raise _unplaced(adapter, tensor.name)
        if tuple(expected[key].shape) != tensor.shape:
            raise CheckpointError(
                f"tensor `{tensor.name}` of the adapter `{adapter.name}` has shape {list(tensor.shape)}, the model "
                f"asks for {list(expected[key].shape)}",
                hint="is it the model that the adapter was trained on?",
            )
        loaded[key] = tensor
    unused = weights.tensors.keys() - {tensor.name for tensor in loaded.values()}
    if unused:
        raise _unplaced(adapter, min(unused))
    own = {key for key in expected if f".{_NAME}." in key or key.endswith(f".{_NAME}")}
    shared = tuple(f"{_PREFIX}{name}." for name, module in _outermost(wrapped.base_model.model) if _is_tied(module))
    missing = sorted(
        key for key in own - loaded.keys() if "trainable_tokens_original" not in key and not key.startswith(shared)
    )
    if missing:
        name = missing[0].replace(f".{_NAME}", "").replace(".modules_to_save.", ".")
        raise CheckpointError(f"the adapter `{adapter.name}` lacks the tensor `{name}`", hint=_INCOMPLETE)
    return loaded


def _unplaced(adapter: TrainedAdapter, name: str) -> CheckpointError:
    return CheckpointError(
        f"tensor `{name}` of the adapter `{adapter.name}` belongs to no layer of the model that is adapted",
        hint="is it the model that the adapter was trained on?",
    )


def _outermost(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that PEFT put in the place of others, those within them left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    outer: str | None = None
    for name, module in model.named_modules():  # what is within a module follows it at once
        is_within = outer is not None and name.startswith(outer)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not is_within:
            outer = f"{name}."
            yield name, module


def _is_tied(module: Any) -> bool:
    """Whether a module uses the rows that were trained for another."""
    from peft.utils import TrainableTokensWrapper

    return isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is not None


def _read_module(reading: _Reading, name: str, module: Any) -> None:
    """Note what one of PEFT's modules makes of the one in whose place it stands."""
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    key = f"{_PREFIX}{name}"
    if isinstance(module, ModulesToSaveWrapper):
        for leaf, value in module.modules_to_save[_NAME].state_dict(keep_vars=True).items():
            saved = f"{key}.modules_to_save.{_NAME}.{leaf}"
            reading.used.add(saved)
            reading.changes[f"{name}.{leaf}"] = Changed(replaced_by=reading.loaded[saved], copy=id(value))
    elif isinstance(module, TrainableTokensWrapper):
        if not _is_tied(module):
            indices = tuple(module.token_adapter.token_indices[_NAME])
            _check_rows(reading.weights.adapter, name, indices, module.token_adapter.weight.shape[0])
            rows = reading.factors(f"{key}.token_adapter.trainable_tokens_delta.{_NAME}")
            reading.add(f"{name}.weight", Rows(factors=rows, indices=indices))
    elif type(module) is Linear:
        _read_linear(reading, name, module)
    elif type(module) is Embedding:
        names = [f"{key}.lora_embedding_{which}.{_NAME}" for which in "AB"]
        table: Any = module.get_base_layer()
        dora = _magnitudes(reading, key, module)
        reading.add(
            f"{name}.weight",
            LowRank(
                factors=reading.factors(*names, *dora), scaling=module.scaling[_NAME], outs=table.embedding_dim,
                ins=table.num_embeddings, transposed=True, rounded=not dora,
            ),
        )  # fmt: skip
    elif type(module) is ParamWrapper:
        while isinstance(module, ParamWrapper):
            _read_parameter(reading, key, name, module)
            key, module = f"{key}.base_layer", module.base_layer
    else:
        raise CheckpointError(
            f"the adapter `{reading.weights.adapter.name}` adapts `{name}` by PEFT's `{type(module).__name__}`, which "
            "ftload can't merge",
            hint="merge it with PEFT itself",
        )


def _read_linear(reading: _Reading, name: str, module: Any) -> None:
    key, scaling = f"{_PREFIX}{name}", module.scaling[_NAME]
    names = [f"{key}.lora_{which}.{_NAME}.weight" for which in "AB"]
    factors = reading.factors(*names, *_magnitudes(reading, key, module))
    reading.add(
        f"{name}.weight",
        LowRank(
            factors=factors, scaling=scaling, outs=module.out_features, ins=module.in_features,
            transposed=module.fan_in_fan_out,
        ),
    )  # fmt: skip
    if module.lora_bias[_NAME]:
        if getattr(module.get_base_layer(), "bias", None) is None:
            raise CheckpointError(
                f"the adapter `{reading.weights.adapter.name}` has a bias for `{name}`, a layer that has none",
                hint="`lora_bias` can't be merged there: keep the adapter",
            )
        reading.add(f"{name}.bias", AddedBias(factors=reading.factors(f"{key}.lora_B.{_NAME}.bias"), scaling=scaling))


def _magnitudes(reading: _Reading, key: str, module: Any) -> list[str]:
    """What DoRA has learnt beside A and B. Raises `CheckpointError` for another variant of LoRA."""
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    variant = module.lora_variant.get(_NAME)
    if variant is None:
        return []
    if type(variant) not in (DoraEmbeddingVariant, DoraLinearVariant):
        raise CheckpointError(
            f"the adapter `{reading.weights.adapter.name}` uses PEFT's `{type(variant).__name__}`, which ftload can't "
            "merge",
            hint="merge it with PEFT itself",
        )
    return [f"{key}.lora_magnitude_vector.{_NAME}.weight"]


def _read_parameter(reading: _Reading, key: str, name: str, module: Any) -> None:
    """Experts, or another parameter that is no layer's weight: `target_parameters`."""
    shape = tuple(module.get_param().shape)
    transposed = len(shape) == 3 and bool(getattr(module.get_base_layer(), "is_transposed", False))
    outs, ins = shape[-2:][::-1] if transposed else shape[-2:]
    reading.add(
        f"{name}.{module.parameter_name}",
        LowRank(
            factors=reading.factors(*(f"{key}.lora_{which}.{_NAME}.weight" for which in "AB")),
            scaling=module.scaling[_NAME], outs=outs, ins=ins, transposed=transposed, rounded=True,
            experts=module.num_experts,
        ),
    )  # fmt: skip


def _check_rows(adapter: TrainedAdapter, name: str, indices: tuple[int, ...], rows: int) -> None:
    for index in indices:
        if not 0 <= index < rows:
            raise CheckpointError(
                f"the adapter `{adapter.name}` has trained token {index}, `{name}` has {rows} rows",
                hint="save the adapter with its embeddings, or name the base that had grown with --model",
            )
