"""A trained adapter of 4-bit experts, written for the 16-bit model, which has one parameter for all experts of a layer.

The same numbers lie in another order: in what PEFT loads by `target_parameters`, A has one expert's rows after
another's, and in B the experts' columns take turns (peft/tuners/lora/layer.py, `ParamWrapper.get_delta_factors`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter.experts import Experts
from .adapter.targets import Targets, is_match, lora_names
from .checkpoint.checkpoint import Checkpoint, open_checkpoint
from .checkpoint.json_files import fetch_config
from .checkpoint.plain import PlainReader
from .checkpoint.tensors import TORCH_NAMES, TensorMeta
from .errors import CheckpointError, FtloadError
from .merge.adapter import AdapterWeights, TrainedAdapter, find_adapter, open_weights
from .merge.changes import Changed, ExpertLayers, LowRank
from .merge.peft_layers import find_changes
from .model.config import load_config
from .model.experts.fused import find_experts
from .model.skeleton import load_headers
from .plan.output_files import OutputFile, output_file
from .progress import Stopwatch
from .report.metadata_files import json_text
from .report.outputs import check_output
from .source.file_names import ADAPTER_CONFIGS, ADAPTER_FILE
from .source.resolve import resolve_source
from .source.source import Source
from .steps.step import Inputs, OutputTensor, Sink, Step
from .system.durable import disk_errors, sync_file
from .system.quiet import quiet_transformers
from .write.file_writer import FileWriter, check_written
from .write.staging import staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedAdapter:
    """What was written."""

    directory: str
    base: str
    """The model that it is for: a hub id, or an absolute path."""
    revision: str | None
    """The commit of that model, on a hub."""
    target_parameters: Mapping[str, int]
    """Pattern to the number of fused parameters."""
    tensors: int
    parameters: int


def fuse(adapter: str, base: str, revision: str | None, output: Path, progress: Progress) -> FusedAdapter:
    """Write `adapter` (directory or hub id), whose experts are layers, into `output` for `base`, the model in 16 bits.

    Everything else of it stays as it is. It has no dropout any longer: PEFT refuses that for parameters. Memory holds
    the adapter of one parameter at a time. Raises `CheckpointError` for an adapter without layers of experts, or whose
    experts differ in rank or scale, and what `find_adapter` and reading the model raise.
    """
    check_output(output, overwrite=False)
    watch = Stopwatch(progress)
    with watch.stage("headers"):
        source = resolve_source(base, revision)
        fetch_config(source)
        checkpoint = open_checkpoint(source, allow_pickle=False, dequantize=True)
        weights = open_weights(find_adapter(adapter), headers_only=False)
    with watch.stage("plan"):
        model = _model(checkpoint)
        experts = {fused.parameter: fused for fused in find_experts(model)}
        changes = find_changes(model, weights)
        layers = {name: _layers(weights.adapter, changed, experts[name].experts) for name, changed in _split(changes)}
        if not layers:
            raise CheckpointError(
                f"the adapter `{adapter}` has no layers of experts",
                hint="PEFT takes it as it is, for the model in 16 bits too",
            )
        targets = Experts.of((experts[name] for name in layers), ()).added_to(
            Targets(patterns=(), layers=(), matches={}, decisions=()), modules=()
        )
        config = _config(weights.adapter, changes, layers, targets, source)
        file = output_file(ADAPTER_FILE, tuple(_steps(weights, layers, targets)))
    with staged(output) as staging, disk_errors(output):
        check_output(output, overwrite=False)
        staging.stage.mkdir()
        with watch.stage("write"):
            _write(file, staging.stage, Inputs(checkpoint=checkpoint, chunk_bytes=0, watch=watch))
            (staging.stage / ADAPTER_CONFIGS[0]).write_text(json_text(config), encoding="utf-8")
        with watch.stage("check"):
            _check(checkpoint, staging.stage, layers)
        for path in (*staging.stage.iterdir(), staging.stage):
            sync_file(path)
        staging.publish(overwrite=False)
    outputs = [output for step in file.steps for output in step.outputs]
    return FusedAdapter(
        directory=str(output), base=config["base_model_name_or_path"], revision=config["revision"],
        target_parameters=dict(targets.parameters), tensors=len(outputs),
        parameters=sum(output.parameters for output in outputs),
    )  # fmt: skip


def _model(checkpoint: Checkpoint) -> PreTrainedModel:
    with quiet_transformers():
        config, _ = load_config(checkpoint.source.root, overrides={}, trust_remote_code=False)
    return load_headers(checkpoint, config, trust_remote_code=False, headers_only=True).model


def _split(changes: Mapping[str, Changed]) -> Iterator[tuple[str, ExpertLayers]]:
    """The parameters whose experts were layers, in the model's order."""
    for name, changed in changes.items():
        if isinstance(changed.change, ExpertLayers):
            yield name, changed.change


