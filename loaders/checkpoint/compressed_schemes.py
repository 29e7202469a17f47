"""How compressed-tensors stored the weights of which modules, as config.json's `quantization_config` says it.

Sources: the package `compressed-tensors` 0.20, `quantization/quant_config.py`, `quant_scheme.py` and `quant_args.py`
for the settings, `utils/match.py` for whom they mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

PACKED = "pack-quantized"
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", PACKED)
"""Those that can be decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How the weights of a group are stored."""

    format: str
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    """tensor, channel, group or block."""
    group_size: int | None
    """Columns that share a scale."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale."""

    @property
    def is_packed(self) -> bool:
        """Whether several weights share an element."""
        return self.format == PACKED

    @property
    def packs_zero_points(self) -> bool:
        """Whether several rows of zero points share an element."""
        return self.is_packed and not self.symmetric and self.strategy in ("channel", "group")

    @property
    def tag(self) -> str:
        """What reports count its weights under."""
        return "fp8" if self.is_float else f"int{self.bits}"

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that the scale of a weight (rows, columns) may have; the first is the usual one."""
        if self.group_size is not None:
            return ((rows, columns // self.group_size),)
        if self.block is not None:
            height, width = self.block
            return ((-(-rows // height), -(-columns // width)),)
        return ((rows, 1),) if self.strategy == "channel" else ((1,), (), (1, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One of `config_groups`: the modules that it means, and how their weights are stored."""

    targets: tuple[str, ...]
    """Names of modules, `re:` and a pattern of names, or names of classes."""
    scheme: Scheme


def read_groups(section: Mapping[str, Any], model: str) -> list[Group]:
    """The groups that have weights. Raises `CheckpointError` for what is malformed or can't be decoded."""
    for key, plain in (("sparsity_config", "dense"), ("transform_config", None)):
        other = section.get(key)
        if other and not (isinstance(other, dict) and other.get("format") == plain and not other.get("config_groups")):
            raise _refused(model, f"a `{key}`")
    groups = section.get("config_groups")
    if not isinstance(groups, dict):
        raise _malformed(model, "config_groups", groups)
    found = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise _malformed(model, f"config_groups.{name}", group)
        weights, targets = group.get("weights"), group.get("targets")
        if weights is None:  # only activations
            continue
        form = group.get("format") or section.get("format")
        if form not in FORMATS:
            shown = form if isinstance(form, str) and form.isprintable() else repr(form)
            raise _refused(model, f"the format `{shown[:60]}`")
        if not isinstance(weights, dict):
            raise _malformed(model, f"config_groups.{name}.weights", weights)
        if not isinstance(targets, list) or not all(map(_is_target, targets)):
            raise _malformed(model, f"config_groups.{name}.targets", targets)
        found.append(Group(targets=tuple(targets), scheme=_read_scheme(weights, form, model, name)))
    return found


def _read_scheme(weights: Mapping[str, Any], form: str, model: str, name: str) -> Scheme:
    """The settings of a group's weights, with the defaults and the checks of the package's `QuantizationArgs`."""
    kind, bits, symmetric = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("symmetric", True)
    size, block, strategy = weights.get("group_size"), weights.get("block_structure"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    in_groups, edges = strategy == "group", _edges(block)
    fits = {
        "type": kind == "int" or (kind == "float" and form != PACKED),
        "num_bits": type(bits) is int and (1 <= bits <= 8 if kind == "int" else bits == 8),
        "symmetric": type(symmetric) is bool,
        "strategy": strategy in ("tensor", "channel", "group", "block"),
        "group_size": (type(size) is int and size > 0) if in_groups else size is None or size == -1,
        "block_structure": (edges is None) == (strategy != "block") and (edges is None) == (block is None),
        "actorder": weights.get("actorder") in (None, False, "weight", "static"),
    }
    for key, fit in fits.items():
        if not fit:
            raise _malformed(model, f"config_groups.{name}.weights.{key}", weights.get(key))
    return Scheme(
        format=form, bits=bits, is_float=kind == "float", symmetric=symmetric, strategy=strategy,
        group_size=size if in_groups else None, block=edges,
    )  # fmt: skip


def _is_target(target: Any) -> bool:
    if not isinstance(target, str):
        return False
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _edges(block: Any) -> tuple[int, int] | None:
    """Of a block: `[128, 128]`, or `"128x128"` as it was once written."""
    if isinstance(block, str):
        block = [int(edge) if edge.isdecimal() else 0 for edge in block[:40].split("x")]
    if isinstance(block, list) and len(block) == 2 and all(type(edge) is int and edge > 0 for edge in block):
        return block[0], block[1]
    return None


def _refused(model: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"`{model}` is stored by compressed-tensors with {what}",
        hint=f"start from the 16-bit model; of compressed-tensors, {', '.join(FORMATS)} can be used",
    )


def _malformed(model: str, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"config.json of `{model}`: `quantization_config.{key}` is {repr(value)[:60]}, which can't be decoded",
        hint="start from the 16-bit model",
    )


def scheme_of(module: str, groups: list[Group]) -> Scheme | None:
    """Of the group that means the module, by the package's rule: names before patterns before classes.

    Without a model nothing tells a module's class: a group of classes is taken to mean all that no name or pattern
    does, `Linear` first.
    """
    if len({group.scheme for group in groups}) <= 1:
        return groups[0].scheme if groups else None
    by_target = {target: group.scheme for group in groups for target in group.targets}
    if module in by_target:
        return by_target[module]
    for target, scheme in sorted(by_target.items()):
        if target.startswith("re:") and re.match(target.removeprefix("re:"), module):
            return scheme
    classes = [target for target in by_target if target[:1].isupper()]
    return by_target[min(classes, key=lambda target: target != "Linear")] if classes else None
