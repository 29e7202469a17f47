"""LLaMA-Factory: a shell script, for beside its YAML file it wants another that says where the data are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from .interface import Handover, Refusal, TrainingStep
from .recipe_text import yaml_text
from .run_settings import asks_for_flash, is_file, left_out, mixed_precision, mixture, optimizer, saving

_UNKNOWN_LENGTH = 2048
"""Tokens, where neither --max_seq_length nor the tokenizer says any: LLaMA-Factory's own default."""


class LlamaFactory:
    """`llamafactory-cli train FILE`."""

    name = "llamafactory"
    title = "LLaMA-Factory"
    tested: Mapping[str, str] = {
        "llamafactory": "0.9.5",
        "transformers": "5.6.0",
        "peft": "0.18.1",
        "bitsandbytes": "0.50.2",
        "torch": "2.13.0",
    }
    file_name = "llamafactory.sh"
    language = "sh"
    step = TrainingStep(unquantised_dtype="bfloat16", autocast="adapters")

    def refusal(self, handover: Handover) -> Refusal | None:
        """Its keys have no place for another tokenizer, nor for what makes transformers load 4-bit experts."""
        if handover.quantised_experts:
            return Refusal(
                reason="its experts are 4-bit; ftload.register needs transformers 5.17, and LLaMA-Factory refuses "
                "anything above 5.6",
                hint="prepare it with --quantize_experts false, or take --for trl",
            )
        if handover.expert_adapters:
            return Refusal(
                reason="its experts have adapters, which LLaMA-Factory's PEFT 0.18 can't load (size mismatch)",
                hint="prepare it without --lora_experts, or take --for trl",
            )
        if handover.by_reference:
            return Refusal(
                reason="its base is elsewhere, and LLaMA-Factory takes the tokenizer from where the base is",
                hint="prepare it with --base copy",
            )
        for mark, what in ((",", "at which LLaMA-Factory divides names"), ("${", "which LLaMA-Factory replaces")):
            if mark in handover.directory:
                return Refusal(reason=f"its path has `{mark}`, {what}", hint="move it; `ftload verify --fix` follows")
        return None

    def notes(self, handover: Handover) -> tuple[str, ...]:
        """What LLaMA-Factory does by itself."""
        notes = list(left_out(handover))
        if handover.quantised:
            notes.append(
                "It refuses a 4-bit base under FSDP and DeepSpeed ZeRO-3: on several GPUs, each has all of it."
            )
            notes.append("It does no k-bit preparation: embeddings, head and norms stay bfloat16.")
        notes.append(
            "It does not use the chat template as such: it takes it apart (template is not set), for conversations "
            "that begin with a system prompt or the user, and in which user and assistant take turns; others are left "
            "out. Where the template has <think>, it adds empty thoughts."
        )
        if handover.saved_modules and not handover.quantised:
            notes.append("What is trained of the base itself (modules_to_save) is made float32.")
        if handover.adapter is None and mixed_precision(handover) == "bf16":
            notes.append(
                "pure_bf16 trains the bfloat16 weights, as Open Instruct does. With bf16: true in its place, they are "
                "made float32."
            )
        if asks_for_flash(handover):
            notes.append("FlashAttention 2 is taken where it is installed, else what transformers takes by itself.")
        if handover.liger:
            notes.append("Liger's kernels are taken for the model types that LLaMA-Factory lists, else none.")
        if handover.max_length is None:
            notes.append(f"No longest sequence was given: cutoff_len is {_UNKNOWN_LENGTH} tokens.")
        if any(isinstance(share, float) and share != 1.0 for _, _, share in mixture(handover)):
            notes.append("Shares of data sets are not taken over: of each, all is trained on.")
        if handover.flags.max_train_samples is not None:
            notes.append("max_train_samples is counted for each data set.")
        return tuple(notes)

    def launch(self, handover: Handover, file: str) -> str:
        """Keys can be given anew behind it."""
        return f"bash {shlex.quote(file)}"

    def body(self, handover: Handover) -> str:
        """The two files that LLaMA-Factory reads, and the command."""
        sources = {
            f"conversations_{number}": _source(name, split, share, handover)
            for number, (name, split, share) in enumerate(mixture(handover))
        }
        return _SCRIPT.format(
            # in both, no line is END: a newline in a value is written as \n, or indented
            sources=json.dumps(sources, indent=2),
            keys=yaml_text({**_model(handover), **_settings(handover), "dataset": ",".join(sources)}),
        )

    def essentials(self, handover: Handover) -> str:
        """Where the model and its adapter are, as keys of the YAML file."""
        return "# in the YAML file of llamafactory-cli train; no template\n" + yaml_text(_model(handover))


