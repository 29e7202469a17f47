"""The report: what was asked, what was decided, and what was written. Its schema is `report.schema.json`.

Counts come from the plan, which is checked against the written headers before it is published. A parameter counts once:
two to a byte where weights are packed, tied weights once, the adapter included, buffers not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from math import prod
from typing import TYPE_CHECKING, Any

from . import nf4
from .checkpoint import DTYPE_CODES
from .environment import ftload_version, peak_memory_bytes, versions
from .nf4 import STATE_SUFFIX
from .operations import OutputTensor
from .plan import Plan

if TYPE_CHECKING:
    from .arguments import Arguments
    from .source import Source
    from .stream import Written

SCHEMA_VERSION = "1"
REPORT_FILE = "ftload_report.json"


def build_report(
    plan: Plan,
    *,
    arguments: Arguments,
    making: str,
    source: Source,
    source_files: Iterable[str],
    tokenizer: Mapping[str, Any],
    warnings: Iterable[str],
    decisions: Iterable[Any],
    files: list[dict[str, Any]],
    timings: Mapping[str, float],
    written: Written,
) -> dict[str, Any]:
    """The report as JSON values.

    `making` is the output's fingerprint; `source_files` are those that were used, `files` those that were written.
    """
    known = {file.path: file for file in source.files}
    return {
        "schema_version": SCHEMA_VERSION,
        "ftload_version": ftload_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": making,
        "strategy": plan.strategy.name,
        "source": {
            "model": source.model,
            "kind": source.kind,
            "revision": source.revision,
            "commit": source.commit,
            "path": str(source.root) if source.kind != "hub" else None,
            "architecture": type(plan.skeleton.model).__name__,
            "model_type": plan.skeleton.config.model_type,
            "files": [
                {"path": name, "bytes": known[name].bytes, "sha256": known[name].sha256}
                for name in sorted(source_files)
                if name in known
            ],
        },
        "arguments": arguments.report(),
        "base": plan.base,
        "parameters": count_parameters(plan),
        "embeddings": {
            "tokenizer_size": tokenizer["size"],
            "rows_before": plan.skeleton.rows_before,
            "rows_after": plan.skeleton.rows_after,
            "resized": plan.skeleton.rows_after != plan.skeleton.rows_before,
            "tied": plan.skeleton.tied,
            "init": plan.request.embedding_init if plan.grown else None,
        },
        "quantization": _quantization(plan),
        "adapter": _adapter(plan, source),
        "gradient_checkpointing": plan.request.gradient_checkpointing,
        "attention": dataclasses.asdict(plan.attention),
        "kernels": None if plan.kernels is None else {"liger": dataclasses.asdict(plan.kernels)},
        "tokenizer": dict(tokenizer),
        "decisions": [dataclasses.asdict(decision) for decision in decisions],
        "warnings": list(warnings),
        "files": files,
        "versions": versions(),
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
        "work": {kind: round(seconds, 3) for kind, seconds in written.seconds.items()},
        "memory_budget_bytes": plan.request.max_memory_bytes,
        "peak_anonymous_bytes": written.peak_anonymous_bytes,
        "peak_rss_bytes": peak_memory_bytes(),
    }


def count_parameters(plan: Plan) -> dict[str, Any]:
    """The `parameters` section: totals, and by dtype and component.

    Bytes are those of the tensors' data; the JSON states of 4-bit weights count as file overhead, like headers.
    """
    adapter = list(plan.adapter_tensors())
    stored = [*plan.stored_tensors(), *adapter]
    loaded = list(plan.loaded_tensors())
    base = sum(tensor.parameters for tensor in loaded)
    total = base + sum(tensor.parameters for tensor in adapter)
    trainable = sum(tensor.parameters for tensor in adapter) if plan.strategy.has_adapter else total
    in_training = [
        *(_in_training(tensor, plan.strategy.training_dtype(tensor.counted_as)) for tensor in _merged(plan, loaded)),
        *adapter,
    ]
    return {
        "total": total,
        "trainable": trainable,
        "frozen": total - trainable,
        "trainable_percent": round(100 * trainable / total, 4) if total else 0.0,
        "by_dtype": _group(stored),
        "in_training": _group(in_training),
        "by_component": {
            component: {
                "parameters": sum(tensor.parameters for tensor in tensors),
                "bytes": data_bytes(tensors),
            }
            for component, tensors in _by(stored, "component").items()
        },
    }


def data_bytes(tensors: Iterable[OutputTensor]) -> int:
    """The bytes of tensors' data, the JSON states of 4-bit weights aside."""
    return sum(tensor.nbytes for tensor in tensors if not tensor.name.endswith(STATE_SUFFIX))


