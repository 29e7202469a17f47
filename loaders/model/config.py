"""The model's configuration and generation settings, read as transformers reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, FtloadError, said_by
from ..system.quiet import quiet_transformers
from .transformers_internals import generation_of_config

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import GenerationConfig, PretrainedConfig


def load_config(
    root: Path, *, overrides: Mapping[str, Any], trust_remote_code: bool
) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """Read a `config.json` through transformers and apply `overrides`; the second value is warnings.

    Raises `CheckpointError` for an unknown or malformed configuration, and for code that was not allowed.
    """
    from transformers import AutoConfig

    def read() -> PretrainedConfig:
        return AutoConfig.from_pretrained(root, trust_remote_code=trust_remote_code, **overrides)

    return _made(read, overrides, root / "config.json")


def config_of(
    settings: Mapping[str, Any], *, overrides: Mapping[str, Any], shown: Path
) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """As `load_config`, of what a `config.json` would hold; `shown` is the file that messages name."""
    from transformers import CONFIG_MAPPING

    def make() -> PretrainedConfig:
        return CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings), **overrides)

    return _made(make, overrides, shown)


def _made(
    make: Callable[[], PretrainedConfig], overrides: Mapping[str, Any], shown: Path
) -> tuple[PretrainedConfig, tuple[str, ...]]:
    import torch
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_transformers():
            config = make()
    except (
        ValueError,
        LookupError,
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
        raise _remote_code_error(error, shown.parent) or CheckpointError(
            f"`{shown}` can't be used: {said_by(error)}", hint=hint
        ) from error
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(f"`{shown}`: `dtype` is `{config.dtype}`, which is none")
    unknown = [name for name in overrides if not hasattr(config, name)]
    return config, tuple(f"`additional_model_arguments`: the configuration has no `{name}`" for name in unknown)


def load_generation_config(root: Path) -> GenerationConfig:
    """The generation settings as `from_pretrained` finds them: their own file, else what `config.json` still holds.

    Raises `CheckpointError` for values of the wrong type.
    """
    from transformers import GenerationConfig

    with quiet_transformers():
        try:
            return GenerationConfig.from_pretrained(root)
        except OSError:
            return generation_of_config(root)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"`{root / 'generation_config.json'}` can't be used: {said_by(error)}",
                hint="correct it, or delete it: training does without",
            ) from error


def generation_of(config: PretrainedConfig) -> GenerationConfig:
    """The generation settings of a model that has no file of them: what its configuration says of generation."""
    from transformers import GenerationConfig

    with quiet_transformers():
        return GenerationConfig.from_model_config(config)


_NO_SETTING = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype"})
"""Keys of a configuration that change nothing: who wrote it from where, and a dtype that loading always gives anew."""


def settings_hash(path: Path) -> str | None:
    """The sha256 of what a JSON file of settings says, in whatever order and layout; None where there is no file.

    Versions, paths and dtypes have no part in it. Raises `ValueError` for what is not JSON.
    """
    if not path.is_file():
        return None
    settings = _settings(json.loads(path.read_text(encoding="utf-8")))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differing_settings(one: PretrainedConfig, other: PretrainedConfig) -> list[str]:
    """The names of settings that differ; versions, paths, dtypes and the class aside."""
    values = [{**_settings(config.to_dict()), "architectures": None} for config in (one, other)]
    return sorted(name for name in values[0] | values[1] if values[0].get(name) != values[1].get(name))


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _settings(inner) for key, inner in value.items() if key not in _NO_SETTING}
    if isinstance(value, list):
        return [_settings(inner) for inner in value]
    return value


def _remote_code_error(error: Exception, root: Path) -> FtloadError | None:
    if "trust_remote_code" in str(error):
        return CheckpointError(f"`{root}` needs code of its own", hint="pass --trust_remote_code if you trust it")
    return None
