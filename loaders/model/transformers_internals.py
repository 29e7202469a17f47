"""Every name of transformers that it does not publish, in one place: what it is for, and what breaks without it.

A release may rename or drop any of them. What is gone is `MissingRequirementError`, with the installed version and the
range that ftload was tested with: no bug of ftload, and nothing that a user could have done wrong.

The file is long because every such name is in it: what a new release changed is looked for in one place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import MissingRequirementError
from ..system.attention import AttentionSupport
from ..system.quiet import quiet_transformers
from ..system.versions import installed_version, required_range

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def _find(module: str, name: str) -> Any:
    """A name of one of transformers' modules. Raises `MissingRequirementError` where it is gone."""
    try:
        found = importlib.import_module(f"transformers.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("transformers"):
            raise  # something that transformers itself needs
        raise _gone(f"{module}.{name}") from error
    return _attribute(found, name, f"{module}.{name}")


def _attribute(owner: Any, name: str, shown: str) -> Any:
    """An attribute that is always there. Raises `MissingRequirementError` where it is gone."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise _gone(shown) from error


def _gone(name: str) -> MissingRequirementError:
    tested = required_range("transformers")
    return MissingRequirementError(
        f"transformers {installed_version('transformers')} has no `{name}`, which ftload needs",
        hint=f"ftload is tested with transformers {tested}: pip install 'transformers{tested}'",
    )


# -- which class a checkpoint is loaded as


def is_causal(config: PretrainedConfig) -> bool:
    """Whether `AutoModelForCausalLM` has a class for a configuration. Without it: no model is found."""
    return type(config) in _find("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING")


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """That class. Without it: no model is found."""
    return _auto_class(config, _find("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING"))


def multimodal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the whole model. Without it: towers of multimodal checkpoints can't be told from surplus tensors."""
    return _auto_class(config, _find("models.auto.modeling_auto", "MODEL_FOR_MULTIMODAL_LM_MAPPING"))


def _auto_class(config: PretrainedConfig, mapping: Any) -> type[PreTrainedModel]:
    """One of several classes for a configuration is the one that its `architectures` name."""
    return _find("models.auto.auto_factory", "_get_model_class")(config, mapping)


def causal_names() -> set[str]:
    """The names of all causal language models. Without them: other models are not refused by their names."""
    return _class_names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def bare_names() -> set[str]:
    """The names of all models without a head, which some checkpoints give. Without them: those are refused."""
    return _class_names("MODEL_MAPPING_NAMES")


def _class_names(mapping: str) -> set[str]:
    values = _find("models.auto.modeling_auto", mapping).values()
    return {name for names in values for name in ((names,) if isinstance(names, str) else names)}


def remote_class(reference: str, model: str | Path, *, revision: str | None = None) -> Any:
    """The class of a model that brings its own code, trusted by the user. Without it: such models can't be had.

    Raises what that code raises while it is imported.
    """
    more = {} if revision is None else {"revision": revision}
    load = _find("dynamic_module_utils", "get_class_from_dynamic_module")
    return load(reference, model, trust_remote_code=True, **more)


def generation_of_config(root: Path) -> GenerationConfig:
    """The generation settings that an older config.json still holds. Without it: they would be lost."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(root, config_file_name="config.json", _from_model_config=True)


# -- how stored tensors become parameters, and parameters stored tensors


class WeightMapping:
    """Renaming, merging and splitting on loading, as transformers does it. Without it: no name could be trusted."""

    def __init__(self, model: PreTrainedModel, transforms: Sequence[Any] | None = None) -> None:
        """With the transformations for safetensors, or with others."""
        if transforms is None:
            mapping: list[Any] = _find("conversion_mapping", "get_model_conversion_mapping")(model)
            transforms = mapping
        converter, renaming = (_find("core_model_loading", name) for name in ("WeightConverter", "WeightRenaming"))
        self._rename = _find("core_model_loading", "rename_source_key")
        self._order = _find("core_model_loading", "dot_natural_key")
        self._converters = [transform for transform in transforms if isinstance(transform, converter)]
        self._renamings = [transform for transform in transforms if isinstance(transform, renaming)]
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()
        self.by_pattern = {
            pattern: transform for transform in self._converters for pattern in transform.source_patterns
        }
        """The converter of each source pattern."""

    def targets(self, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """The parameter or buffer that each stored name leads to, and the pattern of the converter on the way, if any.

        In transformers' order; names that lead to nothing in the model are left out.
        """
        found = {}
        for name in sorted(names, key=self._order):
            target, pattern = self.target(name)
            if target in self._parameters:
                found[name] = target, pattern
        return found

    def renamed(self, name: str) -> str:
        """A stored name before what it leads to is merged or split."""
        return self._rename(name, self._renamings, [])[0]

    def target(self, name: str) -> tuple[str, str | None]:
        """The name that one stored name leads to, in the model or not, and the pattern on the way, if any."""
        target, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._parameters)
        if target not in self._parameters and name in self._parameters:
            return self._rename(name, [], [], self._prefix, self._parameters)
        return target, pattern


def revert(model: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as `save_pretrained` names and divides them. Without it: merged weights would be saved merged."""
    return _find("core_model_loading", "revert_weight_conversion")(model, values)


def forget_stored_names(model: PreTrainedModel) -> None:
    """What a quantiser does that has dequantised a model. Without it: prefixes would be put back that it leaves out."""
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def merges_weights(model_type: str) -> bool:
    """Whether loading merges or splits weights of an architecture. Without it: PEFT would be asked each time."""
    return _find("conversion_mapping", "get_checkpoint_conversion_mapping")(model_type) is not None


def is_kept_in_float32(model: PreTrainedModel, parameter: str) -> bool:
    """Whether the class keeps a parameter in float32. Without it: it would be quantised from bfloat16."""
    import torch

    plan = list(_attribute(model, "_get_dtype_plan", "PreTrainedModel._get_dtype_plan")(torch.bfloat16))
    if not plan:
        return False
    pattern, *_ = _find("core_model_loading", "build_glob_alternation")(plan)
    return pattern.search(parameter) is not None


def state_to_save(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `save_pretrained` writes, by the model's names. Without it: tied weights would be written twice.

    Raises `RuntimeError` where transformers can't tell which of several names of one weight to keep.
    """
    with quiet_transformers():
        state = _find("modeling_utils", "remove_tied_weights_from_state_dict")(model.state_dict(), model)
    for name in _attribute(model, "_keys_to_ignore_on_save", "PreTrainedModel._keys_to_ignore_on_save") or ():
        state.pop(name, None)
    return state


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Tied parameter to the one that it is tied to; deleting one unties it. Without it: ties would not be checked."""
    return _attribute(model, "all_tied_weights_keys", "PreTrainedModel.all_tied_weights_keys")


# -- how a model is built and initialised


def no_tie_weights() -> AbstractContextManager[None]:
    """Build models whose weights are not tied. Without it: the quantiser's choice could not be asked as it is made."""
    return _find("initialization", "no_tie_weights")()


def initialise_nothing(model: PreTrainedModel) -> None:
    """Let resizing initialise no rows: nothing has values on `meta`, and xLSTM's own way fails on its causal class."""
    _attribute(model, "_init_weights", "PreTrainedModel._init_weights")
    model._init_weights = lambda module: None


def set_after_loading(model: PreTrainedModel, name: str) -> Tensor | None:
    """What a floating-point buffer of `model` (on `meta`) is set to after loading; None if it stays as it was stored.

    `from_pretrained` runs `_init_weights` on every module in the end. transformers' own functions spare what came from
    the checkpoint (a flag on the tensor says so), but an assignment does not: Zaya's routers set the last of their
    biases. Without it: such a buffer would be written as it was stored.

    The tensor has the buffer's shape and dtype, and NaN where the buffer stays.
    """
    import torch
    from transformers import PreTrainedModel

    buffer = model.get_buffer(name)
    if not buffer.is_floating_point():
        return None
    path, _, leaf = name.rpartition(".")
    owner = model
    for end in (position for position, letter in enumerate(path + ".") if letter == "."):
        part = model.get_submodule(path[:end])
        owner = part if isinstance(part, PreTrainedModel) else owner
    probe: Any = torch.full(buffer.shape, float("nan"), dtype=buffer.dtype)
    probe._is_hf_initialized = True
    module = deepcopy(model.get_submodule(path))
    module._buffers[leaf] = probe
    initialise = _attribute(owner, "_init_weights", "PreTrainedModel._init_weights")
    with quiet_transformers(), torch.no_grad(), _find("initialization", "guard_torch_init_functions")():
        initialise(module)
    return None if probe.isnan().all() else probe


# -- experts


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsLayout:
    """How a module holds the weights of many experts."""

    parameters: tuple[str, str]
    """The first projection and the second."""
    transposed: bool
    """Whether each is (experts, in, out) rather than (experts, out, in)."""


def experts_layout(module: Any) -> ExpertsLayout | None:
    """The layout of a module whose forward pass is an exchangeable function (`use_experts_implementation`).

    None for all other modules. The decorator notes on its modules what such a function has to know. Without it: fused
    experts would stay 16-bit.
    """
    import torch

    if not is_experts(module):
        return None
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weights = [getattr(module, name, None) for name in (first, "down_proj")]
    if not all(isinstance(weight, torch.nn.Parameter) and weight.dim() == 3 for weight in weights):
        return None
    return ExpertsLayout(parameters=(first, "down_proj"), transposed=module.is_transposed)


def is_experts(module: Any) -> bool:
    """Whether a module's forward pass is an exchangeable one, of hidden states, experts of each token and weights.

    Whatever its weights have become. Without it: verifying would reach a few experts alone.
    """
    return all(isinstance(getattr(module, name, None), bool) for name in ("has_gate", "is_transposed", "has_bias"))


def apply_gate(module: Any, x: Tensor) -> Tensor:
    """The activation of experts with a gate: (…, 2 · intermediate) to (…, intermediate). Without it: no expert runs."""
    return _attribute(module, "_apply_gate", "use_experts_implementation: _apply_gate")(x)


def register_experts_function(name: str, function: Callable[..., Tensor]) -> None:
    """Add a forward pass that modules of experts may run. Without it: 4-bit experts could not be run."""
    _find("integrations.moe", "ALL_EXPERTS_FUNCTIONS")[name] = function


def experts_run_by(module: Any, function: str) -> PretrainedConfig:
    """Let one module of experts run a registered function, whatever the rest of the model runs.

    It gets a configuration of its own; the one that it had is returned.
    """
    before = module.config
    module.config = deepcopy(before)
    module.config._experts_implementation = function
    return before


def bitsandbytes_quantizer() -> type[Any]:
    """transformers' quantizer for bitsandbytes' 4 bits, which tells a subclass what it is doing by three methods.

    `before_loading(model, files)` comes when the model is on `meta` and its linear layers are replaced,
    `after_loading(model)` when all is loaded, `before_dequantising(model, dtype)` before linear layers get their 16-bit
    weights. Without it: 4-bit experts could not be loaded.
    """
    base: Any = _find("quantizers.quantizer_bnb_4bit", "Bnb4BitHfQuantizer")

    class Quantizer(base):
        def _process_model_before_weight_loading(
            self, model: Any, device_map: Any = None, checkpoint_files: Any = None, **kwargs: Any
        ) -> None:
            super()._process_model_before_weight_loading(
                model, device_map=device_map, checkpoint_files=checkpoint_files, **kwargs
            )
            self.before_loading(model, checkpoint_files or ())

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            model = super()._process_model_after_weight_loading(model, **kwargs)
            self.after_loading(model)
            return model

        def _dequantize(self, model: Any, dtype: Any = None) -> Any:
            self.before_dequantising(model, dtype)
            return super()._dequantize(model, dtype=dtype)

    return Quantizer


def replace_bitsandbytes_quantizer(quantizer: type[Any]) -> None:
    """Let `from_pretrained` use another in its place. Without it: 4-bit experts could not be loaded."""
    _find("quantizers.auto", "AUTO_QUANTIZER_MAPPING")["bitsandbytes_4bit"] = quantizer


def conversion_base() -> type[Any]:
    """The class of an operation on stored tensors. Without it: 4-bit experts could not be loaded."""
    return _find("core_model_loading", "ConversionOps")


def conversion(patterns: list[str], target: str, operation: Any) -> Any:
    """The conversion of the stored tensors of several patterns to one parameter, by one operation."""
    return _find("core_model_loading", "WeightConverter")(patterns, target, [operation])


# -- what bitsandbytes replaces, and what can be loaded after that


def conv1d() -> Any:
    """GPT-2's linear layer, whose weight is (in, out). Without it: its layers would not be found."""
    return _find("pytorch_utils", "Conv1D")


def quantiser_takes(model: PreTrainedModel, skipped: list[str] | None) -> Callable[[str], bool]:
    """Whether transformers' quantisers would replace the linear layer of a name. Without it: wrong layers are 4-bit.

    `skipped` are the names and patterns that config.json excepts, None for transformers' own choice. They decide before
    weights are tied: `model` must be one that never was.
    """
    quantiser = _find("quantizers.base", "HfQuantizer")
    skip = _attribute(quantiser, "get_modules_to_not_convert", "HfQuantizer.get_modules_to_not_convert")
    in_float32 = _attribute(model, "_keep_in_fp32_modules", "PreTrainedModel._keep_in_fp32_modules")
    left = skip(model, skipped, list(in_float32 or ()))
    convert = _find("quantizers.quantizers_utils", "should_convert_module")
    return lambda name: convert(name, left)


def is_replaced_when_quantised(module_class: str) -> bool:
    """Whether transformers builds other modules in the place of a class's when weights are quantised by bitsandbytes.

    Without it: models that can't be loaded would be written.
    """
    from transformers.utils.quantization_config import QuantizationMethod

    patch = _find("quantizers.base", "MODULES_TO_PATCH_FOR_QUANTIZATION").get(module_class)
    return patch is not None and QuantizationMethod.BITS_AND_BYTES in patch["quantization_methods"]


def finds_statistics(parameter: str) -> bool:
    """Whether transformers assigns what is stored beside a 4-bit weight to that weight.

    Its patterns are the words alone (`serialized_names` of its bitsandbytes quantiser): a module that is itself called
    `…weight` is taken for the parameter. Without it: models that can't be loaded would be written.
    """
    converter = _find("core_model_loading", "WeightConverter")
    patterns = converter(["weight.quant_map", "weight"], "weight", [_find("core_model_loading", "Concatenate")()])
    target, *_ = _find("core_model_loading", "rename_source_key")(f"{parameter}.quant_map", [], [patterns])
    return target == parameter


# -- training


def attention_support(model_class: Any) -> AttentionSupport:
    """Which implementations a class says that it supports. Without it: all would be eager."""
    return AttentionSupport(
        model=model_class.__name__,
        flash=_supports(model_class, "_supports_flash_attn"),
        sdpa=_supports(model_class, "_supports_sdpa"),
    )


def _supports(model_class: Any, name: str) -> bool:
    from transformers import PreTrainedModel

    _attribute(PreTrainedModel, name, f"PreTrainedModel.{name}")
    return bool(getattr(model_class, name, False))  # an auto class has none of these


def set_attention_implementation(config: Any, implementation: str) -> None:
    """Let a built model attend as an implementation that is registered. Without it: memory is not simulated for it."""
    config._attn_implementation_internal = implementation


def checkpoint_activations(model: Any, *, use_reentrant: bool) -> None:
    """Turn gradient checkpointing on. transformers renames the method: the old name goes in its release 6."""
    options = {"use_reentrant": use_reentrant}
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # older releases have the old name alone
        enable = _attribute(model, "gradient_checkpointing_enable", "PreTrainedModel.gradient_checkpointing_enable")
    enable(options)


@contextmanager
def layer_hooks(layer: Any, before: Callable[[Any], None], after: Callable[[Any], None]) -> Iterator[None]:
    """Call `before` with the hidden states that enter a decoder layer, and `after` with what it returns.

    Older releases checkpoint a layer's `__call__`, hooks of the module and all; newer ones its `forward`, as FSDP needs
    it. Without it: with 5.17, no estimate of training memory where checkpointing is re-entrant, as it has no gradients.
    """
    from torch import nn

    if type(layer).__call__ is nn.Module.__call__ or not layer.gradient_checkpointing:
        entering = layer.register_forward_pre_hook(
            lambda _, args, kwargs: before(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        leaving = layer.register_forward_hook(lambda _, __, output: after(output))
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()
        return
    checkpoint = layer._gradient_checkpointing_func

    def hooked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before(args[0])
        output = checkpoint(function, *args, **kwargs)
        after(output)
        return output

    layer._gradient_checkpointing_func = hooked
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint


def wrap_checkpointed(model: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap what gradient checkpointing runs, and runs again in the backward pass. Checkpointing must be on.

    Without it: no estimate of training memory with gradient checkpointing under autocast.
    """
    modules = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    if not modules:
        raise _gone("GradientCheckpointingLayer._gradient_checkpointing_func")
    for module in modules:
        module._gradient_checkpointing_func = _wrapping(module._gradient_checkpointing_func, wrap)


def _wrapping(checkpoint: Callable[..., Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    return lambda function, *args, **kwargs: checkpoint(wrap(function), *args, **kwargs)


# -- GGUF


def gguf_is_readable() -> bool:
    """Whether transformers finds the `gguf` package, in a version that it can use."""
    return _find("utils.import_utils", "is_gguf_available")()


def gguf_processor(architecture: str, settings: Mapping[str, Any]) -> Any:
    """What undoes llama.cpp's changes of an architecture's tensors; `settings` are those of the model's configuration.

    Without it, or `gguf_names`: most GGUF files could not be read.
    """
    module = "modeling_gguf_pytorch_utils"
    return _find(module, "TENSOR_PROCESSORS").get(architecture, _find(module, "TensorProcessor"))(config=settings)


def gguf_names(model: PreTrainedModel, processor: Any) -> Mapping[str, str]:
    """The names that transformers looks for in a GGUF file, and the parameters that they become."""
    import gguf

    find, build = _find("modeling_gguf_pytorch_utils", "get_gguf_hf_weights_map"), gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(build)  # it is asked for the same table at every module of the model
    try:
        return find(model, processor)
    finally:
        gguf.get_tensor_name_map = build


def gguf_transforms(architecture: str, config: PretrainedConfig) -> list[Any] | None:
    """The renamings and conversions of an architecture that is loaded as safetensors are; None for all others.

    Without it: newer architectures could not be read.
    """
    if not _find("integrations.gguf.utils", "is_gguf_arch_supported")(architecture):
        return None
    return _find("integrations.gguf.utils", "get_gguf_conversion_mapping")(architecture, config)


def dequantise_gguf(blocks: Tensor, ggml_type: str) -> Tensor | None:
    """Blocks (uint8) as those architectures are decoded: straight to bfloat16; None for a type that is refused there.

    Without it: they would be decoded with other roundings.
    """
    import torch

    names: dict[int, str] = _find("integrations.gguf.dequant", "GGML_NAME")
    number = next((number for number, name in names.items() if name == ggml_type), None)
    if number is None:
        return None
    return _find("integrations.gguf.dequant", "dequantize")(blocks, number, torch.bfloat16)
