"""Whether a prepared adapter, its configuration and its base belong together."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from ..adapter.experts import Experts
from ..adapter.peft_lora import PeftLora
from ..adapter.targets import Targets, is_match, lora_names, resolve_targets
from ..report.document import Adapter
from ..report.rebased import stale_base
from ..source.resolve import resolve_source
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
    targets = _targets(context, expected)
    for pattern, expected_matches in expected.targets.items():
        if targets.matches.get(pattern, 0) != expected_matches:
            yield f"`{pattern}` hits {targets.matches.get(pattern, 0)} layers, the report says {expected_matches}"
    for pattern, expected_matches in expected.target_parameters.items():
        if targets.parameters.get(pattern, 0) != expected_matches:
            found = targets.parameters.get(pattern, 0)
            yield f"`{pattern}` hits {found} parameters, the report says {expected_matches}"
    yield from _check_settings(context, expected, targets)
    yield from _check_tensors(context, expected, targets)
    yield from _check_initial_values(context, targets)


def _targets(context: Context, expected: Adapter) -> Targets:
    """What is adapted of the base, experts in 4 bits as the layers that they become."""
    skeleton = context.skeleton
    packed = {tensor.parameter for tensor in skeleton.tensors if tensor.packed is not None}
    experts = Experts.of(skeleton.experts, packed)
    modules = tuple(name for name, _ in skeleton.model.named_modules())
    of_experts = experts.layers() if expected.experts_r is not None else ()
    by_name = tuple(name for name in expected.targets if not any(is_match(layer.name, (name,)) for layer in of_experts))
    targets = resolve_targets(skeleton.layers, modules=modules, asked=by_name, fused_experts=False)
    return targets if expected.experts_r is None else experts.added_to(targets, modules=modules)


def _described(expected: Adapter) -> PeftLora:
    return PeftLora(rank=expected.r, experts_rank=expected.experts_r, alpha=expected.alpha, dropout=expected.dropout)


def _check_settings(context: Context, expected: Adapter, targets: Targets) -> Iterator[str]:
    path = context.root / "adapter" / "adapter_config.json"
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    written = _described(expected).config(targets, base=expected.base, revision=expected.revision)
    for name in sorted({*stored, *written}):
        if name not in written or name not in stored:
            yield f"`{name}` is " + ("missing" if name in written else "there, and was not written")
        elif json.dumps(stored[name]) != json.dumps(written[name]):  # 1 is not true
            yield f"`{name}` is `{stored[name]}`, not `{written[name]}`"


def _check_tensors(context: Context, expected: Adapter, targets: Targets) -> Iterator[str]:
    """Whether there are the adapter's tensors for every layer that is a target, and no others."""
    adapter = _described(expected)
    adapted = (*targets.layers, *targets.fused)
    shapes = {name: shape for layer in adapted for name, shape in adapter.tensors(layer).items()}
    for name in sorted(shapes.keys() - context.adapter.keys()):
        yield f"`{name}` is missing"
    for name in sorted(context.adapter.keys() - shapes.keys()):
        yield f"`{name}` belongs to no layer that is trained"
    for name in sorted(context.adapter.keys() & shapes.keys()):
        if context.adapter[name].shape != shapes[name]:
            yield f"`{name}` has the shape {list(context.adapter[name].shape)}, its layer takes {list(shapes[name])}"
    if sum(tensor.parameters for tensor in context.adapter.values()) != expected.parameters:
        yield "the adapter does not have the parameters that the report says"


_ENOUGH_BYTES = 64
"""Sixteen numbers: fewer may be equal by chance."""
_MOST_BYTES = 16 * 1024


def _check_initial_values(context: Context, targets: Targets) -> Iterator[str]:
    """Whether every lora A, and each expert's in a fused one, was drawn for itself: 16 KiB of each are read."""
    experts = {lora_names(fused.name)[0]: fused.experts.experts for fused in targets.fused}
    others: dict[bytes, str] = {}
    with context.adapter_file.open("rb") as file:
        for name, tensor in context.adapter.items():
            count = experts.get(name, 1)
            size = tensor.nbytes // count
            if not name.endswith(".lora_A.weight") or size < _ENOUGH_BYTES:
                continue
            for number in range(count):
                file.seek(tensor.begin + number * size)
                values = file.read(min(size, _MOST_BYTES))
                what = f"`{name}`" if count == 1 else f"`{name}` of expert {number}"
                if values == values[:4] * (len(values) // 4):
                    yield f"{what} was not drawn: its numbers are all the same"
                # digests: of thousands of experts, the values would not fit into memory
                elif others.setdefault(sha256(values).digest(), what) != what:
                    yield f"{what} was not drawn: it is the same as {others[sha256(values).digest()]}"


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
