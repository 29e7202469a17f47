"""PEFT asked what it makes of a list of target names: which modules it adapts, and whether it finds the adapter again.

It matches the ends of module names of any kind, forbids some modules, and rewrites names where transformers merges
weights on loading. Importing it takes seconds, so it is not asked where the answer is certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import MissingRequirementError, UsageError, said_by
from ..model.components import LinearLayer
from ..model.experts.fused import by_module, empty_layer, take_apart
from ..model.transformers_internals import merges_weights
from ..system.quiet import quiet_transformers
from .experts import Experts
from .interface import Adapter
from .targets import ALL_LINEAR, REFERENCE_TARGETS, Targets, count_matches, in_order, is_match, name_targets

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

    def _model(self) -> PreTrainedModel:
        """A copy of the model as it is in memory, one expert of each layer where they are 4-bit."""
        model = deepcopy(self.model)
        for name, together in by_module(self.experts.packed).items():
            take_apart(model.get_submodule(name), together, empty_layer, (0,))
        return model

    def _ask(self, targets: Targets) -> _Answer:
        """Adapt a copy of the model, and load the adapter's own tensor names into it again."""
        if self._is_certain(targets):
            return _Answer(patterns=targets.patterns)
        try:
            with quiet_transformers():  # bitsandbytes tells which kernels it lacks
                from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
                from peft.tuners.tuners_utils import BaseTunerLayer
        except Exception as error:  # a broken build raises whatever it likes
            raise MissingRequirementError(
                f"PEFT does not import: {said_by(error)}", hint="`ftload doctor` says how to fix it"
            ) from error
        config: Any = self.adapter.peft_config(targets)
        with quiet_transformers():
            try:
                adapted: Any = get_peft_model(self._model(), config, low_cpu_mem_usage=True)
                # what it calls the tensors when it saves them, it must find again when it loads them
                tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
                loaded = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
            except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
                # after its first sentence PEFT lists sets, in an order that differs from process to process
                return _Answer(problem=said_by(error).partition(". ")[0])
        modules = adapted.base_model.model.named_modules()
        found = {name for name, module in modules if isinstance(module, BaseTunerLayer)}
        others = {fused.layer(number).name for fused in self.experts.packed for number in range(1, fused.experts)}
        wanted = {layer.name for layer in targets.layers} - others | {fused.name for fused in targets.fused}
        if found != wanted:
            name = min(found ^ wanted)
            what = f"does not adapt `{name}`" if name in wanted else f"adapts `{name}` as well"
            return _Answer(problem=f"it {what}")
        lost = sorted(name for name in loaded.missing_keys if ".lora_" in name) + sorted(loaded.unexpected_keys)
        if lost:
            return _Answer(problem=f"it does not find `{lost[0]}` again")
        if set(config.target_parameters or ()) != set(targets.parameters):
            return _Answer(problem=f"it adapts `{' '.join(sorted(config.target_parameters or ()))}` as parameters")
        kept = set(config.target_modules or ())
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
