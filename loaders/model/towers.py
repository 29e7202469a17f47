"""The parts of a multimodal model that are not its language model: vision and audio towers, and what connects them.

Where `AutoModelForCausalLM` takes the language model out of a multimodal checkpoint, they are left out; where it takes
the whole model, training on text gives them no gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tensors import TensorMeta
from ..decision import Decision
from .transformers_internals import WeightMapping

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """What a checkpoint holds of a multimodal model beside the language model that is loaded from it."""

    whole: str
    """The multimodal model's class."""
    modules: tuple[str, ...]
    """Its parts that are left out."""
    names: tuple[str, ...]
    """Their weights."""
    tensors: tuple[TensorMeta, ...]
    """All that they are stored in."""

    def decision(self, effective: str) -> Decision:
        """That the class `effective` is prepared and not the whole model."""
        return Decision(
            what="model",
            requested=self.whole,
            effective=effective,
            reason=f"AutoModelForCausalLM loads the language model alone: {len(self.names)} tensors "
            f"({sum(tensor.nbytes for tensor in self.tensors):,} bytes) of "
            f"{', '.join(f'`{module}`' for module in self.modules)} are left out",
        )


def find_left_out(checkpoint: Checkpoint, whole: PreTrainedModel) -> LeftOut | None:
    """The tensors of `checkpoint` that are parameters or buffers of a tower of `whole`; None where it holds none.

    A tensor that `whole` does not have is not among them, wherever its name points to.
    """
    modules = [name for name, within_text in _find_towers(whole) if not within_text]
    targets = WeightMapping(whole).targets(checkpoint.tensors)
    owners = {
        name: module for name, (target, _) in targets.items() for module in modules if target.startswith(f"{module}.")
    }
    if not owners:
        return None
    return LeftOut(
        whole=type(whole).__name__,
        modules=tuple(module for module in modules if module in owners.values()),
        names=tuple(owners),
        tensors=tuple(part for name in owners for part in checkpoint.tensors[name].stored_in),
    )


def tower_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the largest modules that text does not pass through, in module order.

    In a model that holds its language model as a part (a module with the configuration for text), that is all beside it
    and the head. Within a language model it is what holds a module that takes no text, as far as embeddings, head and
    the list of its layers are not in it.
    """
    return tuple(name for name, _ in _find_towers(model))


def _find_towers(model: PreTrainedModel) -> Iterator[tuple[str, bool]]:
    """The name of each tower, and whether it is within the language model."""
    from transformers import PreTrainedModel

    text = type(model.config.get_text_config())
    kept = {
        id(module)
        for module in model.modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
        or (isinstance(module, PreTrainedModel) and type(module.config) is text)
    }
    return _towers_in(model, "", kept, within_text=id(model) in kept)


def _towers_in(module: Module, prefix: str, kept: Collection[int], *, within_text: bool) -> Iterator[tuple[str, bool]]:
    from torch.nn import ModuleList

    for name, child in module.named_children():
        within = within_text or id(child) in kept
        if any(id(part) in kept for part in child.modules()) or (within_text and isinstance(child, ModuleList)):
            yield from _towers_in(child, f"{prefix}{name}.", kept, within_text=within)
        elif any(True for _ in child.parameters()) and (not within or any(map(_takes_no_text, child.modules()))):
            yield prefix + name, within


def _takes_no_text(module: Module) -> bool:
    """Whether a module needs other input: images, sound, or (some of Mllama's layers) what came of them."""
    states = signature(type(module).forward).parameters.get("cross_attention_states")
    required = states is not None and states.default is Parameter.empty
    return required or "text" not in getattr(module, "input_modalities", "text")
