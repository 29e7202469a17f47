"""The report of a run: what was asked, what was decided, and what was written.

Counts come from the plan, which is checked against the written headers before it is published. A parameter counts once:
two to a byte where weights are packed, tied weights once, the adapter included, buffers not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from math import prod
from typing import TYPE_CHECKING, Any

from ..adapter.targets import in_order
from ..checkpoint.formats.interface import PackedTensor
from ..checkpoint.tensors import DTYPE_CODES, TensorMeta
from ..merge.merge import MergedAdapter
from ..model.config import settings_hash
from ..plan.plan import Plan
from ..source.file_names import config_file_names, tokenizer_file_names
from ..steps.step import OutputTensor
from ..system.limits import peak_memory_bytes
from ..system.versions import ftload_version, versions
from . import document
from .document import SCHEMA_VERSION, Described, PlanDocument, Report, WrittenFile

if TYPE_CHECKING:
    from pathlib import Path

    from ..flags.declared import Arguments
    from ..write.written import Written


CONFIGURATIONS = ("config.json", "generation_config.json")
"""The files whose settings the report holds a hash of."""


def describe(plan: Plan) -> Described:
    """What is known of an output before anything is written: the larger part of its report."""
    source, tokenizer = plan.source, plan.tokenizer.facts()
    used = _used_files(plan)
    return Described(
        schema_version=SCHEMA_VERSION,
        ftload_version=ftload_version(),
        strategy=plan.strategy.name,
        source=document.Source(
            model=source.model,
            kind=source.kind,
            revision=source.revision,
            commit=source.commit,
            path=str(source.root) if source.kind != "hub" else None,
            architecture=type(plan.skeleton.model).__name__,
            model_type=plan.skeleton.config.model_type,
            files=tuple(
                document.SourceFile(path=file.path, bytes=file.bytes, sha256=file.sha256)
                for file in sorted(source.files, key=lambda file: file.path)
                if file.path in used
            ),
            stored=_source_totals(plan),
            license=source.license,
            merged=tuple(_merged_adapter(merged) for merged in plan.merged.adapters),
            cache=plan.request.source_cache if source.kind == "hub" and plan.files_read else None,
        ),
        arguments=reported_arguments(plan.request.arguments),
        base=plan.base,
        base_scanned=bool(plan.model_files),
        parameters=count_parameters(plan),
        embeddings=document.Embeddings(
            tokenizer_size=tokenizer["size"],
            rows_before=plan.skeleton.rows_before,
            rows_after=plan.skeleton.rows_after,
            resized=plan.skeleton.rows_after != plan.skeleton.rows_before,
            tied=plan.skeleton.tied,
            init=plan.request.embedding_init if plan.grown else None,
            pad_token_id=plan.padding.id,
        ),
        quantization=_quantization(plan),
        adapter=_adapter(plan),
        gradient_checkpointing=plan.request.gradient_checkpointing,
        attention=plan.attention,
        kernels=_kernels(plan),
        tokenizer=document.Tokenizer(class_=tokenizer.pop("class"), **tokenizer),
        decisions=plan.decisions,
        warnings=plan.warnings,
        versions=versions(),
        memory_budget_bytes=plan.request.max_memory_bytes,
    )


def build_report(
    plan: Plan,
    *,
    fingerprint: str,
    base: Path,
    files: tuple[WrittenFile, ...],
    timings: Mapping[str, float],
    written: Written,
) -> Report:
    """The report; `base` is the directory that holds the base's configuration, `files` what was written."""
    return Report(
        **_shared(describe(plan)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint,
        configuration={name: settings_hash(base / name) for name in CONFIGURATIONS},
        files=files,
        timings={stage: round(seconds, 3) for stage, seconds in timings.items()},
        work=document.Work(**{kind: round(seconds, 3) for kind, seconds in written.seconds.items()}),
        ranges=document.Ranges(bytes=written.ranges_bytes, compared=written.compared) if written.ranges_bytes else None,
        peak_anonymous_bytes=written.peak_anonymous_bytes,
        peak_rss_bytes=peak_memory_bytes(),
    )


def describe_plan(plan: Plan) -> PlanDocument:
    """What `ftload plan` says: what `describe` gives, the files to be written, and what writing them takes."""
    source = plan.checkpoint.source
    read = sum(file.bytes for file in source.files if file.path in plan.files_read)
    fetched = source.unfetched_bytes(plan.files_read)
    return PlanDocument(
        **_shared(describe(plan)),
        stored=tuple(
            document.StoredTotals(
                component=component, dtype=dtype, tensors=row.tensors, parameters=row.parameters, bytes=row.bytes
            )
            for component, tensors in _by(_stored(plan), "component").items()
            for dtype, row in _group(tensors).items()
        ),
        files=tuple(document.PlannedFile(path=file.path, bytes=file.size) for file in plan.files),
        needs=document.Needs(
            disk_bytes=plan.disk_bytes(plan.files),
            fetch_bytes=fetched,
            cached_bytes=read - fetched if source.commit is not None else 0,
            memory_bytes=plan.memory_bytes,
            read_bytes=read,
        ),
    )


def _shared(described: Described) -> dict[str, Any]:
    return {field.name: getattr(described, field.name) for field in dataclasses.fields(described)}


def reported_arguments(arguments: Arguments) -> dict[str, document.Argument]:
    """Every flag by name, as a report has it."""
    return {name: document.Argument(**flag) for name, flag in arguments.report().items()}


def _merged_adapter(merged: MergedAdapter) -> document.MergedAdapter:
    adapter = merged.adapter
    (file,) = (file for file in adapter.source.files if file.path == merged.file)
    return document.MergedAdapter(
        adapter=adapter.name,
        path=str(adapter.source.root) if adapter.source.kind != "hub" else None,
        commit=adapter.source.commit,
        base=adapter.base,
        base_revision=adapter.base_revision,
        tensors=merged.tensors,
        file=document.SourceFile(path=file.path, bytes=file.bytes, sha256=merged.sha256 or file.sha256),
    )


def _used_files(plan: Plan) -> set[str]:
    source = plan.source
    return {
        *config_file_names(source.files),
        *plan.checkpoint.weight_files,
        *tokenizer_file_names(source.files),
    }


def count_parameters(plan: Plan) -> document.Parameters:
    """The `parameters` section: totals, and by dtype and component.

    Bytes are those of the tensors' data; the JSON states of 4-bit weights count as file overhead, like headers.
    """
    adapter = list(plan.adapter_tensors())
    stored = _stored(plan)
    loaded = list(plan.loaded_tensors())
    own = [tensor for tensor in adapter if not tensor.shared]
    total = sum(tensor.parameters for tensor in (*loaded, *own))
    merged = _merged(plan, loaded)
    in_training = [*_in_training(plan, merged), *own]
    never_trained = frozenset(plan.skeleton.never_trained if plan.adapter is None else ())
    trained = [merged[name] for name in merged.keys() - never_trained] if plan.adapter is None else adapter
    trainable = sum(tensor.parameters for tensor in trained)
    return document.Parameters(
        total=total,
        trainable=trainable,
        frozen=total - trainable,
        trainable_percent=round(100 * trainable / total, 4) if total else 0.0,
        never_trained=tuple(sorted(never_trained)),
        by_dtype=_group(stored),
        in_training=_group(in_training),
        by_component={
            component: document.ComponentTotals(
                parameters=sum(tensor.parameters for tensor in tensors), bytes=data_bytes(tensors)
            )
            for component, tensors in _by(stored, "component").items()
        },
        towers={
            module: sum(
                prod(tensor.shape)
                for tensor in plan.skeleton.tensors
                if tensor.parameter.startswith(f"{module}.") and not tensor.buffer
            )
            for module in plan.skeleton.towers
        },
    )


def _stored(plan: Plan) -> list[OutputTensor]:
    """All that lies on disk, the parameters of what is stored twice and held once counted once."""
    adapter = (
        dataclasses.replace(tensor, parameters=0) if tensor.shared else tensor for tensor in plan.adapter_tensors()
    )
    return [*plan.stored_tensors(), *adapter]


def base_in_training(plan: Plan) -> tuple[OutputTensor, ...]:
    """The base's tensors as `load_prepared` returns them, by the model's own names."""
    return tuple(_in_training(plan, _merged(plan, plan.loaded_tensors())))


def data_bytes(tensors: Iterable[OutputTensor]) -> int:
    """The bytes of tensors' data; what counts as the file's overhead is left out."""
    return sum(tensor.nbytes for tensor in tensors if not tensor.overhead)


def _merged(plan: Plan, tensors: Iterable[OutputTensor]) -> dict[str, OutputTensor]:
    """`tensors` as the model holds them, by its own names: those that loading merges into one parameter, as one."""
    parameters = {tensor.name: tensor.parameter for tensor in plan.skeleton.tensors}
    merged: dict[str, OutputTensor] = {}
    for tensor in tensors:
        name = parameters.get(tensor.name, tensor.name)
        other = merged.get(name)
        if other is not None:
            elements = prod(other.shape) + prod(tensor.shape)
            tensor = dataclasses.replace(other, shape=(elements,), parameters=other.parameters + tensor.parameters)
        merged[name] = tensor
    return merged


def _in_training(plan: Plan, merged: Mapping[str, OutputTensor]) -> Iterator[OutputTensor]:
    quantisation, experts = plan.strategy.quantisation, {one.parameter: one for one in plan.skeleton.experts}
    for tensor in merged.values():
        dtype, fused = plan.strategy.training_dtype(tensor.counted_as), experts.get(tensor.part_of or "")
        if dtype != tensor.counted_as:
            yield dataclasses.replace(tensor, dtype=DTYPE_CODES[dtype], counted_as=dtype)
        else:
            yield tensor if quantisation is None or fused is None else quantisation.loaded(tensor, fused)


def _source_totals(plan: Plan) -> tuple[document.SourceTotals, ...]:
    """How the checkpoint stores what the model is made of."""
    sources = {
        stored.name: (stored, tensor.component)
        for tensor in plan.skeleton.tensors
        for source in tensor.sources
        for stored in source.taken_from
    }
    groups: dict[tuple[str, str | None, str], list[TensorMeta]] = {}
    for source, component in sources.values():
        form = source.format.name if isinstance(source, PackedTensor) and source.format is not None else None
        groups.setdefault((component, form, source.counted_as), []).append(source)
    return tuple(
        document.SourceTotals(
            component=component,
            format=form,
            dtype=dtype,
            tensors=len(group),
            parameters=sum(source.parameters for source in group),
            bytes=sum(source.stored_bytes for source in group),
        )
        for (component, form, dtype), group in sorted(groups.items(), key=lambda item: [*map(str, item[0])])
    )


def _group(tensors: list[OutputTensor]) -> dict[str, document.TensorTotals]:
    return {
        dtype: document.TensorTotals(
            tensors=sum(tensor.part_of is None for tensor in group),
            parameters=sum(tensor.parameters for tensor in group),
            bytes=data_bytes(group),
        )
        for dtype, group in _by(tensors, "counted_as").items()
    }


def _by(tensors: list[OutputTensor], attribute: str) -> dict[str, list[OutputTensor]]:
    groups: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, attribute), []).append(tensor)
    return dict(sorted(groups.items()))


