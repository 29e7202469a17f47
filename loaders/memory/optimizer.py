"""What the optimizers of Open Instruct's SFT script hold, by the formulas of their libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .sharding import with_share
from .trained import trained_tensors
from .training_memory import Part
from .training_run import TrainingRun

if TYPE_CHECKING:
    from ..flags.declared import FlatArguments
    from ..plan.plan import Plan


def optimizer_bytes(plan: Plan, flags: FlatArguments, run: TrainingRun) -> Part:
    """All states of the optimizer that Open Instruct's SFT script creates, before they are divided among GPUs.

    For n trained elements in tensors of n_t elements each:

    - QLoRA: bitsandbytes' paged AdamW. 8 n bytes, two float32 states; or with `use_8bit_optimizer`, for tensors of at
      least 4096 elements, 2 n_t + 8 ⌈n_t / 256⌉: two uint8 states, each with a float32 maximum for every 256 elements.
      Two tables of 256 float32 are shared (bitsandbytes `optim/optimizer.py`).
    - DeepSpeed (`Sharding.method` is `zero`): 12 n bytes, AdamW's two states and a copy of the weights in float32
      (arXiv:1910.02054, section 3.1).
    - Else torch's AdamW: two states in the parameter's dtype, and a float32 step count for each tensor, which lies on
      the GPU only with `fused_optimizer`.
    """
    trained, sharding = trained_tensors(plan, run), run.sharding
    elements = sum(one.elements for one in trained)
    name = "optimizer states"
    if sharding is not None and not sharding.is_fsdp:
        origin = "formula: AdamW under DeepSpeed, 12 bytes a trained parameter (two states and the weight in float32)"
        return Part(name=name, bytes=12 * elements, origin=with_share(origin, sharding.gpus))
    if plan.quantization_config is not None and run.step.named_optimizer:
        paged = "; paged: may move to the host's memory"
        if flags.use_8bit_optimizer:
            in_8_bits = [one.elements for one in trained if one.elements >= 4096]
            in_float32 = elements - sum(in_8_bits)
            maxima = sum(-(-count // 256) for count in in_8_bits)
            size = 2 * sum(in_8_bits) + 8 * maxima + 8 * in_float32 + (2048 if in_8_bits else 0)
            origin = f"formula: bitsandbytes' 8-bit AdamW, 2 bytes a trained parameter and 8 for each 256{paged}"
        else:
            size = 8 * elements
            origin = f"formula: bitsandbytes' AdamW, 8 bytes a trained parameter{paged}"
    else:
        size = sum(2 * one.nbytes for one in trained)
        if flags.fused_optimizer:
            size += 4 * len(trained)
        origin = "formula: torch's AdamW, two states in the dtype of each trained parameter"
        if run.upcasts:
            origin += ", float32 under FSDP's mixed precision"
        if flags.use_8bit_optimizer:
            why = "is for QLoRA alone" if run.step.named_optimizer else "is not taken over by this trainer's recipe"
            origin += f" (use_8bit_optimizer {why})"
    return Part(name=name, bytes=size, origin=with_share(origin, sharding.gpus if sharding else 1))


def optimizer_temporaries(plan: Plan, flags: FlatArguments, run: TrainingRun) -> int:
    """Bytes that the optimizer's step itself allocates, before they are divided among GPUs.

    torch's unfused AdamW holds the roots of all second states at once. DeepSpeed turns its share of the gradients into
    float32 (`stage_1_and_2.py`).
    """
    trained, sharding = trained_tensors(plan, run), run.sharding
    if sharding is not None and not sharding.is_fsdp:
        return 4 * sum(one.elements for one in trained)
    if flags.fused_optimizer or (plan.quantization_config is not None and run.step.named_optimizer):
        return 0
    return sum(one.nbytes for one in trained)
