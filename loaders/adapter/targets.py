"""Which linear layers an adapter trains.

It is decided by what the model's modules are and are called, not by a list of architectures: a new architecture needs
no entry here as long as it keeps to the field's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..decision import Decision
from ..errors import UsageError
from ..flags.lora_config import ALL_LINEAR
from ..model.components import ROUTER_NAMES, LinearLayer
from ..model.experts.fused import FusedExperts

REFERENCE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The module names that Open Instruct's SFT script gives to LoRA: the linear layers of a Llama block."""

ADAPTED = "base_model.model."
"""What PEFT puts before all names in an adapter's file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedTarget:
    """Fused experts that are adapted as one parameter."""

    experts: FusedExperts
    wrapped: int
    """Parameters of the same module that PEFT wraps after this one."""

    @property
    def name(self) -> str:
        """The name under which PEFT stores what it adds."""
        return self.experts.module + ".base_layer" * self.wrapped


Target: TypeAlias = LinearLayer | FusedTarget
"""What gets an adapter of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The layers that get an adapter, in the model's module order, and how they were found."""

    patterns: tuple[str, ...]
    """Names of layers: PEFT's `target_modules`."""
    layers: tuple[LinearLayer, ...]
    matches: Mapping[str, int]
    """Pattern to the number of layers that it matches."""
    decisions: tuple[Decision, ...]
    of_experts: tuple[str, ...] = ()
    """Those of the patterns that name the layers of 4-bit experts."""
    fused: tuple[FusedTarget, ...] = ()
    """Experts that are adapted as parameters, after all layers, in the order in which PEFT wraps them."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Their patterns, PEFT's `target_parameters`, to the number of parameters that each matches."""
    warnings: tuple[str, ...] = ()
    """What PEFT says of them."""


def resolve_targets(
    layers: Iterable[LinearLayer], *, modules: Iterable[str], asked: tuple[str, ...] | None, fused_experts: bool
) -> Targets:
    """Choose the linear layers that get an adapter; `modules` are the names of all modules, linear or not.

    Names that the user asked for are taken as they are; each must match. Otherwise the reference's seven names are
    used where the architecture has them all. Where it lacks some, or for `all-linear`, every linear layer of the
    language model's blocks is a target, except routers; where experts are fused into 3-D parameters, which are no
    layers, the attention layers alone: `experts.py` adds the experts.
    Raises `UsageError` when a name that was asked for, or everything, matches nothing, and when one matches a router or
    a layer outside the blocks without naming it as such.
    """
    layers, modules = tuple(layers), tuple(modules)
    if asked is not None and asked != (ALL_LINEAR,):
        return _as_asked(layers, tuple(dict.fromkeys(asked)))
    found = count_matches(layers, REFERENCE_TARGETS)
    usual = _matching(layers, REFERENCE_TARGETS)
    trained = {layer.name for layer in usual if not _is_apart(layer)}
    strays = [name for name in modules if is_match(name, REFERENCE_TARGETS) and name not in trained]
    if asked is None and all(found.values()) and not fused_experts and not strays:
        return Targets(patterns=REFERENCE_TARGETS, layers=usual, matches=found, decisions=())
    eligible = [layer for layer in layers if not _is_apart(layer)]
    if fused_experts:
        # an architecture may call its attention by the name of a mixer
        attention = [layer for layer in eligible if layer.component == "attention"]
        eligible = attention or [layer for layer in eligible if layer.component != "experts"]
    if not eligible:
        raise UsageError(
            "LoRA finds no linear layer to train in this model", hint="name some with --lora_target_modules"
        )
    targets = name_targets(eligible, layers=layers, modules=modules)
    missed = ", ".join(name for name in REFERENCE_TARGETS if not found[name])
    if fused_experts:
        what = "attention" if eligible[0].component == "attention" else "the rest"
        reason = (
            "the experts are fused into 3-D parameters, which no layer's name reaches: by name, "
            f"{what} alone is trained"
        )
    elif asked is not None:
        reason = f"the linear layers of its blocks are {' '.join(targets.patterns)}"
    elif all(found.values()):
        reason = f"those names also hit `{strays[0]}`: the linear layers of its blocks alone are trained"
    else:
        lacks = f"no {missed}" if any(found.values()) else "none of these"
        reason = f"this architecture has {lacks}: all linear layers of its blocks are trained instead"
    decision = Decision(
        what="LoRA targets",
        requested=" ".join(asked or REFERENCE_TARGETS),
        effective=ALL_LINEAR if asked is not None and not fused_experts else " ".join(targets.patterns),
        reason=reason,
    )
    return replace(targets, decisions=(decision,))


