"""Making a plan: everything is decided here, from headers, and whatever would fail later fails here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ..adapter.interface import Adapter
from ..decision import Decision
from ..errors import ResourceError
from ..flags.request import Request
from ..liger import resolve_kernels
from ..merge.merge import Merge
from ..model.skeleton import Skeleton
from ..model.tensor_map import ModelTensor
from ..model.transformers_internals import attention_support
from ..strategy import STRATEGIES
from ..system.attention import resolve_attention
from ..system.limits import usable_processors
from ..tokenizer.tokenizer import PreparedTokenizer
from .adapted import AdaptedBase, adapter_file, choose_targets
from .base import Base, choose_base
from .configuration import Configuration, final_config, final_generation_config
from .coverage import check_coverage, coverage_of
from .output_files import OutputFile, divide, unchanged_files
from .plan import Plan, quantised_experts, quantised_layers
from .sources import Sources
from .vocabulary import check_rows, check_turns, follow_tokenizer


def make_plan(
    request: Request,
    sources: Sources,
    configuration: Configuration,
    tokenizer: PreparedTokenizer,
    merged: Merge,
    skeleton: Skeleton,
) -> Plan:
    """Decide everything. Raises the error that carrying out the plan would run into, before anything is written."""
    checkpoint, quantization_config = merged.checkpoint, skeleton.stored_quantization
    strategy = STRATEGIES[request.strategy].configured(request, quantization_config)
    row_warnings = check_rows(
        tokenizer_size=tokenizer.facts()["size"],
        before=skeleton.rows_before,
        after=skeleton.rows_after,
        tokenizer_is_named=sources.tokenizer is not sources.model,
    )
    decisions = [*request.decisions, *merged.decisions]
    warnings = [*request.warnings, *checkpoint.warnings, *skeleton.warnings]
    if skeleton.left_out is not None:
        decisions.append(skeleton.left_out.decision(type(skeleton.model).__name__))

    groups = tuple((group, strategy.step(group)) for group in _groups(skeleton.tensors))
    steps = tuple(step for _, step in groups)
    quantisation = strategy.quantisation
    if quantisation is not None:
        quantization_config = quantisation.config(quantization_config)
    coverage = None
    quantised = quantised_layers(strategy, skeleton, steps)
    packed = quantised_experts(strategy, skeleton, steps)
    if quantisation is not None:
        outputs = (output for step in steps for output in step.outputs)
        coverage = coverage_of(skeleton, outputs, quantisation.tag)
        check_coverage(request, coverage, found_quantised=checkpoint.stays_packed)

    adapter, targets, adapter_weights = strategy.adapter(request), None, None
    base: Base = "copy"
    if adapter is not None:
        base, base_decisions = choose_base(
            request, checkpoint, skeleton, quantised=quantisation is not None, changed=adapter.changes_base
        )
        decisions += base_decisions
        tokenizer_size = tokenizer.facts()["size"]
        adapted = AdaptedBase(
            strategy=strategy,
            skeleton=skeleton,
            groups=groups,
            is_written=base == "copy",
            quantised_layers=quantised,
            quantised_experts=packed,
            quantization_config=quantization_config,
            new_tokens=range(skeleton.rows_before, tokenizer_size),
        )
        adapter, targets = choose_targets(request, adapted, adapter)
        decisions += targets.decisions
        warnings += targets.warnings
        if adapter.changes_base:
            warnings.append(
                "the base lacks what the adapter starts from: it alone is not the original model any more. "
                "`init_lora_weights` of adapter_config.json is true on purpose: PEFT would take it out once more"
            )
        adapter_weights = adapter_file(adapted, adapter, targets)

    attention = resolve_attention(attention_support(type(skeleton.model)), use_flash_attn=request.use_flash_attn)
    decisions += attention.decisions
    if skeleton.towers and adapter is None:
        warnings.append(
            f"text gives no gradient to {', '.join(f'`{module}`' for module in skeleton.towers)}: training on text "
            "leaves them as they are"
        )
    kernels = resolve_kernels(skeleton.config.model_type) if request.use_liger_kernel else None
    if kernels is not None:
        decisions += kernels.decisions
    if coverage is not None:
        warnings += _left_experts(request, skeleton, packed)

    model_files: tuple[OutputFile, ...] = ()
    if base == "copy":
        if adapter is None or not adapter.changes_base:
            model_files = unchanged_files(checkpoint, steps, request.max_shard_bytes)
        if not model_files:
            model_files = divide(steps, request.max_shard_bytes)
            if request.base == "link":
                reason = "its tensors or their division into files change"
                decisions.append(Decision(what="base", requested="link", effective="copy", reason=reason))
    link = request.base == "link"
    taken_over = [file.path for file in model_files if file.layout is None]
    if link and not checkpoint.source.cached and not checkpoint.source.is_here(taken_over):
        link, reason = False, "with `--source_cache none` its files are not on this disk"
        decisions.append(Decision(what="base", requested="link", effective="copy", reason=reason))
    workers = count_workers()
    chunk_bytes = choose_chunk_bytes(workers, request.max_memory_bytes)
    is_remote = not checkpoint.source.cached and not checkpoint.source.is_here(checkpoint.weight_files)
    read_ahead_bytes = min(_READ_AHEAD_BYTES, request.max_memory_bytes // 4) if is_remote else 0
    _check_memory(
        request, (*model_files, *((adapter_weights,) if adapter_weights else ())), chunk_bytes, read_ahead_bytes
    )

    turn_warnings = check_turns(tokenizer, configuration.generation.eos_token_id)
    padding = follow_tokenizer(tokenizer.tokenizer, skeleton, configuration, request, base)
    rows = adapter.facts()["settings"].get("trainable_token_indices") if adapter is not None else None
    if rows is not None and padding.id is not None and rows == [padding.id]:
        warnings.append(f"the only row that is trained, {padding.id}, is that of padding, which gets no gradient")
    return Plan(
        request=request,
        strategy=strategy,
        sources=sources,
        configuration=configuration,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        merged=merged,
        skeleton=skeleton,
        steps=steps,
        base=base,
        link=link,
        model_files=model_files,
        adapter=adapter,
        targets=targets,
        adapter_file=adapter_weights,
        config=final_config(skeleton, padding, quantization_config),
        generation_config=final_generation_config(configuration, padding),
        padding=padding,
        quantization_config=quantization_config,
        coverage=coverage,
        attention=attention,
        kernels=kernels,
        workers=workers,
        chunk_bytes=chunk_bytes,
        read_ahead_bytes=read_ahead_bytes,
        decisions=(
            *_source_decisions(request, sources, adapter, base),
            *tokenizer.decisions,
            *padding.decisions,
            *decisions,
        ),
        warnings=(
            *checkpoint.source.notes,
            *sources.warnings,
            *configuration.warnings,
            *tokenizer.warnings,
            *row_warnings,
            *turn_warnings,
            *padding.warnings,
            *warnings,
        ),
    )


def count_workers() -> int:
    """One more than processors: there is work for all of these while a worker waits for the disk."""
    return usable_processors() + 1


def choose_chunk_bytes(workers: int, max_memory_bytes: int) -> int:
    """What a step reads at once: more with many workers, within an eighth of the budget for all of them.

    A worker holds the interpreter's lock for up to 0.2 ms a chunk, and needs 1.6 ms for one of 2 MiB: more than eight
    workers would wait for each other.
    """
    wanted = _CHUNK_BYTES * min(max(1, workers // _WORKERS_A_CHUNK), _MOST_CHUNKS)
    return min(wanted, max(_LEAST_CHUNK_BYTES, max_memory_bytes // (8 * workers)))


_CHUNK_BYTES = 2 * 1024 * 1024
"""Small enough to stay in a processor's cache between reading, encoding and writing."""
_LEAST_CHUNK_BYTES = 64 * 1024
_WORKERS_A_CHUNK = 4
_MOST_CHUNKS = 2
_READ_AHEAD_BYTES = 256 * 1024 * 1024
"""Of weights on a hub: eight requests of 32 MiB at once. No more than a quarter of `--max_memory`."""