def _quantization(plan: Plan) -> document.Quantization | None:
    quantisation, config, coverage = plan.strategy.quantisation, plan.quantization_config, plan.coverage
    if quantisation is None or config is None or coverage is None:
        return None
    block_size = next(
        (tensor.packed.tile for tensor in plan.skeleton.tensors if tensor.packed is not None),
        quantisation.block_size,
    )
    return document.Quantization(
        **quantisation.facts(config, block_size),
        coverage_percent=round(coverage.percent, 4),
        experts=len(plan.quantised_experts),
        not_quantized=tuple(
            document.NotQuantized(
                component=component,
                tensors=len(tensors),
                parameters=sum(tensor.parameters for tensor in tensors),
                bytes=data_bytes(tensors),
            )
            for component, tensors in coverage.left_by_component().items()
        ),
    )


def _adapter(plan: Plan) -> document.Adapter | None:
    if plan.adapter is None or plan.targets is None:
        return None
    return document.Adapter(
        **plan.adapter.facts(),
        targets={name: plan.targets.matches[name] for name in in_order(plan.targets.matches)},
        target_parameters={name: plan.targets.parameters[name] for name in in_order(plan.targets.parameters)},
        parameters=sum(tensor.parameters for tensor in plan.adapter_tensors()),
        dtype="float32",
        base=adapter_base(plan),
        revision=adapter_revision(plan),
    )


def _kernels(plan: Plan) -> document.Kernels | None:
    if plan.kernels is None:
        return None
    liger = plan.kernels
    return document.Kernels(
        liger=document.LigerKernels(supported=liger.supported, applied=liger.applied, reason=liger.reason)
    )


def adapter_base(plan: Plan) -> str:
    """What the adapter was made for: a hub id, the absolute path of a local model, or the output itself."""
    if plan.base == "copy":
        return str(plan.request.output)
    return plan.source.model if plan.source.kind == "hub" else str(plan.source.root)


def adapter_revision(plan: Plan) -> str | None:
    """The commit of that base, where it is on a hub."""
    return plan.source.commit if plan.base == "reference" else None
