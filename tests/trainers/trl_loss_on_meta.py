"""TRL's loss on `meta`, run by its own Python: prints what each case saves for the backward pass, and its peaks.

Triton's kernels, which allocate nothing, are not launched. ftload's loss is measured by the same function, in its own.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VOCABULARY, WIDTH, BATCH, LENGTH = 70_000, 512, 2, 3000
"""Of three tiles across and two down; the last ones are smaller."""
CASES: dict[str, tuple[torch.dtype, bool, bool]] = {
    "full": (torch.bfloat16, True, True),
    "full in float32": (torch.float32, True, True),
    "full in float32, no autocast": (torch.float32, False, True),
    "lora": (torch.bfloat16, True, False),
    "qlora": (torch.float32, True, False),
}
"""Dtype of all weights, whether there is autocast to bfloat16, and whether the head is trained."""


class Recorder(TorchDispatchMode):
    """Counts the bytes of storages that are allocated while it is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # no sequences are packed
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.see(value.untyped_storage())
        return result

    def see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in self.given:
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    given: frozenset[int] = frozenset()


def measure(case: str, loss_of: Callable[[Any, dict[str, Any], torch.dtype | None], torch.Tensor]) -> dict[str, int]:
    """Bytes of a step of a Llama with one layer and a large head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype, autocast, trained = CASES[case]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.lm_head.requires_grad_(trained)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    recorder = Recorder()
    given = [*model.parameters(), *model.buffers(), tokens]
    recorder.given = frozenset(value.untyped_storage()._cdata for value in given)
    saved: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in recorder.given:
            saved[storage._cdata] = storage.nbytes()
        return value.detach()

    found: dict[str, int] = {}

    def decoded(_: Any, __: Any, outputs: Any) -> None:
        found["saved"], recorder.peak = -sum(saved.values()), recorder.live
        outputs.last_hidden_state.register_hook(lambda _: found.update(backward=recorder.peak))

    model.model.register_forward_hook(decoded)
    with recorder:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = loss_of(model, inputs, torch.bfloat16 if autocast else None)
        found["saved"] += sum(saved.values())
        found["forward"], recorder.peak = recorder.peak, recorder.live
        held = recorder.live
        loss.backward()
    return {**found, "forward": found["forward"] - held, "backward": found["backward"] - held}


def _trl_loss(model: Any, inputs: dict[str, Any], dtype: torch.dtype | None) -> torch.Tensor:
    from trl.trainer.utils import add_fused_lm_head

    # `meta` knows no autocast: TRL asks whether there is any, and the model's layers have none here
    torch.is_autocast_enabled = lambda *_: dtype is not None
    torch.get_autocast_dtype = lambda *_: dtype
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return -model(**inputs, fused_lm_head=True).log_probs.sum()


def main() -> None:
    from trl.kernels import chunked_logprob

    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        setattr(chunked_logprob, name, lambda *_, **__: None)
    print(json.dumps({case: measure(case, _trl_loss) for case in CASES}))


if __name__ == "__main__":
    main()
