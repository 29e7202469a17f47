"""config.json and generation_config.json: as they are found, and as they will be written."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.json_files import fetch_config
from ..flags.request import Request
from ..model.config import generation_of, load_config, load_generation_config
from ..model.skeleton import Skeleton
from .sources import Sources
from .vocabulary import Padding, set_padding

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Configuration:
    """The model's settings as they are found."""

    config: PretrainedConfig
    """With the user's `additional_model_arguments`."""
    generation: GenerationConfig
    warnings: tuple[str, ...]


def read_configuration(request: Request, sources: Sources) -> Configuration:
    """Read the settings of the model, or those that `--config_name` names; code of their own comes with them.

    Raises `CheckpointError` for what is malformed or unknown, and for code that was not allowed.
    """
    model, gguf = sources.model, sources.gguf
    named = model if request.config_name is None else sources.config
    for source in {source.root: source for source in (model, named) if source.gguf_file is None}.values():
        fetch_config(source)
        if request.trust_remote_code:
            source.fetch(file.path for file in source.files if file.path.endswith(".py"))
    generation = load_generation_config(model.root) if gguf is None else generation_of(gguf.config()[0])
    if gguf is not None and named is model:
        config, warnings = gguf.config(request.config_overrides)
    else:
        config, warnings = load_config(
            named.root, overrides=request.config_overrides, trust_remote_code=request.trust_remote_code
        )
    return Configuration(config=config, generation=generation, warnings=warnings)


def final_config(skeleton: Skeleton, padding: Padding, quantization: dict[str, Any] | None) -> PretrainedConfig:
    """config.json as it will be written."""
    config = deepcopy(skeleton.config)
    if padding.id is not None:
        set_padding(config, padding.id)
    config.dtype = skeleton.model.dtype  # its first parameter's, as `save_pretrained` writes it: not always bfloat16
    config.architectures = [type(skeleton.model).__name__]
    if quantization is not None:
        config.quantization_config = quantization
    return config


def final_generation_config(configuration: Configuration, padding: Padding) -> GenerationConfig:
    """generation_config.json as it will be written."""
    generation = deepcopy(configuration.generation)
    if padding.id is not None:
        generation.pad_token_id = padding.id
    return generation
