"""Where model, tokenizer and configuration come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..checkpoint.trained_adapter import find_trained_adapter
from ..errors import CheckpointError, OutputError, SourceError
from ..flags.request import Request
from ..merge.adapter import TrainedAdapter, find_adapter
from ..model.gguf.checkpoint import GgufModel, read_gguf
from ..source.resolve import resolve_source
from ..source.source import Source
from ..tokenizer.tokenizer import resolve_tokenizer_source


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where everything comes from."""

    model: Source
    tokenizer: Source
    config: Source
    """Of the configuration: the model, or what `--config_name` names."""
    tokenizer_name: str
    adapters: tuple[TrainedAdapter, ...] = ()
    """Those that are merged into the model, in order."""
    warnings: tuple[str, ...]

    @cached_property
    def trained_adapter(self) -> str | None:
        """The configuration of a trained adapter beside the model; read once, however many plans are made."""
        return find_trained_adapter(self.model)

    @cached_property
    def gguf(self) -> GgufModel | None:
        """The header of the GGUF file that the model is; read once."""
        return None if self.model.gguf_file is None else read_gguf(self.model)

    @property
    def all(self) -> tuple[Source, ...]:
        """Each of them, the model first."""
        return self.model, self.tokenizer, self.config, *(adapter.source for adapter in self.adapters)


def resolve_sources(request: Request) -> Sources:
    """Find the model, adapters, the tokenizer and the configuration. Raises `SourceError` for what is not there."""
    adapters = tuple(find_adapter(name) for name in request.merge_adapters)
    model = _resolve_model(request, adapters)
    # that of the last training wins
    trained = next((adapter.tokenizer for adapter in reversed(adapters) if adapter.tokenizer is not None), model)
    options = request.tokenizer
    name, revision, warnings = resolve_tokenizer_source(
        tokenizer_name_or_path=options.tokenizer_name_or_path,
        tokenizer_revision=options.tokenizer_revision,
        tokenizer_name=options.tokenizer_name,
        model=trained.model,
        model_revision=trained.revision,
    )
    same = (name, revision) == (trained.model, trained.revision)
    tokenizer = trained if same else resolve_source(name, revision)
    config = model if request.config_name is None else resolve_source(request.config_name, request.revision)
    kept = {
        "the model itself": model.root,
        "the tokenizer itself": tokenizer.root,
        "the configuration itself": config.root,
        **{f"the adapter `{adapter.name}`": adapter.source.root for adapter in adapters},
        "the current directory": Path.cwd(),
        "your home": Path.home(),
    }
    for what, path in kept.items():
        # an output is renamed into place as a whole: what stood there before, with all that is in it, is deleted
        if path.resolve().is_relative_to(request.output.resolve()):
            raise OutputError(f"`{request.output}` is or holds {what}", hint="choose another --output_dir")
    return Sources(
        model=model, tokenizer=tokenizer, config=config, tokenizer_name=name, adapters=adapters, warnings=warnings
    )


def _resolve_model(request: Request, adapters: tuple[TrainedAdapter, ...]) -> Source:
    """The model that is named, or else the base of the first adapter."""
    if request.model is not None:
        return _kept(request, resolve_source(request.model, request.revision))
    first = adapters[0]
    if first.base is None:
        raise CheckpointError(f"the adapter `{first.name}` does not name its base", hint="name it with --model")
    try:
        return _kept(request, resolve_source(first.base, request.revision or first.base_revision))
    except SourceError as error:
        raise SourceError(
            f"the base of the adapter `{first.name}`: {error.message}", hint="name it with --model, wherever it is now"
        ) from error


def _kept(request: Request, source: Source) -> Source:
    return replace(source, cached=request.source_cache == "hub" or source.kind != "hub")
