"""Experts as an adapter reaches them: a linear layer each where they are 4-bit, else one parameter for all of a layer.

PEFT wraps the layers by their names (`target_modules`), where they stand in the model. Parameters (`target_parameters`)
come after all layers; it wraps the module that holds them once for each, and names what it adds by the wrapper: what is
added first lies within, as `base_layer` (peft/tuners/tuners_utils.py, `_inject_parameters`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ..decision import Decision
from ..errors import UsageError
from ..model.components import LinearLayer
from ..model.experts.fused import FusedExperts, by_module
from .targets import FusedTarget, Targets, name_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The fused experts of a model that an adapter can train, as `load_prepared` has them in memory."""

    packed: tuple[FusedExperts, ...]
    """In 4 bits: layers stand in their place."""
    whole: tuple[FusedExperts, ...]
    """As they are in the model: one parameter each."""

    @classmethod
    def of(cls, experts: Iterable[FusedExperts], quantised: Collection[str]) -> Experts:
        """`quantised` are the parameters that are 4-bit."""
        experts = tuple(experts)
        return cls(
            packed=tuple(fused for fused in experts if fused.parameter in quantised),
            whole=tuple(fused for fused in experts if fused.parameter not in quantised),
        )

    def parameters(self, rank: int) -> int:
        """How many an adapter of this rank has on all of them."""
        return sum(
            fused.experts * rank * (fused.in_features + fused.out_features) for fused in (*self.packed, *self.whole)
        )

    def layers(self) -> tuple[LinearLayer, ...]:
        """The layers of those in 4 bits, in module order."""
        return tuple(
            fused.layer(number)
            for together in by_module(self.packed).values()
            for number in range(together[0].experts)
            for fused in together
        )

    @property
    def others(self) -> frozenset[str]:
        """The names of the layers of all experts in 4 bits but the first of each module, which can stand for them."""
        return frozenset(fused.layer(number).name for fused in self.packed for number in range(1, fused.experts))

    def first_of(self, name: str) -> str:
        """The layer of the first expert that stands for that of a 4-bit one; any other name is its own."""
        for module, together in by_module(self.packed).items():
            if name.startswith(f"{module}."):
                return f"{module}.0.{name.rpartition('.')[2]}" if together else name
        return name

    def modules(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of all modules, in order; of the model's own ones, `names`, in order."""
        found: list[str] = []
        inside = ""
        of_module = by_module(self.packed)
        for name in (*names, ""):
            # the layers come last in their module
            if inside and not name.startswith(f"{inside}."):
                for number in range(of_module[inside][0].experts):
                    found.append(f"{inside}.{number}")
                    found += [fused.layer(number).name for fused in of_module[inside]]
                inside = ""
            inside = name if name in of_module else inside
            found.append(name)
        return tuple(found[:-1])

    def added_to(self, targets: Targets, *, modules: Iterable[str]) -> Targets:
        """`targets`, and all of these; `modules` are the names of the model's own modules, in order."""
        of_experts, modules = self.layers(), self.modules(modules)
        named = name_targets(of_experts, layers=of_experts, modules=modules)
        order = {name: position for position, name in enumerate(modules)}
        return replace(
            targets,
            layers=tuple(sorted((*targets.layers, *of_experts), key=lambda layer: order[layer.name])),
            matches={**targets.matches, **named.matches},
            patterns=(*targets.patterns, *named.patterns),
            of_experts=named.patterns,
            fused=tuple(
                FusedTarget(experts=fused, wrapped=len(together) - 1 - index)
                for together in by_module(self.whole).values()
                for index, fused in enumerate(together)
            ),
            parameters=_name_parameters(self.whole),
        )


def _name_parameters(experts: tuple[FusedExperts, ...]) -> dict[str, int]:
    """PEFT's `target_parameters` for fused experts, and how many each matches: as its documentation names them."""
    ends = [".".join(fused.parameter.split(".")[-2:]) for fused in experts]
    return {end: ends.count(end) for end in sorted(set(ends))}


def check_asked(rank: int | None, experts: Experts, layers: Iterable[LinearLayer], unknown: Collection[str]) -> None:
    """Raise `UsageError` where `--lora_experts` is given, and nothing could be adapted.

    `unknown` are fused parameters of a layout that ftload does not know.
    """
    if rank is None or experts.packed or experts.whole:
        return
    if unknown:
        raise UsageError(
            f"`--lora_experts`: `{min(unknown)}` holds experts in a layout that ftload can't adapt", hint="leave it out"
        )
    if any(layer.component == "experts" for layer in layers):
        raise UsageError(
            "`--lora_experts`: the experts of this model are linear layers, which are adapted by their names",
            hint="leave it out: --lora_rank is their rank too",
        )
    raise UsageError("`--lora_experts`: this model has no experts", hint="leave it out")


def not_reached(rank: int, unknown: Collection[str]) -> Decision:
    """That the experts in `unknown` parameters get no adapter, though those of others do."""
    return Decision(
        what="lora_experts",
        requested=f"{rank}",
        effective=f"{rank}, without {len(unknown)} parameters",
        reason=f"`{min(unknown)}` holds experts in a layout that ftload can't adapt",
    )


def untrained(experts: Experts, weights: int, number: int, rank: int) -> Decision:
    """What `--lora_experts` would train: `number` fused parameters with so many `weights`, at the adapter's `rank`."""
    cost = experts.parameters(rank)
    price = f"--lora_experts {rank} would train {cost:,} parameters more"
    return Decision(
        what="experts",
        requested="untrained",
        effective="untrained",
        reason=f"{weights:,} weights in {number:,} fused parameters: "
        + (price if cost else "they are in a layout that --lora_experts does not reach"),
    )