def _layers(adapter: TrainedAdapter, change: ExpertLayers, count: int) -> tuple[LowRank, ...]:
    """All experts' layers; raises `CheckpointError` unless each has one, of the same rank and scale, without DoRA."""
    layers = tuple(change.layers[number] for number in sorted(change.layers))
    name = layers[0].factors.tensors[0].name
    problem = None
    if len(layers) != count:
        problem = f"{count - len(layers)} of {count} experts have none"
    elif any(layer.dora for layer in layers):
        problem = "it has DoRA's magnitudes"
    elif len({(layer.factors.tensors[0].shape, layer.scaling) for layer in layers}) > 1:
        problem = "its experts differ in rank or scale"
    if problem is not None:
        raise CheckpointError(
            f"the adapter `{adapter.name}` can't be written for 16 bits: {problem} (`{name}`)",
            hint="leave out --adapter_only to merge it into the model",
        )
    return layers


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fuse:
    """The factors of all experts of a parameter, put together."""

    layers: tuple[LowRank, ...]
    names: tuple[str, str]

    def memory(self, chunk_bytes: int) -> int:
        """All B, and all of them once more in their new order."""
        return sum(12 * tensor.parameters for layer in self.layers for tensor in layer.factors.tensors)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """A one after another; B (out × rank) of all experts to (out × rank · experts)."""
        import torch

        of_b = []
        for layer in self.layers:
            a, b = layer.factors.read()
            sink.write(self.names[0], a)
            of_b.append(b)
        sink.write(self.names[1], torch.stack(of_b, dim=-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Keep:
    """A tensor as it is stored."""

    reader: PlainReader
    tensor: TensorMeta

    def memory(self, chunk_bytes: int) -> int:
        """The tensor."""
        return self.tensor.nbytes

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Copy it."""
        sink.write(self.tensor.name, self.reader.values(self.tensor, 0, self.tensor.parameters))


def _steps(weights: AdapterWeights, layers: Mapping[str, tuple[LowRank, ...]], targets: Targets) -> Iterator[Step]:
    taken = {tensor.name for parts in layers.values() for layer in parts for tensor in layer.factors.tensors}
    for name, tensor in weights.tensors.items():
        if name not in taken:
            yield Step(
                operation=_Keep(reader=weights.reader, tensor=tensor),
                outputs=(_output(name, tensor.shape, tensor.dtype),),
            )
    for target in targets.fused:
        parts = layers[target.experts.parameter]
        (rank, ins), (outs, _) = (tensor.shape for tensor in parts[0].factors.tensors)
        a, b = lora_names(target.name)
        yield Step(
            operation=_Fuse(layers=parts, names=(a, b)),
            outputs=(_output(a, (rank * len(parts), ins), "F32"), _output(b, (outs, rank * len(parts)), "F32")),
        )


def _output(name: str, shape: tuple[int, ...], dtype: str) -> OutputTensor:
    return OutputTensor(
        name=name, shape=shape, dtype=dtype, component="adapter", counted_as=TORCH_NAMES[dtype], parameters=prod(shape)
    )


def _config(
    adapter: TrainedAdapter,
    changes: Mapping[str, Changed],
    layers: Mapping[str, tuple[LowRank, ...]],
    targets: Targets,
    source: Source,
) -> dict[str, Any]:
    """adapter_config.json: that of the adapter, with parameters in the place of the layers of experts."""
    config = dict(adapter.config)
    others = [name.removesuffix(".weight") for name in changes if name not in layers]
    for key in ("rank_pattern", "alpha_pattern"):
        kept = (config.get(key) or {}).items()
        config[key] = {
            pattern: value for pattern, value in kept if any(re.match(rf"(.*\.)?({pattern})$", name) for name in others)
        }
    named = config.get("target_modules")
    if isinstance(named, list):
        config["target_modules"] = sorted(name for name in named if any(is_match(other, (name,)) for other in others))
    for pattern in targets.parameters:
        matched = {
            (layer.factors.tensors[0].shape[0], layer.scaling)
            for parameter, parts in layers.items()
            if is_match(parameter, (pattern,))
            for layer in parts
        }
        if len(matched) > 1:
            raise CheckpointError(
                f"the adapter `{adapter.name}` can't be written for 16 bits: ranks or scales of `{pattern}` differ "
                "between layers",
                hint="leave out --adapter_only to merge it into the model",
            )
        ((rank, scaling),) = matched
        alpha = scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
        if rank != config.get("r"):
            config["rank_pattern"][pattern] = rank
        if not math.isclose(alpha, config.get("lora_alpha") or 0):
            config["alpha_pattern"][pattern] = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
    return {
        **config,
        "base_model_name_or_path": source.model if source.kind == "hub" else str(source.root),
        "lora_dropout": 0.0,
        "revision": source.commit,
        "target_parameters": sorted({*(config.get("target_parameters") or ()), *targets.parameters}),
    }


def _write(file: OutputFile, directory: Path, inputs: Inputs) -> None:
    assert file.layout is not None
    progress = inputs.watch.progress
    progress.expect(bytes=file.size, tensors=sum(len(step.outputs) for step in file.steps))
    writer = FileWriter(
        file, file.layout, directory, inputs.watch, lambda count: progress.advance(bytes=count, tensors=0)
    )
    try:
        for step in file.steps:
            step.operation.run(inputs, writer)
            progress.advance(bytes=0, tensors=len(step.outputs))
        writer.write_head()
        writer.close()
    finally:
        writer.abandon()
    check_written(file, writer.path)


def _check(checkpoint: Checkpoint, directory: Path, layers: Mapping[str, tuple[LowRank, ...]]) -> None:
    """Raise `CheckpointError` unless PEFT loads what was written, with the same rank and scale for each parameter."""
    problem = None
    try:
        written = find_changes(_model(checkpoint), open_weights(find_adapter(str(directory)), headers_only=True))
        for parameter, parts in layers.items():
            change = written.get(parameter, Changed()).change
            rank = parts[0].factors.tensors[0].shape[0]
            same = isinstance(change, LowRank) and (
                change.experts == len(parts)
                and change.factors.tensors[0].shape[0] == rank * len(parts)
                and math.isclose(change.scaling, parts[0].scaling)
            )
            if not same:
                problem = f"it scales `{parameter}` otherwise, or does not adapt it"
                break
    except FtloadError as error:
        problem = error.message
    if problem is not None:
        raise CheckpointError(
            f"PEFT does not load the written adapter as it was: {problem}",
            hint="leave out --adapter_only to merge it into the model",
        )
