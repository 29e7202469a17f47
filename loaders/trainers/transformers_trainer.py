"""transformers' own Trainer: a script."""

from __future__ import annotations

from collections.abc import Mapping

from .interface import Handover, Refusal, TrainingStep
from .python_script import (
    call,
    common_notes,
    constants,
    conversations,
    imports,
    launched,
    loading,
    short,
    training_arguments,
)


class TransformersTrainer:
    """`Trainer(model, args, train_dataset=…, data_collator=…)`."""

    name = "transformers"
    title = "transformers' Trainer"
    tested: Mapping[str, str] = {
        "transformers": "5.24.0",
        "peft": "0.21.2",
        "bitsandbytes": "0.50.2",
        "accelerate": "1.15.0",
        "torch": "2.13.0",
    }
    file_name = "train_transformers.py"
    language = "python"
    step = TrainingStep()

    def refusal(self, handover: Handover) -> Refusal | None:
        """It trains whatever it is given."""
        return None

    def notes(self, handover: Handover) -> tuple[str, ...]:
        """What Trainer does by itself."""
        notes = [
            *common_notes(handover),
            "The loss is the mean over all trained tokens of an update, over its batches.",
        ]
        if handover.flags.packing:
            notes.append("Packing is a collator that puts the sequences of a batch in one row, without padding.")
        return tuple(notes)

    def launch(self, handover: Handover, file: str) -> str:
        """With several GPUs and no launcher, Trainer would take DataParallel."""
        return launched(handover, file)

    def body(self, handover: Handover) -> str:
        """The script."""
        collator = "DataCollatorWithFlattening" if handover.flags.packing else "DataCollatorForSeq2Seq"
        made = f"{collator}()" if handover.flags.packing else f"{collator}(tokenizer)"
        trainer = {
            "train_dataset": "data",
            "data_collator": made,
            "processing_class": "tokenizer",
        }
        names = (collator, "Trainer", "TrainingArguments")
        return "\n\n".join(
            [
                imports(handover, "import torch", transformers=names),
                constants(handover),
                loading(handover, device="PartialState().device"),
                conversations(handover),
                "args = " + call("TrainingArguments", training_arguments(handover)),
                "trainer = " + call("Trainer", trainer, first=("model", "args")) + "\n"
                "trainer.train()\ntrainer.save_model(TRAINED)\n",
            ]
        )

    def essentials(self, handover: Handover) -> str:
        """The model, loaded so that the adapter alone is trained."""
        return short(handover, "trainer = Trainer(model, args, train_dataset=…, processing_class=tokenizer)")
