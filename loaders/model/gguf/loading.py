"""How transformers makes parameters of the tensors of a GGUF file: its own code for that, in one shape.

Most architectures are loaded by `modeling_gguf_pytorch_utils.py`, some by a weight mapping (`integrations/gguf`), which
decodes straight to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol

from ...checkpoint.formats.gguf import decode_blocks
from ..transformers_internals import WeightMapping, dequantise_gguf, gguf_names, gguf_processor, gguf_transforms

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class GgufLoading(Protocol):
    """How transformers makes parameters of the tensors of a GGUF file."""

    def parameter(self, name: str) -> str | None:
        """The parameter that a tensor becomes, or is a part of; None for a tensor that is not known."""
        ...

    def sources(self, parameter: str) -> list[str]:
        """The tensors that a parameter is made of, as far as that is known; `.weight` may be missing."""
        ...

    def decode(self, blocks: Tensor, ggml_type: str) -> Tensor:
        """The values of whole blocks (uint8), flat. Raises `LookupError` or `NotImplementedError` where it can't."""
        ...

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, by their names in the file, to parameters."""
        ...


def gguf_loading(architecture: str, settings: Mapping[str, Any], model: PreTrainedModel) -> GgufLoading:
    """The way for an architecture; `settings` are those of the configuration, `model` has no weights."""
    transforms = gguf_transforms(architecture, model.config)
    return _Processed(architecture, settings, model) if transforms is None else _Mapped(transforms, model)


class _Processed:
    """As `load_gguf_checkpoint` does it: a table of names, and a processor of the architecture's own."""

    def __init__(self, architecture: str, settings: Mapping[str, Any], model: PreTrainedModel) -> None:
        self._processor = gguf_processor(architecture, settings)
        self._names = gguf_names(model, self._processor)
        self._parameters = {stem(name): parameter for name, parameter in self._names.items()}

    def parameter(self, name: str) -> str | None:
        return self._parameters.get(stem(name))

    def sources(self, parameter: str) -> list[str]:
        return [name for name, known in self._names.items() if known == parameter]

    def decode(self, blocks: Tensor, ggml_type: str) -> Tensor:
        return decode_blocks(blocks, ggml_type)

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        loaded: dict[str, Tensor] = {}
        for name, value in values.items():
            done = self._processor.process(
                value.numpy(), name, tensor_key_mapping=self._names, parsed_parameters={"tensors": loaded}
            )
            if done.name in self._names:  # else it has put it into `loaded` itself
                loaded[self._names[done.name]] = torch.from_numpy(done.weights)
        return loaded


class _Mapped:
    """By a weight mapping, as safetensors are loaded, with a decoder of transformers' own."""

    def __init__(self, transforms: list[Any], model: PreTrainedModel) -> None:
        self._mapping = WeightMapping(model, transforms)
        self._model = model

    def parameter(self, name: str) -> str:
        return self._mapping.target(name)[0]

    def sources(self, parameter: str) -> list[str]:
        return []

    def decode(self, blocks: Tensor, ggml_type: str) -> Tensor:
        import torch

        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(ggml_type)
        if plain is not None:
            return blocks.view(plain)
        values = dequantise_gguf(blocks, ggml_type)
        return decode_blocks(blocks, ggml_type) if values is None else values

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        converters: dict[str, Any] = {}
        for name, value in values.items():
            parameter, pattern = self._mapping.target(name)
            if pattern is None:
                loaded[parameter] = value
                continue
            converter = converters.setdefault(parameter, deepcopy(self._mapping.by_pattern[pattern]))
            converter.add_tensor(parameter, name, pattern, value)
        for parameter, converter in converters.items():
            done = converter.convert(parameter, model=self._model, config=self._model.config)
            loaded |= {name: made[0] if isinstance(made, list) else made for name, made in done.items()}
        return loaded


def stem(name: str) -> str:
    """A name as it can be compared: transformers' table has the names of fused experts without their `.weight`."""
    return name.removesuffix(".weight")
