"""PEFT asked what it makes of a list of target names: which modules it adapts, and whether it finds the adapter again.

It matches the ends of module names of any kind, forbids some modules, and rewrites names where transformers merges
weights on loading. Importing it takes seconds, so it is not asked where the answer is certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..decision import Decision
from ..errors import UsageError
from ..flags.lora_config import ALL_LINEAR
from ..model.components import LinearLayer
from ..model.transformers_internals import merges_weights
from .adapted_model import RefusalError, adapt, import_peft
from .experts import Experts
from .interface import Adapter
from .targets import REFERENCE_TARGETS, Targets, count_matches, in_order, is_match, name_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Peft:
    """PEFT, asked about a model on `meta`, which stays as it is."""

    model: PreTrainedModel
    adapter: Adapter
    experts: Experts
    """The fused experts of the model; the first of those in 4 bits stands for all: the others are called as it is."""

    def confirm(self, targets: Targets, *, asked: bool, layers: tuple[LinearLayer, ...]) -> Targets:
        """`targets` if PEFT adapts just these layers, under the names that it keeps; else those that it takes, and why.

        Raises `UsageError` where it refuses what the user `asked` for, or everything, and `MissingRequirementError`
        where it must be asked and can't be imported.
        """
        answer = self._ask(targets)
        if answer.problem is None:
            return _under(answer.patterns, targets, layers)
        if asked:
            raise UsageError(
                f"`--lora_target_modules`: PEFT can't adapt these layers: {answer.problem}",
                hint="name others, or leave it out: ftload takes what PEFT can adapt",
            )
        modules = self.experts.modules(name for name, _ in self.model.named_modules())
        by_leaf: dict[str, list[LinearLayer]] = {}
        for layer in targets.layers:
            by_leaf.setdefault(layer.leaf, []).append(layer)
        problems = {
            leaf: self._ask(name_targets(group, layers=layers, modules=modules)).problem
            for leaf, group in by_leaf.items()
        }
        taken = [layer for layer in targets.layers if problems[layer.leaf] is None]
        if taken:
            narrowed = name_targets(taken, layers=layers, modules=modules)
            again = self._ask(narrowed)
            if again.problem is None:
                narrowed = replace(narrowed, decisions=(_narrowing(targets, problems),))
                return _under(again.patterns, narrowed, layers)
        raise UsageError(
            f"PEFT can't adapt the linear layers of this model: {answer.problem}",
            hint="name some with --lora_target_modules",
        )

    def confirm_experts(self, targets: Targets) -> Targets:
        """`targets`, experts among them, under the names that PEFT keeps. Raises `UsageError` where it refuses."""
        answer = self._ask(targets)
        if answer.problem is not None:
            raise UsageError(f"`--lora_experts`: PEFT can't adapt the experts: {answer.problem}", hint="leave it out")
        if answer.patterns == targets.patterns:
            return targets
        of_experts = [layer for layer in targets.layers if layer.fused]
        return replace(
            targets,
            patterns=answer.patterns,
            matches=count_matches(targets.layers, answer.patterns),
            of_experts=tuple(name for name, found in count_matches(of_experts, answer.patterns).items() if found),
        )

    def _ask(self, targets: Targets) -> _Answer:
        if self._is_certain(targets):
            return _Answer(patterns=targets.patterns)
        import_peft()
        try:
            adapted = adapt(self.model, self.adapter.peft_config(targets), self.experts)
        except RefusalError as refusal:
            return _Answer(problem=str(refusal))
        found = {*adapted.layers, *(name for module in adapted.modules.values() for name in module.parameters)}
        wanted = {layer.name for layer in targets.layers} - self.experts.others
        wanted |= {fused.experts.parameter for fused in targets.fused}
        if found != wanted:
            name = min(found ^ wanted)
            what = f"does not adapt `{name}`" if name in wanted else f"adapts `{name}` as well"
            return _Answer(problem=f"it {what}")
        if adapted.lost:
            return _Answer(problem=f"it does not find `{adapted.lost[0]}` again")
        if adapted.target_parameters != set(targets.parameters):
            return _Answer(problem=f"it adapts `{' '.join(sorted(adapted.target_parameters))}` as parameters")
        kept = adapted.target_modules
        return _Answer(patterns=targets.patterns if kept == set(targets.patterns) else tuple(sorted(kept)))

    def _is_certain(self, targets: Targets) -> bool:
        """Whether the answer is known: the usual names, of plain linear layers, and weights that nothing merges."""
        import torch

        wanted = {layer.name for layer in targets.layers}
        found = {name: module for name, module in self.model.named_modules() if is_match(name, targets.patterns)}
        return (
            not targets.fused
            and set(targets.patterns) <= set(REFERENCE_TARGETS)
            and found.keys() == wanted
            and all(type(module) is torch.nn.Linear for module in found.values())
            and not merges_weights(self.model.config.model_type)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What PEFT makes of some targets."""

    patterns: tuple[str, ...] = ()
    """As it keeps them: of many whole names, the shortest ends that no other module shares."""
    problem: str | None = None
    """Why it does not adapt just these layers, in its words or in ours."""


def _under(patterns: tuple[str, ...], targets: Targets, layers: tuple[LinearLayer, ...]) -> Targets:
    """The same layers under other names."""
    decisions = tuple(
        decision if decision.effective == ALL_LINEAR else replace(decision, effective=" ".join(in_order(patterns)))
        for decision in targets.decisions
    )
    return replace(targets, patterns=patterns, matches=count_matches(layers, patterns), decisions=decisions)


def _narrowing(targets: Targets, problems: Mapping[str, str | None]) -> Decision:
    """The decision about `targets`, where PEFT takes some of them."""
    refused = {leaf: problem for leaf, problem in problems.items() if problem is not None}
    reason = f"PEFT refuses {', '.join(f'`{leaf}`' for leaf in refused)}: {next(iter(refused.values()))}"
    return Decision(
        what="LoRA targets",
        requested=targets.decisions[0].requested if targets.decisions else " ".join(targets.patterns),
        effective="",
        reason="; ".join([*(decision.reason for decision in targets.decisions), reason]),
    )
