"""The model without its weights: which stored tensor becomes which parameter, and what will be saved under which name.

transformers itself loads the checkpoint's *headers* into a model on the `meta` device, so that what it renames, drops,
ties, keeps in float32 or finds missing is its own answer, for every architecture that it knows. The names that
`save_pretrained` would write come from the same conversion mapping, reversed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .catalog import Component, LinearLayer, component_of
from .checkpoint import DTYPE_CODES, Checkpoint, TensorMeta
from .errors import CheckpointError, FtloadError, MissingRequirementError, said_by
from .nf4 import PackedTensor, find_packed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """Stored tensors that transformers merges or splits on loading."""

    model: PreTrainedModel
    converter: Any
    parameter: str
    sources: tuple[tuple[str, str], ...]
    """Stored name and the converter's pattern that it matched, in transformers' order."""

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load and save in one go: stored names to values, then saved names to values."""
        return _revert(self.model, self.load(values))

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored names to values, then parameter names to values."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.parameter, name, pattern, values[name])
        loaded = converter.convert(self.parameter, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in loaded.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelTensor:
    """One tensor that the prepared model is made of, under the name that it is saved by."""

    name: str
    parameter: str
    """The model's own name for what it is, or is a part of."""
    buffer: bool
    """Part of the state, but not a parameter."""
    shape: tuple[int, ...]
    """As saved, after resizing; the logical shape for a tensor that is or will be 4-bit."""
    dtype: str
    """The safetensors code that the reference loads it with: BF16, or F32 where the architecture keeps it so."""
    component: Component
    sources: tuple[TensorMeta, ...]
    linear: LinearLayer | None = None
    """The linear layer that it is the weight of, where bitsandbytes would quantise that layer."""
    rows_before: int | None = None
    """Rows in the checkpoint, where resizing adds some."""
    conversion: Conversion | None = None
    packed: PackedTensor | None = None
    """Set when the checkpoint already holds it in 4 bits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Skeleton:
    """A model on the `meta` device and everything about it that a plan needs."""

    model: PreTrainedModel
    tensors: tuple[ModelTensor, ...]
    layers: tuple[LinearLayer, ...]
    """Every linear layer, in module order."""
    fused_experts: tuple[str, ...]
    """Parameters of three dimensions that hold the weights of many experts."""
    embedding: str
    """Name of the input embedding's parameter."""
    head: str | None
    rows_before: int
    rows_after: int
    tied: bool
    warnings: tuple[str, ...]

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration, after resizing."""
        return self.model.config


def load_config(
    root: Path, *, overrides: Mapping[str, Any], trust_remote_code: bool
) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """Read a `config.json` through transformers and apply `overrides`; the second value is warnings.

    Raises `CheckpointError` for an unknown or malformed configuration, and for code that was not allowed.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(root, trust_remote_code=trust_remote_code, **overrides)
    except (
        ValueError,
        KeyError,
        TypeError,
        OSError,
        AttributeError,
        ImportError,
        RecursionError,
        ZeroDivisionError,
        StrictDataclassError,
    ) as error:
        hint = "is it a transformers model, and new enough a transformers?"
        if overrides:
            hint += " Is --additional_model_arguments right?"
        raise _remote_code_error(error, root) or CheckpointError(
            f"`{root / 'config.json'}` can't be used: {said_by(error)}", hint=hint
        ) from error
    unknown = [name for name in overrides if not hasattr(config, name)]
    return config, tuple(f"`additional_model_arguments`: the configuration has no `{name}`" for name in unknown)


def build_skeleton(
    checkpoint: Checkpoint, config: PretrainedConfig, *, trust_remote_code: bool, tokenizer_size: int
) -> Skeleton:
    """Load the headers of `checkpoint` into a model on `meta` and grow its embeddings to fit the tokenizer.

    Raises `CheckpointError` when the model is not a causal language model, or keys are missing, unexpected or of
    another shape.
    """
    import torch

    model_class = _model_class(checkpoint, config, trust_remote_code=trust_remote_code)
    packed = find_packed(checkpoint)
    _check_quantization(checkpoint, config, packed)
    hidden = {meta.name for tensor in packed.values() for meta in tensor.parts if meta.name != tensor.name}
    state = {
        meta.name: torch.empty(_shape(meta, packed), dtype=torch.bfloat16, device="meta")
        for meta in checkpoint.tensors.values()
        if meta.name not in hidden
    }
    model, info = _load_on_meta(model_class, config, state)
    _check_keys(checkpoint, model, info, packed)
    mapping, dropped = _map_tensors(checkpoint, model, state)
    warnings = [f"`{name}` is not part of the model and is left out, as transformers does" for name in dropped]

    quantisable = _quantisable_modules(model_class, config)
    warnings += _tie_equal_weights(checkpoint, model, mapping)
    embedding, head = _embedding_names(model)
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    rows_before = before[embedding][0]
    rows_after = max(rows_before, -(-tokenizer_size // 8) * 8) if tokenizer_size > rows_before else rows_before
    if rows_after > rows_before:
        with quiet_transformers():
            model.resize_token_embeddings(rows_after, mean_resizing=False)
    with quiet_transformers():
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        saved = remove_tied_weights_from_state_dict(model.state_dict(), model)
    for name in model._keys_to_ignore_on_save or ():
        saved.pop(name, None)

    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    head_module = head.removesuffix(".weight") if head else None
    layers = tuple(_linear_layers(model, classes, head_module))
    by_weight = {f"{layer.name}.weight": layer for layer in layers if layer.name in quantisable}
    tensors: list[ModelTensor] = []
    for group in mapping:
        tensors += _saved_tensors(checkpoint, model, group, saved, before, by_weight, packed, classes, head_module)
    tied = head is not None and model.get_parameter(head) is model.get_parameter(embedding)
    return Skeleton(
        model=model,
        tensors=tuple(tensors),
        layers=layers,
        fused_experts=tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == 3 and component_of(name, classes, head=head_module) == "experts"
        ),
        embedding=embedding,
        head=head,
        rows_before=rows_before,
        rows_after=rows_after,
        tied=tied,
        warnings=tuple(warnings),
    )


def load_generation_config(root: Path) -> GenerationConfig:
    """The generation settings as `from_pretrained` finds them: their own file, else what `config.json` still holds.

    Raises `CheckpointError` for values of the wrong type.
    """
    from transformers import GenerationConfig

    with quiet_transformers():
        try:
            return GenerationConfig.from_pretrained(root)
        except OSError:
            return GenerationConfig.from_pretrained(root, config_file_name="config.json", _from_model_config=True)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"`{root / 'generation_config.json'}` can't be used: {said_by(error)}",
                hint="correct it, or delete it: training does without",
            ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and log lines off stderr; what matters in them is checked and reported here."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """What becomes one parameter, or goes through one converter."""

    parameters: tuple[str, ...]
    sources: tuple[TensorMeta, ...]
    conversion: Conversion | None


def _model_class(checkpoint: Checkpoint, config: PretrainedConfig, *, trust_remote_code: bool) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    causal = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(names)}
    bare = {name for names in MODEL_MAPPING_NAMES.values() for name in _names(names)}
    auto_map = getattr(config, "auto_map", None) or {}
    native = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if "AutoModelForCausalLM" in auto_map and (trust_remote_code or not native):
        if not trust_remote_code:
            raise CheckpointError(
                f"`{checkpoint.source.model}` needs code of its own",
                hint="pass --trust_remote_code if you trust it",
            )
        try:
            return cast(
                "type[PreTrainedModel]",
                get_class_from_dynamic_module(
                    auto_map["AutoModelForCausalLM"], checkpoint.source.root, trust_remote_code=True
                ),
            )
        except (OSError, ImportError, AttributeError) as error:
            raise CheckpointError(f"the model's own code can't be used: {said_by(error)}") from error
    architectures = getattr(config, "architectures", None) or []
    known = not architectures or any(name in causal or name in bare for name in architectures)
    if not native or not known:
        what = architectures[0] if architectures else config.model_type
        raise CheckpointError(
            f"`{checkpoint.source.model}` is a `{what}`, not a causal language model",
            hint="ftload prepares what AutoModelForCausalLM can load",
        )
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class[0] if isinstance(model_class, tuple) else model_class


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _check_quantization(checkpoint: Checkpoint, config: PretrainedConfig, packed: Mapping[str, PackedTensor]) -> None:
    """Refuse all stored forms of weights but NF4, whose tensors would only look missing and unexpected."""
    stored = getattr(config, "quantization_config", None)
    if stored is None or packed:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    raise CheckpointError(
        f"`{checkpoint.source.model}` is already quantised (`{getattr(method, 'value', method)}`)",
        hint="start from the 16-bit model; among quantised ones only bitsandbytes NF4 can be used",
    )


def _load_on_meta(
    model_class: type[PreTrainedModel], config: PretrainedConfig, state: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    import torch

    config = deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        delattr(config, "quantization_config")  # packed tensors stand in `state` with their logical shapes
    try:
        with quiet_transformers():
            loaded: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.bfloat16,
                device_map={"": "meta"},
                attn_implementation="eager",  # works everywhere, and nothing that is saved depends on it
                ignore_mismatched_sizes=True,  # reported by us, all of them, with names
                output_loading_info=True,
            )
            return loaded
    except ImportError as error:
        raise MissingRequirementError(f"this model's code needs more: {said_by(error)}") from error
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"transformers can't build `{model_class.__name__}` from this configuration: {said_by(error)}"
        ) from error


def _shape(meta: TensorMeta, packed: Mapping[str, PackedTensor]) -> tuple[int, ...]:
    return packed[meta.name].shape if meta.name in packed else meta.shape


def _check_keys(
    checkpoint: Checkpoint, model: PreTrainedModel, info: dict[str, Any], packed: Mapping[str, PackedTensor]
) -> None:
    problems = []
    mismatched = [
        (name, tuple(stored), tuple(expected))
        for name, stored, expected in sorted(info["mismatched_keys"])
        # bitsandbytes stores the weights of GPT-2's Conv1D transposed
        if not (packed and tuple(stored) == tuple(expected)[::-1])
    ]
    if mismatched:
        name, stored, expected = mismatched[0]
        problems.append(
            f"tensor `{name}` has shape {list(stored)}, the configuration asks for {list(expected)}{_more(mismatched)}"
        )
    for what, keys in (("lacks", info["missing_keys"]), ("has the unexpected", info["unexpected_keys"])):
        if keys:
            problems.append(f"{what} tensor `{sorted(keys)[0]}`{_more(keys)}")
    if problems:
        raise CheckpointError(
            f"`{checkpoint.source.model}` does not fit `{type(model).__name__}`: {'; '.join(problems)}",
            hint="config.json and the weights must belong together",
        )


def _more(items: Any) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def _map_tensors(
    checkpoint: Checkpoint, model: PreTrainedModel, state: Mapping[str, Tensor]
) -> tuple[list[_Group], list[str]]:
    """Group the stored tensors by the parameter that they become; the second value is what transformers drops."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, list[tuple[str, str | None]]] = {}
    dropped = []
    for name in sorted(state, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if target in parameters:
            found.setdefault(target, []).append((name, pattern))
        else:
            dropped.append(name)
    groups = []
    order = {name: position for position, name in enumerate(parameters)}
    for target in sorted(found, key=order.__getitem__):
        metas = tuple(checkpoint.tensors[name] for name, _ in found[target])
        patterns = [(name, pattern) for name, pattern in found[target] if pattern is not None]
        if not patterns:
            # from_pretrained keeps the first where several names lead to one parameter
            groups.append(_Group(parameters=(target,), sources=metas[:1], conversion=None))
            continue
        conversion = Conversion(
            model=model, converter=by_pattern[patterns[0][1]], parameter=target, sources=tuple(patterns)
        )
        loaded = conversion.load(state)
        groups.append(_Group(parameters=tuple(loaded), sources=metas, conversion=conversion))
    return groups, dropped


def _saved_tensors(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    group: _Group,
    saved: Mapping[str, Tensor],
    before: Mapping[str, tuple[int, ...]],
    by_weight: Mapping[str, LinearLayer],
    packed: Mapping[str, PackedTensor],
    classes: Mapping[str, str],
    head: str | None,
) -> list[ModelTensor]:
    """What `save_pretrained` makes of one group; nothing where the parameter is tied to another or never saved."""
    import torch

    kept = {name: saved[name] for name in group.parameters if name in saved}
    if not kept:
        return []
    parameter = group.parameters[0]
    buffer = not isinstance(model.get_parameter_or_buffer(parameter), torch.nn.Parameter)
    component = component_of(parameter, classes, head=head)
    dtype = DTYPE_CODES[str(kept[next(iter(kept))].dtype).removeprefix("torch.")]
    if group.conversion is not None:
        stored = {meta.name: torch.empty(meta.shape, device="meta") for meta in group.sources}
        outputs = {name: tuple(value.shape) for name, value in group.conversion.run(stored).items()}
        layers = [by_weight[name] for name in kept if name in by_weight]
        unchanged = outputs == {meta.name: meta.shape for meta in group.sources}
        if not unchanged:
            if layers:
                raise CheckpointError(
                    f"tensor `{group.sources[0].name}` is merged or split on loading into linear layers, "
                    "which ftload can't stream in this layout",
                    hint="load the model with transformers and save it again",
                )
            return [
                ModelTensor(
                    name=name, parameter=parameter, buffer=buffer, shape=shape, dtype=dtype, component=component,
                    sources=group.sources, conversion=group.conversion,
                )
                for name, shape in outputs.items()
            ]  # fmt: skip
        # a converter and its reverse cancel out when they give back every name and shape
        return [
            ModelTensor(
                name=meta.name, parameter=parameter, buffer=buffer, shape=meta.shape, dtype=dtype,
                component=component, sources=(meta,),
            )
            for meta in group.sources
        ]  # fmt: skip
    (name,) = _revert(model, {parameter: saved[parameter]})
    shape = tuple(saved[parameter].shape)
    source = group.sources[0]
    rows_before = None
    if shape != before[parameter]:
        if shape[1:] != before[parameter][1:]:
            raise CheckpointError(f"resizing the embeddings changes `{parameter}` in a way that ftload can't follow")
        rows_before = before[parameter][0]
    if not source.dtype.startswith(("F", "BF")):
        dtype = source.dtype if source.name not in packed else dtype
    elif packed:
        dtype = source.dtype  # what is stored in a 4-bit checkpoint wins over `dtype=` on loading
    return [
        ModelTensor(
            name=name, parameter=parameter, buffer=buffer, shape=shape, dtype=dtype, component=component,
            sources=(source,), linear=by_weight.get(parameter), rows_before=rows_before, packed=packed.get(source.name),
        )
    ]  # fmt: skip


def _revert(model: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, values)


def _quantisable_modules(model_class: type[PreTrainedModel], config: PretrainedConfig) -> frozenset[str]:
    """The modules that transformers' own bitsandbytes quantiser would replace.

    It decides before weights are tied, so it is asked about a model that never was.
    """
    import torch
    from transformers.initialization import no_tie_weights
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    with quiet_transformers(), torch.device("meta"), no_tie_weights():
        model = model_class(deepcopy(config))
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
    )


def _linear_layers(model: PreTrainedModel, classes: Mapping[str, str], head: str | None) -> Iterator[LinearLayer]:
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if name == head:
            continue
        transposed = isinstance(module, Conv1D)
        if transposed:
            in_features, out_features = module.weight.shape
        elif isinstance(module, torch.nn.Linear):
            in_features, out_features = module.in_features, module.out_features
        else:
            continue
        yield LinearLayer(
            name=name,
            in_features=in_features,
            out_features=out_features,
            component=component_of(f"{name}.weight", classes, head=head),
            transposed=transposed,
        )


def _embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    names = {id(module): name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    head = f"{names[id(output)]}.weight" if output is not None else None
    return f"{names[id(model.get_input_embeddings())]}.weight", head


_COMPARED_AT_ONCE = 4 * 1024 * 1024
"""Elements of two tensors that are in memory when they are compared."""


def _tie_equal_weights(checkpoint: Checkpoint, model: PreTrainedModel, mapping: list[_Group]) -> list[str]:
    """Where the configuration ties two parameters and the checkpoint holds both: tie them if they are equal.

    This is the one question whose answer is in the weights themselves, and only such checkpoints raise it.
    """
    import torch

    sources = {group.parameters[0]: group.sources[0] for group in mapping if group.conversion is None}
    warnings = []
    for target, origin in list(model.all_tied_weights_keys.items()):
        if target not in sources or origin not in sources or model.get_parameter(target) is model.get_parameter(origin):
            continue
        dtype = model.get_parameter(origin).dtype
        first, second = sources[target], sources[origin]
        checkpoint.source.fetch({first.file, second.file})
        pairs = zip(
            checkpoint.chunks(first, _COMPARED_AT_ONCE), checkpoint.chunks(second, _COMPARED_AT_ONCE), strict=True
        )
        equal = first.shape == second.shape and all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in pairs)
        if equal:
            parent, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_parameter(origin))
        else:
            del model.all_tied_weights_keys[target]
            warnings.append(
                f"`{target}` and `{origin}` are tied in the configuration but differ in the checkpoint: both are kept, "
                "untied, as transformers does"
            )
    return warnings


def _remote_code_error(error: Exception, root: Path) -> FtloadError | None:
    if "trust_remote_code" in str(error):
        return CheckpointError(f"`{root}` needs code of its own", hint="pass --trust_remote_code if you trust it")
    return None
