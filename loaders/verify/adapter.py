"""Whether a prepared adapter, its configuration and its base belong together."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..adapter.adapted_model import StoredTensor
from ..adapter.peft_lora import PeftLora
from ..adapter.peft_variant import PeftVariant
from ..adapter.targets import Targets, count_matches, is_match, resolve_targets
from ..checkpoint.tensors import TORCH_NAMES
from ..plan.adapted import AdaptedBase
from ..report.document import Adapter
from ..report.rebased import stale_base
from ..source.resolve import resolve_source
from ..strategy import STRATEGIES
from .adapter_values import check_initial_values
from .files import Context


def check_adapter(context: Context) -> Iterator[str]:
    """Whether adapter_config.json, the adapter's tensors and the base's layers fit each other and the report."""
    expected = context.report.adapter
    if expected is None:
        context.found = "none"
        return
    parameters = sum(expected.target_parameters.values())
    experts = "" if expected.experts_r is None else f", of experts {expected.experts_r},"
    context.found = f"rank {expected.r}{experts} on {sum(expected.targets.values())} layers" + (
        f" and {parameters} parameters" if parameters else ""
    )
    if context.report.base == "reference":
        yield from _check_base(context, expected)
    stale = stale_base(context.report, context.root)
    if stale is not None:
        context.notes = (
            f"the adapter names `{stale}` as its base, and lies here: `load_prepared` knows, PEFT alone does not; "
            f"`ftload verify --fix {shlex.quote(str(context.root))}` makes it name this directory",
        )
    if PeftVariant(plain=_plain(expected), settings=expected.settings).changes_base != expected.changes_base:
        yield f"`changes_base` is `{expected.changes_base}`, which its `init_lora_weights` does not say"
    if expected.changes_base and context.report.base == "reference":
        yield f"its initial values were taken out of its base, and `{expected.base}` is the original"
    config = json.loads((context.root / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    adapter, targets = _described(context, expected, config)
    for pattern in dict.fromkeys((*expected.targets, *(targets.matches if expected.settings else ()))):
        hits, said = targets.matches.get(pattern, 0), expected.targets.get(pattern, 0)
        if hits != said:
            yield f"`{pattern}` hits {hits} layers, the report says {said}"
    for pattern, said in expected.target_parameters.items():
        hits = targets.parameters.get(pattern, 0)
        if hits != said:
            yield f"`{pattern}` hits {hits} parameters, the report says {said}"
    yield from _check_settings(config, adapter.config(targets, base=expected.base, revision=expected.revision))
    yield from _check_tensors(context, expected, _stored(adapter, targets))
    yield from check_initial_values(context, adapter, targets)


def _plain(expected: Adapter) -> PeftLora:
    return PeftLora(rank=expected.r, experts_rank=expected.experts_r, alpha=expected.alpha, dropout=expected.dropout)


def _described(
    context: Context, expected: Adapter, config: Mapping[str, Any]
) -> tuple[PeftLora | PeftVariant, Targets]:
    """The adapter that the report describes, and what it adapts of the base, experts in 4 bits as layers.

    Of anything but a plain one, PEFT is asked once more, about the base as it lies here.
    """
    skeleton, plain = context.skeleton, _plain(expected)
    packed = frozenset(tensor.parameter for tensor in skeleton.tensors if tensor.packed is not None)
    base = AdaptedBase(
        strategy=STRATEGIES[context.report.strategy],
        skeleton=skeleton,
        groups=(),
        is_written=context.report.base == "copy",
        quantised_layers=frozenset(layer.name for layer in skeleton.layers if f"{layer.name}.weight" in packed),
        quantised_experts=packed,
        quantization_config=skeleton.stored_quantization,
        new_tokens=range(0),
    )
    experts, modules = base.experts, tuple(name for name, _ in skeleton.model.named_modules())
    regex = expected.settings.get("target_modules")
    if regex is not None:
        targets = Targets(patterns=(regex,), layers=(), matches={}, decisions=())
    else:
        of_experts = experts.layers() if expected.experts_r is not None else ()
        names = tuple(expected.targets)
        if expected.settings:
            # the report does not say which names hit nothing that is left
            names += tuple(name for name, hits in count_matches(base.layers, config["target_modules"]).items() if hits)
        asked = tuple(name for name in names if not any(is_match(layer.name, (name,)) for layer in of_experts))
        targets = resolve_targets(base.layers, modules=modules, asked=asked, fused_experts=False)
    if expected.experts_r is not None:
        targets = experts.added_to(targets, modules=modules)
    if not expected.settings:
        return plain, targets
    settings = dict(expected.settings)
    if expected.changes_base:
        del settings["init_lora_weights"]  # the base is changed already
    return PeftVariant(plain=plain, settings=settings).adapted(targets, partial(base.described, changed=False))


def _stored(adapter: PeftLora | PeftVariant, targets: Targets) -> dict[str, StoredTensor]:
    """All tensors of the adapter's file, by name."""
    if isinstance(adapter, PeftVariant):
        return adapter.stored(targets.layers)
    adapted = (*targets.layers, *targets.fused)
    shapes = {name: shape for layer in adapted for name, shape in adapter.tensors(layer).items()}
    return {name: StoredTensor(shape=shape, dtype="F32") for name, shape in shapes.items()}


def _check_settings(stored: Mapping[str, Any], written: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*stored, *written}):
        if name not in written or name not in stored:
            yield f"`{name}` is " + ("missing" if name in written else "there, and was not written")
        elif json.dumps(stored[name], sort_keys=True) != json.dumps(written[name], sort_keys=True):  # 1 is not true
            yield f"`{name}` is `{stored[name]}`, not `{written[name]}`"


def _check_tensors(context: Context, expected: Adapter, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Whether all tensors of the adapter are there, and no others."""
    for name in sorted(tensors.keys() - context.adapter.keys()):
        yield f"`{name}` is missing"
    for name in sorted(context.adapter.keys() - tensors.keys()):
        yield f"`{name}` belongs to no layer that is trained"
    for name in sorted(context.adapter.keys() & tensors.keys()):
        found, tensor = context.adapter[name], tensors[name]
        if found.shape != tensor.shape:
            yield f"`{name}` has the shape {list(found.shape)}, its layer takes {list(tensor.shape)}"
        if found.dtype != tensor.dtype:
            yield f"`{name}` is {TORCH_NAMES[found.dtype]}, training has it in {TORCH_NAMES[tensor.dtype]}"
    once = context.adapter.keys() - context.tied_copies
    if sum(context.adapter[name].parameters for name in once) != expected.parameters:
        yield "the adapter does not have the parameters that the report says"


def _check_base(context: Context, adapter: Adapter) -> Iterator[str]:
    """Whether the base that the adapter refers to is the one that it was made for, as far as its listing tells."""
    files = {file.path: file for file in resolve_source(adapter.base, adapter.revision).files}
    for used in context.report.source.files:
        name = used.path
        if not name.endswith((".safetensors", "config.json")):
            continue
        if name not in files:
            yield f"the base, `{adapter.base}`, lacks `{name}`"
        elif files[name].bytes != used.bytes:
            yield f"`{name}` of the base has {files[name].bytes} bytes, not {used.bytes}"
        elif None not in (used.sha256, files[name].sha256) and files[name].sha256 != used.sha256:
            yield f"`{name}` of the base has another sha256"