_SCRIPT = """\
set -euo pipefail
files=$(mktemp -d)
trap 'rm -r "$files"' EXIT

cat > "$files/dataset_info.json" << 'END'
{sources}
END
cat > "$files/train.yaml" << 'END'
{keys}END
llamafactory-cli train "$files/train.yaml" "dataset_dir=$files" "$@"
"""
_ATTENTION = {"eager": "disabled", "sdpa": "sdpa", "flash_attention_2": "fa2"}


def _model(handover: Handover) -> dict[str, Any]:
    values: dict[str, Any] = {"model_name_or_path": handover.model}
    if handover.trust_remote_code:
        values["trust_remote_code"] = True
    if handover.adapter is None:
        return {**values, "finetuning_type": "full"}
    return {**values, "adapter_name_or_path": handover.adapter, "finetuning_type": "lora"}


def _settings(handover: Handover) -> dict[str, Any]:
    flags = handover.flags
    half = mixed_precision(handover)
    dtype = {"bf16": "pure_bf16" if handover.adapter is None else "bf16", "fp16": "fp16"}.get(half)
    attention = "flash_attention_2" if asks_for_flash(handover) else handover.attention
    checkpointing = handover.gradient_checkpointing
    return {
        "stage": "sft",
        "do_train": True,
        **({} if dtype is None else {dtype: True}),
        "flash_attn": _ATTENTION[attention],
        **({"use_reentrant_gc": False} if checkpointing else {"disable_gradient_checkpointing": True}),
        **({"enable_liger_kernel": True} if handover.liger else {}),
        **({"moe_aux_loss_coef": flags.load_balancing_weight} if flags.load_balancing_loss else {}),
        "cutoff_len": handover.max_length or _UNKNOWN_LENGTH,
        **({"packing": True, "neat_packing": True} if flags.packing else {}),
        **({} if flags.max_train_samples is None else {"max_samples": flags.max_train_samples}),
        "output_dir": handover.output_dir,
        "per_device_train_batch_size": flags.per_device_train_batch_size,
        "gradient_accumulation_steps": flags.gradient_accumulation_steps,
        "num_train_epochs": flags.num_train_epochs,
        **({} if flags.max_train_steps is None else {"max_steps": flags.max_train_steps}),
        "learning_rate": flags.learning_rate,
        "lr_scheduler_type": flags.lr_scheduler_type,
        "warmup_steps": flags.warmup_ratio,
        "optim": optimizer(handover),
        "weight_decay": flags.weight_decay,
        "max_grad_norm": max(flags.clip_grad_norm, 0.0),
        "seed": flags.seed,
        "logging_steps": flags.logging_steps or 10,
        "report_to": flags.report_to if flags.with_tracking else "none",
        **saving(handover),
    }


def _source(name: str, split: str, share: float | int, handover: Handover) -> dict[str, Any]:
    local = is_file(name)
    return {
        **({"file_name": name} if local else {"hf_hub_url": name, "split": split}),
        # of "openai", what is for it elsewhere, LLaMA-Factory would add "detailed thinking off" to each conversation
        "formatting": "sharegpt",
        **({"num_samples": share} if isinstance(share, int) else {}),
        "columns": {"messages": handover.messages},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
            "observation_tag": "tool",
        },
    }