def _merged(plan: Plan, tensors: Iterable[OutputTensor]) -> Iterator[OutputTensor]:
    """`tensors` as the model holds them: those that loading merges into one parameter, as one."""
    parameters = {tensor.name: tensor.parameter for tensor in plan.skeleton.tensors}
    merged: dict[str, OutputTensor] = {}
    for tensor in tensors:
        name = parameters.get(tensor.name, tensor.name)
        other = merged.get(name)
        if other is not None:
            elements = prod(other.shape) + prod(tensor.shape)
            tensor = dataclasses.replace(other, shape=(elements,), parameters=other.parameters + tensor.parameters)
        merged[name] = tensor
    yield from merged.values()


def _in_training(tensor: OutputTensor, dtype: str) -> OutputTensor:
    if dtype == tensor.counted_as:
        return tensor
    return dataclasses.replace(tensor, dtype=DTYPE_CODES[dtype], counted_as=dtype)


def _group(tensors: list[OutputTensor]) -> dict[str, dict[str, int]]:
    return {
        dtype: {
            # a 4-bit weight is one tensor, whatever it is stored in
            "tensors": sum(1 for tensor in group if dtype != "nf4" or tensor.parameters),
            "parameters": sum(tensor.parameters for tensor in group),
            "bytes": data_bytes(group),
        }
        for dtype, group in _by(tensors, "counted_as").items()
    }


def _by(tensors: list[OutputTensor], attribute: str) -> dict[str, list[OutputTensor]]:
    groups: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, attribute), []).append(tensor)
    return dict(sorted(groups.items()))


def _quantization(plan: Plan) -> dict[str, Any] | None:
    config, coverage = plan.quantization_config, plan.coverage
    if config is None or coverage is None:
        return None
    return {
        "method": "bitsandbytes",
        "quant_type": config["bnb_4bit_quant_type"],
        "double_quant": config["bnb_4bit_use_double_quant"],
        "block_size": next(
            (tensor.packed.block_size for tensor in plan.skeleton.tensors if tensor.packed is not None), nf4.BLOCK
        ),
        "compute_dtype": config["bnb_4bit_compute_dtype"],
        "storage_dtype": config["bnb_4bit_quant_storage"],
        "coverage_percent": round(coverage.percent, 4),
        "not_quantized": [
            {
                "component": component,
                "tensors": len(tensors),
                "parameters": sum(tensor.parameters for tensor in tensors),
                "bytes": data_bytes(tensors),
            }
            for component, tensors in coverage.left_by_component().items()
        ],
    }


def _adapter(plan: Plan, source: Source) -> dict[str, Any] | None:
    if plan.targets is None:
        return None
    return {
        "r": plan.request.lora_rank,
        "alpha": plan.request.lora_alpha,
        "dropout": plan.request.lora_dropout,
        "targets": dict(plan.targets.hits),
        "parameters": sum(tensor.parameters for tensor in plan.adapter_tensors()),
        "dtype": "float32",
        "base": adapter_base(plan, source),
        "revision": source.commit if plan.base == "reference" else None,
    }


def adapter_base(plan: Plan, source: Source) -> str:
    """What the adapter was made for: a hub id, the absolute path of a local model, or the output itself."""
    if plan.base == "copy":
        return str(plan.request.output)
    return source.model if source.kind == "hub" else str(source.root)
