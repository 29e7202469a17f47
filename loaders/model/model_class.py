"""Which of transformers' classes a checkpoint is loaded as: `AutoModelForCausalLM`'s choice."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, said_by
from ..source.source import Source
from .transformers_internals import bare_names, causal_class, causal_names, is_causal, multimodal_class, remote_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedAs:
    """A class and the configuration that it takes."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    whole: LoadedAs | None = None
    """The multimodal model that the checkpoint holds, where only its language model is loaded."""


def choose_class(source: Source, config: PretrainedConfig, *, trust_remote_code: bool) -> LoadedAs:
    """The class that `AutoModelForCausalLM` would choose (transformers, models/auto/auto_factory.py).

    Where that class is a language model and the configuration that of a multimodal one, it gets the part for text.
    Raises `CheckpointError` for what is not a causal language model, and for code that was not allowed.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    native = is_causal(config)
    if "AutoModelForCausalLM" in auto_map and (trust_remote_code or not native):
        if not trust_remote_code:
            raise CheckpointError(
                f"`{source.model}` needs code of its own",
                hint="pass --trust_remote_code if you trust it",
            )
        try:
            remote = remote_class(auto_map["AutoModelForCausalLM"], source.root)
        except (OSError, ImportError, AttributeError) as error:
            raise CheckpointError(f"the model's own code can't be used: {said_by(error)}") from error
        return LoadedAs(model_class=cast("type[PreTrainedModel]", remote), config=config)
    architectures: Any = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError("`config.json`: `architectures` is not a list of names")
    model_class = native_class(config)
    whole = None
    if model_class is not None and model_class.config_class == config.sub_configs.get("text_config"):
        whole = LoadedAs(model_class=multimodal_class(config), config=config)
    known = causal_names() | bare_names() | ({whole.model_class.__name__} if whole is not None else set())
    if model_class is None or (architectures and known.isdisjoint(architectures)):
        what = architectures[0] if architectures else config.model_type
        raise CheckpointError(
            f"`{source.model}` is a `{what}`, not a causal language model",
            hint="ftload prepares what AutoModelForCausalLM can load",
        )
    return LoadedAs(model_class=model_class, config=config if whole is None else _text_config(config), whole=whole)


def native_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """transformers' causal language model for a configuration, None where it has none.

    Where `AutoModelForCausalLM` does not find it (see `unknown_to_auto`), it is the one that config.json names.
    """
    import transformers

    if is_causal(config):
        return causal_class(config)
    for name in causal_names().intersection(config.architectures or ()):
        named = getattr(transformers, name)
        if named.config_class is type(config):
            return named
    return None


def unknown_to_auto(config: PretrainedConfig) -> bool:
    """Whether `AutoModelForCausalLM` has no class for this configuration.

    That of Mllama's language model is such a one: it is found in the multimodal checkpoint, but not by itself.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    return not is_causal(config) and "AutoModelForCausalLM" not in auto_map


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    text = deepcopy(config.get_text_config())
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    return text