def _groups(tensors: Iterable[ModelTensor]) -> Iterator[tuple[ModelTensor, ...]]:
    """What comes out of one conversion is written together."""
    for _, group in groupby(tensors, key=lambda tensor: id(tensor.conversion or tensor)):
        yield tuple(group)


def _left_experts(request: Request, skeleton: Skeleton, quantised: frozenset[str]) -> Iterator[str]:
    """A warning about fused experts that are not quantised."""
    left = [name for name in skeleton.fused_experts if name not in quantised]
    if not left:
        return
    reason = "in a layout that ftload can't quantise"
    if not request.quantize_experts:
        reason = "as --quantize_experts false asks"
    yield (
        f"{len(left)} fused expert parameters (`{left[0]}`) stay 16-bit, {reason}: k-bit preparation makes them "
        "float32 in training"
    )


def _source_decisions(request: Request, sources: Sources, adapter: Adapter | None, base: Base) -> Iterator[Decision]:
    """What is left aside of the model's source."""
    if base == "reference" and not sources.model.cached:
        yield Decision(
            what="source_cache",
            requested="none",
            effective="hub, in training",
            reason=f"the adapter refers to `{sources.model.model}`, which comes into the cache when it is loaded",
        )
    if sources.model.kind != "hub" and request.revision is not None:
        yield Decision(
            what="model_revision", requested=request.revision, effective="none",
            reason="the model is local: it has no revisions",
        )  # fmt: skip
    trained = None if sources.adapters else sources.trained_adapter
    for merged in sources.adapters[:1]:
        if request.model is not None and merged.base not in (None, request.model, str(sources.model.root)):
            yield Decision(
                what="model",
                requested=merged.base,
                effective=request.model,
                reason=f"`{merged.base}` is the base that the adapter `{merged.name}` names; --model takes another",
            )
    if trained is not None:
        yield Decision(
            what="adapter",
            requested=f"the one in `{sources.model.model}`",
            effective="none" if adapter is None else "a fresh one",
            reason=f"`{trained}` belongs to a trained adapter, which only --merge_adapter merges",
        )


def _check_memory(request: Request, files: Iterable[OutputFile], chunk_bytes: int, read_ahead_bytes: int) -> None:
    """Raise `ResourceError` where one step takes more than `--max_memory` allows beside what is read ahead."""
    needs = [(step.operation.memory(chunk_bytes), step.outputs[0].name) for file in files for step in file.steps]
    need, name = max(needs, default=(0, ""))
    if need + read_ahead_bytes > request.max_memory_bytes:
        enough = need if not read_ahead_bytes else min(need + _READ_AHEAD_BYTES, need * 4 // 3 + 1)
        ahead = f" and {read_ahead_bytes:,} for reading ahead" if read_ahead_bytes else ""
        raise ResourceError(
            f"tensor `{name}` needs {need:,} bytes at once{ahead}, `--max_memory` allows {request.max_memory_bytes:,}",
            hint=f"pass --max_memory {-(-enough // 10**6)}MB or more",
        )
