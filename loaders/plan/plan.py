"""The plan: every file and tensor that will be written, every decision, and the totals, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from ..adapter.peft_lora import adapter_steps
from ..adapter.peft_matching import Peft
from ..adapter.targets import ALL_LINEAR, Targets, resolve_targets
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tensors import DTYPE_CODES, TORCH_NAMES
from ..decision import Decision
from ..errors import MissingRequirementError, ResourceError, UsageError, said_by
from ..flags.request import Request
from ..liger import liger_kernels
from ..model.components import LinearLayer
from ..model.skeleton import Skeleton
from ..model.tensor_map import ModelTensor
from ..nf4.quantise import Quantize
from ..steps.plain import Grow
from ..steps.step import OutputTensor, Step
from ..system.attention import Attention, resolve_attention
from ..system.limits import usable_processors
from .output_files import OutputFile, divide, output_file, unchanged_files

if TYPE_CHECKING:
    from ..strategy import Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Whether Liger has kernels for this architecture, and which ones are applied on loading."""

    supported: bool
    applied: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How much of the weight matrices outside embeddings and head is 4-bit."""

    percent: float
    """Of their parameters, or of their bytes before quantisation, which is the same."""
    left: tuple[OutputTensor, ...]
    """Those that are not."""

    def left_by_component(self) -> dict[str, list[OutputTensor]]:
        """Component to its matrices that stay as they are, by name."""
        groups: dict[str, list[OutputTensor]] = {}
        for tensor in self.left:
            groups.setdefault(tensor.component, []).append(tensor)
        return dict(sorted(groups.items()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What `prepare` will write. Execution consumes it and changes nothing."""

    request: Request
    strategy: Strategy
    checkpoint: Checkpoint
    skeleton: Skeleton
    steps: tuple[Step, ...]
    """All tensors of the base, whether they are written or not."""
    base: Literal["copy", "reference"]
    model_files: tuple[OutputFile, ...]
    """Empty when the base is referenced."""
    adapter_file: OutputFile | None
    targets: Targets | None
    quantization_config: dict[str, Any] | None
    coverage: Coverage | None
    """None where nothing is to be 4-bit."""
    attention: Attention
    kernels: Kernels | None
    workers: int
    """Threads that carry out steps."""
    chunk_bytes: int
    """What a step reads at once."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

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
        return self.checkpoint.weight_files if self.model_files else ()

    @property
    def memory_bytes(self) -> int:
        """What the steps that run at a time allocate at most, within the budget."""
        needs = [step.operation.memory(self.chunk_bytes) for file in self.files if file.layout for step in file.steps]
        return min(self.request.max_memory_bytes, sum(nlargest(self.workers, needs)))

    @property
    def encodes(self) -> bool:
        """Whether weights are quantised."""
        return any(isinstance(step.operation, Quantize) for step in self.steps)

    @property
    def grown(self) -> tuple[Grow, ...]:
        """The embeddings that get new rows."""
        return tuple(step.operation for step in self.steps if isinstance(step.operation, Grow))

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


def count_workers() -> int:
    """One more than processors: there is work for all of these while a worker waits for the disk."""
    return usable_processors() + 1


def make_plan(request: Request, strategy: Strategy, checkpoint: Checkpoint, skeleton: Skeleton) -> Plan:
    """Decide everything. Raises the error that executing the plan would run into, before anything is written."""
    decisions = list(request.decisions)
    warnings = [*request.warnings, *checkpoint.warnings, *skeleton.warnings]
    if skeleton.left_out is not None:
        decisions.append(skeleton.left_out.decision(type(skeleton.model).__name__))
    quantization_config = skeleton.stored_quantization or strategy.quantization_config()
    steps = tuple(_steps(strategy, skeleton.tensors))
    coverage = _coverage(skeleton, steps) if quantization_config is not None else None
    if coverage is not None:
        _check_coverage(request, coverage)
    base = _choose_base(request, strategy, checkpoint, skeleton, decisions)

    targets = adapter_file = None
    if strategy.has_adapter:
        four_bit = _four_bit_layers(skeleton, steps)
        layers = tuple(_seen_by_peft(layer, four_bit=layer.name in four_bit) for layer in skeleton.layers)
        targets = resolve_targets(
            layers,
            modules=(name for name, _ in skeleton.model.named_modules()),
            asked=request.lora_targets,
            fused_experts=bool(skeleton.fused_experts),
        )
        peft = Peft(
            model=skeleton.model, rank=request.lora_rank, alpha=request.lora_alpha, dropout=request.lora_dropout
        )
        targets = peft.confirm(targets, asked=request.lora_targets not in (None, (ALL_LINEAR,)), layers=layers)
        decisions += targets.decisions
        dtypes = {
            layer.name: _adapter_dtype(layer, strategy, skeleton, four_bit, quantization_config)
            for layer in targets.layers
        }
        adapter_file = output_file(
            "adapter/adapter_model.safetensors", adapter_steps(targets, rank=request.lora_rank, dtypes=dtypes)
        )

    attention = resolve_attention(type(skeleton.model), use_flash_attn=request.use_flash_attn)
    if attention.reason is not None:
        decisions.append(
            Decision(
                what="attention",
                requested=attention.requested,
                effective=attention.effective,
                reason=attention.reason,
            )
        )
    if skeleton.towers and not strategy.has_adapter:
        warnings.append(
            f"text gives no gradient to {', '.join(f'`{module}`' for module in skeleton.towers)}: training on text "
            "leaves them as they are"
        )
    kernels = _kernels(skeleton, decisions) if request.use_liger_kernel else None
    if coverage is not None and skeleton.fused_experts:
        warnings.append(
            f"{len(skeleton.fused_experts)} fused expert parameters stay 16-bit: bitsandbytes quantises linear layers "
            "only, and k-bit preparation makes them float32 in training"
        )
    workers = count_workers()
    chunk_bytes = min(_CHUNK_BYTES, max(_LEAST_CHUNK_BYTES, request.max_memory_bytes // (8 * workers)))
    model_files: tuple[OutputFile, ...] = ()
    if base == "copy":
        model_files = unchanged_files(checkpoint, steps, request.max_shard_bytes)
        if not model_files:
            model_files = divide(steps, request.max_shard_bytes)
            if request.base == "link":
                reason = "its tensors or their division into files change"
                decisions.append(Decision(what="base", requested="link", effective="copy", reason=reason))
    _check_memory(request, model_files, adapter_file, chunk_bytes)
    return Plan(
        request=request,
        strategy=strategy,
        checkpoint=checkpoint,
        skeleton=skeleton,
        steps=steps,
        base=base,
        model_files=model_files,
        adapter_file=adapter_file,
        targets=targets,
        quantization_config=quantization_config,
        coverage=coverage,
        attention=attention,
        kernels=kernels,
        workers=workers,
        chunk_bytes=chunk_bytes,
        decisions=tuple(decisions),
        warnings=tuple(warnings),
    )


_CHUNK_BYTES = 2 * 1024 * 1024
"""Small enough to stay in a processor's cache between reading, encoding and writing."""