def name_targets(chosen: Iterable[LinearLayer], *, layers: Iterable[LinearLayer], modules: Iterable[str]) -> Targets:
    """Patterns that PEFT matches with these layers and no other module: their last names, else their whole ones."""
    chosen, layers = tuple(chosen), tuple(layers)
    patterns = in_order(dict.fromkeys(layer.leaf for layer in chosen))
    names = {layer.name for layer in chosen}
    if any(name not in names and is_match(name, patterns) for name in modules):
        patterns = tuple(layer.name for layer in chosen)
    return Targets(patterns=patterns, layers=chosen, matches=count_matches(layers, patterns), decisions=())


_ORDER = (
    "q_proj", "k_proj", "v_proj", "qkv", "qkv_proj", "query_key_value", "c_attn", "o_proj", "out_proj", "dense",
    "gate_proj", "up_proj", "gate_up_proj", "gate_up", "fc1", "c_fc", "dense_h_to_4h",
    "down_proj", "down", "fc2", "c_proj", "dense_4h_to_h",
)  # fmt: skip
"""As a block computes them."""


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Targets in the order in which they are shown everywhere: as a block computes them, other names after these.

    It depends on the names alone: a trained adapter's configuration says nothing else.
    """
    ranks = {name: number for number, name in enumerate(_ORDER)}
    return tuple(sorted(names, key=lambda name: (ranks.get(name.rpartition(".")[2], len(ranks)), name)))


def lora_names(target: str) -> tuple[str, str]:
    """What A and B of a layer or parameter are called in an adapter's file, by PEFT's name of what it wraps."""
    a, b = (f"{ADAPTED}{target}.lora_{which}.weight" for which in "AB")
    return a, b


def is_match(module: str, patterns: Iterable[str]) -> bool:
    """Whether PEFT takes a module for one of a list of targets: by its whole name, or its end after a dot."""
    return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns)


def _as_asked(layers: tuple[LinearLayer, ...], asked: tuple[str, ...]) -> Targets:
    found = count_matches(layers, asked)
    missed = [pattern for pattern, count in found.items() if not count]
    if missed:
        names = sorted({layer.leaf for layer in layers})
        raise UsageError(
            f"`--lora_target_modules`: no linear layer is called {', '.join(f'`{name}`' for name in missed)}",
            hint=f"this model has {', '.join(names)}",
        )
    chosen = _matching(layers, asked)
    stray = next((layer for layer in chosen if _is_apart(layer) and not _is_named(layer, asked)), None)
    if stray is not None:
        where = "is a router's" if stray.component == "router" else "lies outside the language model's layers"
        raise UsageError(
            f"`--lora_target_modules`: `{stray.leaf}` hits `{stray.name}`, which {where} and was not asked for",
            hint="name the layers in full, with a dot in each name",
        )
    return Targets(patterns=asked, layers=chosen, matches=found, decisions=())


def _is_apart(layer: LinearLayer) -> bool:
    """Whether a layer is not trained unasked: a router, or outside the language model's blocks."""
    return layer.component == "router" or not layer.in_blocks


def _is_named(layer: LinearLayer, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern that matches it says what the layer belongs to: a router's own name, or a path."""
    return any(is_match(layer.name, (pattern,)) and ("." in pattern or pattern in ROUTER_NAMES) for pattern in patterns)


def count_matches(layers: Iterable[LinearLayer], patterns: Iterable[str]) -> dict[str, int]:
    """Pattern to the number of layers that it matches."""
    layers = tuple(layers)
    return {pattern: sum(is_match(layer.name, (pattern,)) for layer in layers) for pattern in patterns}


def _matching(layers: tuple[LinearLayer, ...], patterns: tuple[str, ...]) -> tuple[LinearLayer, ...]:
    return tuple(layer for layer in layers if is_match(layer.name, patterns))
