"""accelerate's FSDP2: a script with a training loop of its own, for several GPUs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from .interface import Handover, Refusal, TrainingStep
from .python_script import (
    call,
    common_notes,
    constants,
    conversations,
    imports,
    literal,
    loading,
    short,
)
from .run_settings import mixed_precision


class AccelerateFsdp:
    """`Accelerator(fsdp_plugin=…)` with `fsdp_version=2`."""

    name = "accelerate-fsdp"
    title = "accelerate with FSDP2"
    tested: Mapping[str, str] = {
        "accelerate": "1.15.0",
        "transformers": "5.24.0",
        "peft": "0.21.2",
        "bitsandbytes": "0.50.2",
        "torch": "2.13.0",
    }
    file_name = "train_fsdp.py"
    language = "python"
    step = TrainingStep(autocast="never", named_optimizer=False)

    def refusal(self, handover: Handover) -> Refusal | None:
        """FSDP2 casts floating parameters to the run's dtype before it gathers them, 4-bit codes that look so too."""
        storage, compute = handover.storage_dtype, handover.compute_dtype
        if storage not in (None, "uint8") and compute != "float32" and storage != compute:
            return Refusal(
                reason=f"its 4-bit codes are stored as {storage}, which a run in {compute} would cast and so destroy",
                hint=f"prepare it with --bnb_4bit_quant_storage {compute}",
            )
        if handover.saves_tied or handover.rows_of_head:
            what = "rows of it are" if handover.rows_of_head else "one of them is"
            return Refusal(
                reason=f"embedding and head are one weight, {what} trained beside the adapter, and FSDP2 can't divide "
                "what PEFT makes of that",
                hint="take --for trl or --for transformers" if handover.saves_tied else "take --for transformers",
            )
        return None

    def notes(self, handover: Handover) -> tuple[str, ...]:
        """What FSDP2 does by itself."""
        flags, notes = handover.flags, list(common_notes(handover))
        if handover.storage_dtype == "uint8":
            notes.append(
                "Its 4-bit codes are stored as uint8, and FSDP2 divides floats alone: each GPU holds the whole 4-bit "
                "base. Prepared with --bnb_4bit_quant_storage bfloat16, it is divided too."
            )
        if handover.adapter is None or (handover.saved_modules and not handover.quantised):
            notes.append("FSDP2 makes trained bfloat16 weights float32, and computes in bfloat16; so they are saved.")
        if handover.quantised:
            notes.append("The optimizer is torch's AdamW: bitsandbytes' paged one knows no divided tensors.")
        notes.append("The loss is the mean over the trained tokens of each batch, as in Open Instruct.")
        if flags.checkpointing_steps is not None:
            notes.append("checkpointing_steps is not taken over: what is trained is saved at the end.")
        return tuple(notes)

    def launch(self, handover: Handover, file: str) -> str:
        """The plugin in the script says the rest."""
        return f"accelerate launch --num_processes 8 {shlex.quote(file)}, with as many processes as there are GPUs"

    def body(self, handover: Handover) -> str:
        """The script."""
        flags = handover.flags
        collator = "DataCollatorWithFlattening" if flags.packing else "DataCollatorForSeq2Seq"
        loader = "AutoModelForCausalLM"
        more = [
            *([] if flags.max_train_steps is not None else ["import math"]),
            "import torch",
            "from accelerate.utils import FullyShardedDataParallelPlugin, set_seed",
            *([] if handover.adapter is None else ["from torch.distributed.tensor import DTensor"]),
            "from torch.utils.data import DataLoader",
        ]
        if handover.liger:
            loader = "AutoLigerKernelForCausalLM"
            more.append("from liger_kernel.transformers import AutoLigerKernelForCausalLM")
        plugin = {
            "fsdp_version": "2",
            "auto_wrap_policy": '"transformer_based_wrap"',
            "cpu_ram_efficient_loading": "False",
        }
        accelerator = {
            "mixed_precision": literal(mixed_precision(handover)),
            "gradient_accumulation_steps": literal(flags.gradient_accumulation_steps),
            "fsdp_plugin": "plugin",
        }
        parts = [
            imports(handover, *more, accelerate=("Accelerator",), transformers=(collator, "get_scheduler")),
            constants(handover),
            "plugin = " + call("FullyShardedDataParallelPlugin", plugin) + "\n"
            "accelerator = " + call("Accelerator", accelerator) + "\n"
            f"set_seed({flags.seed})",
            loading(handover, device="accelerator.device", loader=loader),
            conversations(handover),
            _training(handover, f"{collator}()" if flags.packing else f"{collator}(tokenizer)"),
        ]
        return "\n\n".join(parts)

    def essentials(self, handover: Handover) -> str:
        """One call of `prepare` for model and optimizer."""
        return short(handover, "model, optimizer = accelerator.prepare(model, optimizer)  # fsdp_version=2")


def _training(handover: Handover, collator: str) -> str:
    """Optimizer, schedule, loop and saving."""
    flags = handover.flags
    optimizer = {
        "lr": literal(flags.learning_rate),
        "weight_decay": literal(flags.weight_decay),
        "fused": literal(flags.fused_optimizer),
    }
    rows = {"batch_size": literal(flags.per_device_train_batch_size), "shuffle": "True", "collate_fn": collator}
    schedule = {
        "num_warmup_steps": f"int({literal(flags.warmup_ratio)} * steps)",
        "num_training_steps": "steps",
    }
    steps = f"{flags.num_train_epochs} * math.ceil(len(rows) / accelerator.gradient_accumulation_steps)"
    clip = (
        "\n            if accelerator.sync_gradients:"
        f"\n                accelerator.clip_grad_norm_(model.parameters(), {literal(flags.clip_grad_norm)})"
    )
    checkpointing = '"use_reentrant": False'
    lines = [
        *(
            [f"model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={{{checkpointing}}})"]
            if handover.gradient_checkpointing
            else ()
        ),
        "trained = [value for value in model.parameters() if value.requires_grad]",
        "optimizer = " + call("torch.optim.AdamW", optimizer, first=("trained",)),
        "rows = " + call("DataLoader", rows, first=("data",)),
        "model, optimizer, rows = accelerator.prepare(model, optimizer, rows)",
        f"steps = {steps if flags.max_train_steps is None else flags.max_train_steps}",
        "schedule = " + call("get_scheduler", schedule, first=(literal(flags.lr_scheduler_type), "optimizer")),
        "",
        _LOOP.format(clip=clip if flags.clip_grad_norm > 0 else "", logging=flags.logging_steps or 10),
        _ADAPTER_STATE if handover.adapter is not None else "state = accelerator.get_state_dict(model)",
        _SAVE,
    ]
    return "\n".join(lines)


_LOOP = """\
model.train()
step = 0
while step < steps:
    for batch in rows:
        with accelerator.accumulate(model):
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss){clip}
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        schedule.step()
        step += 1
        if step % {logging} == 0 or step == steps:
            accelerator.print(f"step {{step}} of {{steps}}: loss {{loss.item():.4f}}")
        if step == steps:
            break
"""
_ADAPTER_STATE = """\
state = {
    name: value.full_tensor() if isinstance(value, DTensor) else value
    for name, value in model.named_parameters()
    if value.requires_grad
}"""
_SAVE = """\
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(TRAINED, state_dict=state)
    tokenizer.save_pretrained(TRAINED)
accelerator.end_training()
"""