_LEAST_CHUNK_BYTES = 64 * 1024


def _check_memory(
    request: Request, model_files: tuple[OutputFile, ...], adapter_file: OutputFile | None, chunk_bytes: int
) -> None:
    files = model_files if adapter_file is None else (*model_files, adapter_file)
    needs = [(step.operation.memory(chunk_bytes), step.outputs[0].name) for file in files for step in file.steps]
    need, name = max(needs, default=(0, ""))
    if need > request.max_memory_bytes:
        raise ResourceError(
            f"tensor `{name}` needs {need:,} bytes at once, `--max_memory` allows {request.max_memory_bytes:,}",
            hint=f"pass --max_memory {-(-need // 10**6)}MB or more",
        )


def _coverage(skeleton: Skeleton, steps: tuple[Step, ...]) -> Coverage:
    outputs = {output.name: output for step in steps for output in step.outputs}
    matrices = [
        outputs[tensor.name]
        for tensor in skeleton.tensors
        if len(tensor.shape) >= 2 and tensor.component not in ("embedding", "head", "norm")
    ]
    left = tuple(output for output in matrices if output.counted_as != "nf4")
    everything = sum(output.parameters for output in matrices)
    covered = everything - sum(output.parameters for output in left)
    return Coverage(percent=100 * covered / everything if everything else 0.0, left=left)


def _check_coverage(request: Request, coverage: Coverage) -> None:
    if coverage.percent < request.min_quantized:
        listed = ", ".join(
            f"{component} ({len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors):,} bytes)"
            for component, tensors in coverage.left_by_component().items()
        )
        raise MissingRequirementError(
            f"{coverage.percent:.1f} % of the weight matrices would be 4-bit, `--min_quantized` asks for "
            f"{request.min_quantized:g} %: bitsandbytes leaves {listed}",
            hint=f"pass --min_quantized {math.floor(coverage.percent)} to take that, or train with --use_lora",
        )


