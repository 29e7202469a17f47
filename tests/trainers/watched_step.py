"""What the first step of a watched run holds: dtypes, what is saved for the backward pass, and whether logits live."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class StepWatch:
    """Told of a model's forward pass and of its loss's backward pass, writes what it sees in `facts`."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._hooks: Any = None
        self._given: set[int] = set()
        self._saved: dict[int, int] = {}
        self._logits: Callable[[], Tensor | None] = lambda: None

    def watch(self, model: nn.Module) -> None:
        """Watch the first forward pass of a model, as the trainer calls it, and the update that follows."""
        self._parameters = {name: _dtype(value) for name, value in model.named_parameters()}
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)
        register_optimizer_step_pre_hook(self._before_update)
        register_optimizer_step_post_hook(self._after_update)

    def _begin(self, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        if self.facts:
            return
        head = model.get_output_embeddings()
        self.facts |= {
            "parameters": self._parameters,
            "batch": list(inputs["input_ids"].shape),
            "head": None,
            "outputs": None,
            "saved_logits": [],
            "reentrant": sorted({use for module in model.modules() if (use := _reentrant(module)) is not None}),
        }
        self._rows = head.weight.shape[0]
        given = [*model.parameters(), *model.buffers(), *inputs.values()]
        self._given = {_key(value) for value in given if isinstance(value, Tensor)}
        head.register_forward_hook(self._head)
        model.get_input_embeddings().register_forward_hook(self._embedding)
        self._hooks = saved_tensors_hooks(self._pack, lambda value: value)
        self._hooks.__enter__()

    def _head(self, _: Any, __: Any, logits: Tensor) -> None:
        if self.facts["head"] is None:
            self.facts["head"] = _dtype(logits)

    def _embedding(self, _: Any, __: Any, embedded: Tensor) -> None:
        self.facts.setdefault("autocast", torch.is_autocast_enabled(embedded.device.type))

    def _end(self, _: Any, __: Any, outputs: Any) -> None:
        if self._hooks is not None and getattr(outputs, "logits", None) is not None:
            self.facts["outputs"] = _dtype(outputs.logits)
            self._logits = weakref.ref(outputs.logits)

    def _pack(self, value: Tensor) -> Tensor:
        if _key(value) not in self._given and _key(value) not in self._saved:
            self._saved[_key(value)] = value.untyped_storage().nbytes()
            if value.shape[-1:] == (self._rows,):
                self.facts["saved_logits"].append([_dtype(value), list(value.shape)])
        return value.detach()

    def before_backward(self) -> None:
        """The loss is there; its backward pass comes next."""
        if self._hooks is None:
            return
        self._hooks.__exit__(None, None, None)
        self._hooks = None
        self.facts["saved"] = sum(self._saved.values())
        self.facts["logits_live"] = self._logits() is not None

    def _before_update(self, optimizer: Any, *_: Any) -> None:
        if "gradients" not in self.facts:
            values = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
            self.facts["gradients"] = sorted({_dtype(value.grad) for value in values})

    def _after_update(self, optimizer: Any, *_: Any) -> None:
        if "optimizer" not in self.facts:
            held = {_key(part): part.nbytes for state in optimizer.state.values() for part in _tensors(state)}
            self.facts["optimizer"] = [f"{type(optimizer).__module__}.{type(optimizer).__name__}", sum(held.values())]


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _key(value: Tensor) -> int:
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    return local.untyped_storage().data_ptr()


def _tensors(state: Any) -> list[Tensor]:
    return [part for part in state.values() if isinstance(part, Tensor)]


def _reentrant(module: nn.Module) -> bool | None:
    """Whether a module's layers are recomputed re-entrantly; None where they are not recomputed."""
    checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is None or not getattr(module, "gradient_checkpointing", False):
        return None
    # LLaMA-Factory has a function of its own around it
    checkpoint = getattr(checkpoint, "__wrapped__", checkpoint)
    return checkpoint.keywords.get("use_reentrant", True)
