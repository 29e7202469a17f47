"""TRL's SFTTrainer: a script, for `trl sft` takes no adapter that exists."""

from __future__ import annotations

from collections.abc import Mapping

from .interface import Handover, Refusal, TrainingStep
from .python_script import call, common_notes, constants, conversations, imports, launched, loading, short
from .python_script import training_arguments as common_arguments


class Trl:
    """`SFTTrainer(model, args, train_dataset, processing_class)`, with the model loaded before."""

    name = "trl"
    title = "TRL"
    tested: Mapping[str, str] = {
        "trl": "1.16.0",
        "transformers": "5.24.0",
        "peft": "0.21.2",
        "bitsandbytes": "0.50.2",
        "torch": "2.13.0",
    }
    file_name = "train_trl.py"
    language = "python"
    step = TrainingStep(loss="chunks")

    def refusal(self, handover: Handover) -> Refusal | None:
        """It takes the weight of the head as it is stored."""
        if "lm_head" in handover.lora_targets:
            return Refusal(
                reason="the head has an adapter, which SFTTrainer would not train",
                hint="prepare it without lm_head in --lora_target_modules, or take --for transformers",
            )
        if handover.rows_of_head:
            return Refusal(
                reason="rows of the head, or of the embedding that it is tied to, are trained, and SFTTrainer can't "
                "take the head apart then (`'TrainableTokensWrapper' object has no attribute 'bias'`)",
                hint="take --for transformers",
            )
        return None

    def notes(self, handover: Handover) -> tuple[str, ...]:
        """What SFTTrainer does by itself."""
        notes = list(common_notes(handover))
        if handover.quantised:
            notes.append(
                "SFTTrainer casts a QLoRA adapter to bfloat16: the script puts the prepared float32 values back. It "
                "does no k-bit preparation: the script does."
            )
        notes.append(
            "The loss is the mean over all trained tokens of an update, over batches and devices; trained are the "
            "assistant's turns, which SFTTrainer by itself does not tell from the others."
        )
        if handover.liger:
            notes.append("Of Liger's kernels, all but the fused linear cross-entropy are used: SFTTrainer has its own.")
        if handover.flags.packing:
            notes.append("Packing is padding_free: the sequences of a batch in one row. It needs FlashAttention 2.")
        return tuple(notes)

    def launch(self, handover: Handover, file: str) -> str:
        """Several GPUs need a launcher: SFTTrainer refuses DataParallel."""
        return launched(handover, file)

    def body(self, handover: Handover) -> str:
        """The script."""
        flags = handover.flags
        arguments = {
            **common_arguments(handover),
            "max_length": "None",  # cut already; by itself SFTTrainer cuts to 1024
            "router_aux_loss_coef": repr(flags.load_balancing_weight if flags.load_balancing_loss else 0.0),
            **({"padding_free": "True"} if flags.packing else {}),
        }
        more = ["import torch", "from trl import SFTConfig, SFTTrainer"]
        parts = [
            imports(handover, *more),
            constants(handover),
            loading(handover, device="PartialState().device"),
            conversations(handover),
            "args = " + call("SFTConfig", arguments),
        ]
        trainer = "trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)"
        if handover.quantised:
            trainer = f"{_KEEP}\n{trainer}\n{_RESTORE}"
        parts.append(f"{trainer}\ntrainer.train()\ntrainer.save_model(TRAINED)\n")
        return "\n\n".join(parts)

    def essentials(self, handover: Handover) -> str:
        """The model is loaded first, and no `peft_config` is given."""
        no_config = "  # without peft_config" if handover.adapter is not None else ""
        return short(
            handover, f"trainer = SFTTrainer(model, args, train_dataset=…, processing_class=tokenizer){no_config}"
        )


_KEEP = "adapter = {name: value.data for name, value in model.named_parameters() if value.requires_grad}"
_RESTORE = """\
for name, value in adapter.items():
    model.get_parameter(name).data = value  # SFTTrainer made it bfloat16"""