def _steps(strategy: Strategy, tensors: Iterable[ModelTensor]) -> Iterator[Step]:
    # what comes out of one conversion is written together
    for _, group in groupby(tensors, key=lambda tensor: id(tensor.conversion or tensor)):
        yield strategy.step(tuple(group))


def _choose_base(
    request: Request,
    strategy: Strategy,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    decisions: list[Decision],
) -> Literal["copy", "reference"]:
    if not strategy.has_adapter:
        return "copy"
    changes = _changes(request, strategy, checkpoint, skeleton)
    if request.base in ("copy", "link") or (request.base == "auto" and changes):
        return "copy"
    unusable = [change for change in changes if not change.startswith("dtype")]
    if unusable:
        raise UsageError(
            f"`--base reference`: the original can't serve as the base: {unusable[0]}", hint="use --base copy"
        )
    if changes:
        decisions.append(
            Decision(
                what="base_dtype", requested="bfloat16", effective=changes[0].removeprefix("dtype: "),
                reason="`--base reference` leaves the base as it is; `load_prepared` loads it as bfloat16",
            )
        )  # fmt: skip
    return "reference"


def _changes(request: Request, strategy: Strategy, checkpoint: Checkpoint, skeleton: Skeleton) -> list[str]:
    """Why the original can't be trained on as it stands."""
    changes = []
    if strategy.quantization_config() is not None:
        changes.append("it is quantised")
    if skeleton.rows_after != skeleton.rows_before:
        changes.append("its embeddings are resized")
    if checkpoint.source.kind == "gguf":
        changes.append("it is a GGUF file")
    if skeleton.left_out is not None:
        changes.append(f"it is a `{skeleton.left_out.whole}`")
    if checkpoint.pickled:
        changes.append("it is pickled")
    if request.config_name is not None or request.config_overrides:
        changes.append("its configuration is changed")
    if any(tensor.conversion is not None for tensor in skeleton.tensors):
        changes.append("its tensors are stored in another layout")
    dtypes = {source.dtype for tensor in skeleton.tensors for source in tensor.sources if source.dtype != tensor.dtype}
    if dtypes:
        changes.append(f"dtype: {' '.join(sorted(TORCH_NAMES[code] for code in dtypes))}")
    return changes


def _four_bit_layers(skeleton: Skeleton, steps: tuple[Step, ...]) -> frozenset[str]:
    """The names of the linear layers whose weights are 4-bit."""
    quantised = {output.name for step in steps for output in step.outputs if output.counted_as == "nf4"}
    return frozenset(
        tensor.linear.name for tensor in skeleton.tensors if tensor.linear is not None and tensor.name in quantised
    )


def _seen_by_peft(layer: LinearLayer, *, four_bit: bool) -> LinearLayer:
    """A layer as it is when PEFT wraps it: bitsandbytes has put its own, (out, in), in the place of a Conv1D."""
    return replace(layer, transposed=layer.transposed and not four_bit)


def _adapter_dtype(
    layer: LinearLayer,
    strategy: Strategy,
    skeleton: Skeleton,
    four_bit: frozenset[str],
    quantization: dict[str, Any] | None,
) -> str:
    """The dtype (safetensors code) that PEFT finds a layer to have: its weight's, or the compute dtype if 4-bit."""
    if quantization is not None and layer.name in four_bit:
        return DTYPE_CODES[quantization["bnb_4bit_compute_dtype"]]
    loaded = skeleton.model.get_parameter(f"{layer.name}.weight").dtype
    return DTYPE_CODES[strategy.training_dtype(str(loaded).removeprefix("torch."))]


def _kernels(skeleton: Skeleton, decisions: list[Decision]) -> Kernels:
    model_type = skeleton.config.model_type
    try:
        applied = liger_kernels(model_type)
        reason = None if applied else f"Liger has no kernels for `{model_type}`"
    except Exception as error:  # a missing or broken Triton raises whatever it likes
        applied, reason = (
            (),
            f"liger-kernel does not import: {said_by(error)}",
        )
    if reason is not None:
        decisions.append(Decision(what="use_liger_kernel", requested="true", effective="false", reason=reason))
    return Kernels(supported=bool(applied), applied=applied, reason=reason)
