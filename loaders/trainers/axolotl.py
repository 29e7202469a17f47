"""axolotl: a YAML file for `axolotl train`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .interface import Handover, Refusal, TrainingStep
from .recipe_text import yaml_text
from .run_settings import asks_for_flash, is_file, left_out, mixed_precision, mixture, optimizer, saving


class Axolotl:
    """Its keys are those of `axolotl.utils.schemas.config`."""

    name = "axolotl"
    title = "axolotl"
    tested: Mapping[str, str] = {
        "axolotl": "0.19.0",
        "transformers": "5.16.1",
        "peft": "0.20.0",
        "trl": "1.9.0",
        "accelerate": "1.13.0",
        "bitsandbytes": "0.50.2",
        "torch": "2.13.0",
    }
    file_name = "axolotl.yaml"
    language = "yaml"
    step = TrainingStep(unquantised_dtype="bfloat16", embedding_dtype="float32")

    def refusal(self, handover: Handover) -> Refusal | None:
        """It could import `ftload.register` as one of its plugins, were its transformers not too old for that."""
        if handover.quantised_experts:
            return Refusal(
                reason="its experts are 4-bit, which transformers loads after `import ftload.register`, from 5.17 on; "
                "axolotl 0.19 requires transformers 5.16.1",
                hint="prepare it with --quantize_experts false, or take --for trl",
            )
        if handover.max_length is None:
            return Refusal(
                reason="neither --max_seq_length nor the tokenizer says how long a sequence may be, and axolotl would "
                "take 512 tokens",
                hint="prepare it with --max_seq_length",
            )
        return None

    def notes(self, handover: Handover) -> tuple[str, ...]:
        """What axolotl does by itself."""
        flags, notes = handover.flags, []
        if handover.adapter is not None:
            notes.append("lora_model_dir is the prepared adapter; without it axolotl trains a fresh one.")
        if handover.quantised and handover.saved_modules:
            notes.append("What is trained of the base itself (modules_to_save) has the run's dtype too.")
        if handover.expert_adapters:
            notes.append("Adapters of experts were not tried with its PEFT 0.20.")
        if handover.quantised:
            notes.append(
                "load_in_4bit is needed, though the base is 4-bit as it is stored; it is not quantised again. Frozen "
                "embeddings, head and norms have the run's dtype, where k-bit preparation alone "
                "leaves them float32."
            )
        if handover.adapter is None:
            notes.append(
                "Norms, embeddings and head are made float32, and are saved so; all else stays bfloat16. With "
                "FlashAttention 2 they are bfloat16 again."
            )
        if handover.never_trained:
            notes.append(f"It trains what the model's class leaves alone, such as {handover.never_trained[0]}.")
        notes.append(
            "Trained is what the assistant says, and the end of its turn where that is the eos token, not the newline "
            "after it. A conversation of which nothing trained is left within sequence_len stays."
        )
        if asks_for_flash(handover):
            notes.append(
                f"FlashAttention 2 was asked for, and {handover.attention} taken where this was prepared: set "
                "attn_implementation to flash_attention_2 where it is installed."
            )
        if flags.packing and handover.attention == "eager":
            notes.append("With eager attention, packed conversations see each other.")
        if handover.adapter is not None:
            notes.append("lora_*_kernel are axolotl's own Triton kernels, which it takes by itself: off, as tested.")
        if any(share != 1.0 or isinstance(share, int) for _, _, share in mixture(handover)):
            notes.append("The shares of the data sets are not taken over: each is read whole.")
        if flags.max_train_samples is not None:
            notes.append("max_train_samples is not taken over.")
        notes.append("It reports its use to its makers unless AXOLOTL_DO_NOT_TRACK=1 is set.")
        return (*notes, *left_out(handover))

    def launch(self, handover: Handover, file: str) -> str:
        """It calls accelerate's launcher by itself."""
        return f"axolotl train {shlex.quote(file)}"

    def body(self, handover: Handover) -> str:
        """The YAML file."""
        return yaml_text(_model(handover) | _data(handover) | _training(handover))

    def essentials(self, handover: Handover) -> str:
        """The model, its tokenizer and the adapter."""
        return yaml_text(_model(handover)).rstrip("\n")


def _model(handover: Handover) -> dict[str, Any]:
    settings: dict[str, Any] = {"base_model": handover.model, "tokenizer_config": handover.directory}
    if handover.revision is not None:
        settings["revision_of_model"] = handover.revision
    if handover.trust_remote_code:
        settings["trust_remote_code"] = True
    if handover.adapter is not None:
        settings["adapter"] = "qlora" if handover.quantised else "lora"
        settings |= {"load_in_4bit": True} if handover.quantised else {}
        settings["lora_model_dir"] = handover.adapter
        settings |= {f"lora_{part}_kernel": False for part in ("qkv", "o", "mlp", "embedding")}
    settings["attn_implementation"] = handover.attention
    if handover.liger:
        settings["plugins"] = ["axolotl.integrations.liger.LigerPlugin"]
        settings |= {
            f"liger_{kernel}": True for kernel in ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")
        }
    return settings


def _data(handover: Handover) -> dict[str, Any]:
    flags = handover.flags
    return {
        "datasets": [_data_set(name, split, handover) for name, split, _ in mixture(handover)],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": f"{handover.output_dir}-data",
        "sequence_len": handover.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": flags.packing,
        "val_set_size": 0.0,
    }


def _data_set(name: str, split: str, handover: Handover) -> dict[str, Any]:
    local = {"ds_type": "json"} if is_file(name) else {}
    return {
        "path": name,
        **local,
        "split": "train" if local else split,
        "type": "chat_template",
        "field_messages": handover.messages,
    }


def _training(handover: Handover) -> dict[str, Any]:
    flags, precision = handover.flags, mixed_precision(handover)
    settings: dict[str, Any] = {
        "output_dir": handover.output_dir,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "num_epochs": flags.num_train_epochs,
        **({} if flags.max_train_steps is None else {"max_steps": flags.max_train_steps}),
        "micro_batch_size": flags.per_device_train_batch_size,
        "gradient_accumulation_steps": flags.gradient_accumulation_steps,
        "learning_rate": flags.learning_rate,
        "lr_scheduler": flags.lr_scheduler_type,
        "warmup_ratio": flags.warmup_ratio,
        "weight_decay": flags.weight_decay,
        "max_grad_norm": max(flags.clip_grad_norm, 0.0),
        "optimizer": optimizer(handover),
        "gradient_checkpointing": handover.gradient_checkpointing,
    }
    if handover.gradient_checkpointing:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    settings |= {"seed": flags.seed, "logging_steps": flags.logging_steps or 10, **saving(handover)}
    if flags.load_balancing_loss:
        settings["overrides_of_model_config"] = {
            "output_router_logits": True,
            "router_aux_loss_coef": flags.load_balancing_weight,
        }
    if flags.with_tracking:
        settings |= {"wandb_project": flags.wandb_project_name, "wandb_entity": flags.wandb_entity}
    return settings
