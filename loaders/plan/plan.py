"""The plan: every file and tensor that will be written, every decision, and the totals, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import nlargest
from math import prod
from typing import TYPE_CHECKING, Any

from ..adapter.interface import Adapter
from ..adapter.targets import Targets
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tensors import TORCH_NAMES, TensorMeta
from ..decision import Decision
from ..flags.request import Request
from ..liger import Kernels
from ..merge.merge import Merge
from ..model.skeleton import Skeleton
from ..source.source import Source
from ..steps.coverage import Coverage
from ..steps.plain import Grow
from ..steps.step import OutputTensor, Step
from ..strategy import Strategy
from ..system.attention import Attention
from ..tokenizer.tokenizer import PreparedTokenizer
from .base import Base
from .configuration import Configuration
from .output_files import OutputFile
from .sources import Sources
from .vocabulary import Padding

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What will be written. Execution consumes it and changes nothing."""

    request: Request
    strategy: Strategy
    sources: Sources
    """As the user named them; the checkpoint may lie elsewhere, for a GGUF file."""
    configuration: Configuration
    tokenizer: PreparedTokenizer
    checkpoint: Checkpoint
    merged: Merge
    """The trained adapters that are in the checkpoint's tensors."""
    skeleton: Skeleton
    steps: tuple[Step, ...]
    """All tensors of the base, whether they are written or not."""
    base: Base
    link: bool
    """Whether files that are taken over whole are hard-linked."""
    model_files: tuple[OutputFile, ...]
    """Empty when the base is referenced."""
    adapter: Adapter | None
    targets: Targets | None
    """None where there is no adapter."""
    adapter_file: OutputFile | None
    config: PretrainedConfig
    """config.json as it will be written, with the base."""
    generation_config: GenerationConfig
    padding: Padding
    quantization_config: dict[str, Any] | None
    """The part of config.json; None for 16-bit weights."""
    coverage: Coverage[OutputTensor] | None
    """None where nothing is to be quantised."""
    attention: Attention
    kernels: Kernels | None
    workers: int
    """Threads that carry out steps."""
    chunk_bytes: int
    """What a step reads at once."""
    read_ahead_bytes: int
    """What is held of weights on a hub that are not kept in its cache; 0 for all others."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def decide(self, *decisions: Decision) -> Plan:
        """The same plan with more decisions: on what only the machine that carries it out knows."""
        return replace(self, decisions=(*self.decisions, *decisions))

    @property
    def source(self) -> Source:
        """The model, as the user named it."""
        return self.sources.model

    @property
    def files(self) -> tuple[OutputFile, ...]:
        """Every safetensors file."""
        return self.model_files if self.adapter_file is None else (*self.model_files, self.adapter_file)

    @property
    def copied_files(self) -> tuple[OutputFile, ...]:
        """The checkpoint's own files that are taken over whole."""
        return tuple(file for file in self.model_files if file.layout is None)

    @property
    def files_read(self) -> tuple[str, ...]:
        """The checkpoint's files whose weights are read."""
        of_adapter = self.adapter is not None and self.adapter.reads_base
        return self.checkpoint.weight_files if self.model_files or of_adapter else ()

    @property
    def files_in_order(self) -> tuple[str, ...]:
        """The checkpoint's files, as the tensors of the model need them."""
        needed = (part.file for parts in self.stored_parts.values() for part in parts)
        return tuple(dict.fromkeys((*needed, *self.checkpoint.weight_files)))

    @property
    def stored_parts(self) -> dict[str, tuple[TensorMeta, ...]]:
        """The stored tensors that each tensor of the base is made from, by its name, in the model's order."""
        return {
            tensor.name: tuple(part for source in tensor.sources for part in source.stored_in)
            for tensor in self.skeleton.tensors
        }

    def disk_bytes(self, files: Iterable[OutputFile]) -> int:
        """What some of its files take on the disk: linked ones nothing."""
        return sum(file.size for file in files if not (self.link and file.layout is None))

    @property
    def memory_bytes(self) -> int:
        """What the steps that run at a time allocate at most, within the budget."""
        needs = [step.operation.memory(self.chunk_bytes) for file in self.files if file.layout for step in file.steps]
        return min(self.request.max_memory_bytes, sum(nlargest(self.workers, needs)) + self.read_ahead_bytes)

    @property
    def encodes(self) -> bool:
        """Whether weights are quantised, rather than taken over as they are."""
        return any(step.encodes for step in self.steps)

    @property
    def grown(self) -> tuple[Grow, ...]:
        """The embeddings that get new rows."""
        return tuple(step.operation for step in self.steps if isinstance(step.operation, Grow))

    @property
    def quantised_layers(self) -> frozenset[str]:
        """The names of the linear layers whose weights are quantised."""
        return quantised_layers(self.strategy, self.skeleton, self.steps)

    @property
    def quantised_experts(self) -> frozenset[str]:
        """The fused parameters of experts that are quantised."""
        return quantised_experts(self.strategy, self.skeleton, self.steps)

    def loaded_tensors(self) -> Iterator[OutputTensor]:
        """The base's tensors in the dtypes that they are loaded with."""
        for step in self.steps:
            yield from step.outputs

    def stored_tensors(self) -> Iterator[OutputTensor]:
        """The base's tensors as they lie on disk, in the output or in the base that is referenced."""
        if self.base == "copy":
            yield from self.loaded_tensors()
            return
        for tensor in self.skeleton.tensors:
            for source in tensor.sources if tensor.conversion is None else ():
                yield OutputTensor(
                    name=source.name, shape=source.shape, dtype=source.dtype, component=tensor.component,
                    counted_as=TORCH_NAMES[source.dtype],
                    parameters=0 if tensor.buffer else prod(source.shape),
                )  # fmt: skip

    def adapter_tensors(self) -> Iterator[OutputTensor]:
        """The adapter's tensors."""
        for step in self.adapter_file.steps if self.adapter_file is not None else ():
            yield from step.outputs


def quantised_layers(strategy: Strategy, skeleton: Skeleton, steps: tuple[Step, ...]) -> frozenset[str]:
    """The names of the linear layers whose weights these steps quantise, or find quantised."""
    weights = _quantised(strategy, steps)
    return frozenset(
        tensor.linear.name for tensor in skeleton.tensors if tensor.linear is not None and tensor.name in weights
    )


def quantised_experts(strategy: Strategy, skeleton: Skeleton, steps: tuple[Step, ...]) -> frozenset[str]:
    """The fused parameters of experts that these steps quantise, or find quantised."""
    weights = _quantised(strategy, steps)
    return frozenset(fused.parameter for fused in skeleton.experts if fused.parameter in weights)


def _quantised(strategy: Strategy, steps: tuple[Step, ...]) -> frozenset[str]:
    """The names of the tensors that these steps write quantised."""
    if strategy.quantisation is None:
        return frozenset()
    tag = strategy.quantisation.tag
    return frozenset(output.name for step in steps for output in step.outputs if output.counted_as == tag)
