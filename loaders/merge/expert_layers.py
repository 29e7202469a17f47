"""Experts that were adapted one by one: layers in their place while PEFT looks, then changes of what holds them all.

4-bit experts are trained as linear layers, `P.3.gate_up` and `P.3.down`, where the model in 16 bits has one parameter
`P.gate_up_proj` for all of them: `model/experts/fused.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..model.experts.fused import FusedExperts, by_module, empty_layer, find_experts, take_apart
from .adapter import AdapterWeights, TrainedAdapter
from .changes import Changed, ExpertLayers, LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def split_experts(model: PreTrainedModel, weights: AdapterWeights, config: Any) -> tuple[FusedExperts, ...]:
    """Put linear layers, without values, in the place of the fused experts, if an adapter was trained on such.

    `config` is PEFT's. Returns what was taken apart: all of the model's fused experts, or none.
    """
    found = find_experts(model)
    if not _is_for_layers(found, weights, config):
        return ()
    for name, together in by_module(found).items():
        take_apart(model.get_submodule(name), together, empty_layer, range(together[0].experts))
    return found


def _is_for_layers(found: tuple[FusedExperts, ...], weights: AdapterWeights, config: Any) -> bool:
    """Whether an adapter has tensors for layers of experts, or its configuration asks for some."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not found:
        return False
    modules = "|".join(re.escape(module) for module in {experts.module for experts in found})
    named = re.compile(rf"base_model\.model\.(?:{modules})\.\d+\.")
    return any(map(named.match, weights.tensors)) or any(
        check_target_module_exists(config, experts.layer(expert).name)
        for experts in found
        for expert in range(experts.experts)
    )


def join_experts(changes: dict[str, Changed], experts: FusedExperts, adapter: TrainedAdapter) -> None:
    """In `changes`, put one of the fused parameter in the place of those of its experts' layers.

    Raises `CheckpointError` for a layer that an adapter replaces, and for DoRA where experts are (in, out).
    """
    layers: dict[int, LowRank] = {}
    for expert in range(experts.experts):
        name = f"{experts.layer(expert).name}.weight"
        changed = changes.pop(name, None)
        if changed is None:
            continue
        change = changed.change
        # PEFT measures the rows of a matrix (out, in): to the last bit, its columns in another order are not the same
        if changed.replaced_by or not isinstance(change, LowRank) or (change.dora and experts.transposed):
            raise CheckpointError(
                f"the adapter `{adapter.name}` changes `{name}`, which is one of a model's experts, in a way that "
                "ftload can't follow",
                hint="merge it with PEFT itself",
            )
        layers[expert] = replace(change, transposed=experts.transposed)
    if layers:
        changes[experts.parameter] = Changed(
            change=ExpertLayers(layers=layers, rows=experts.shape[1], transposed=experts.transposed)
        )
