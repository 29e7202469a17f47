"""Open Instruct's SFT script: a command line, for the flags are the same.

What it does was read in its source (e6c3044aa of 2026-08-20), and run with the download call taken out: before the
optimizer is made, the model equals `load_prepared`'s in every tensor.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from ..flags.declared import ADAPTER, OwnOptions, all_flags
from .interface import Handover, Refusal, TrainingStep

_REMOVED = ("add_seed_and_date_to_exp_name", "use_flash_attn")
"""Flags that its present version has no longer (docs/flags.md)."""
_ANSWERED = (
    "model_name_or_path",
    "model_revision",
    "config_name",
    "additional_model_arguments",
    "tokenizer_name_or_path",
    "tokenizer_name",
    "tokenizer_revision",
    "tokenizer_files_hash",
    "chat_template_name",
    "add_bos",
    "get_tokenizer_fn",
    "use_lora",
    "use_qlora",
    "output_dir",
    "exp_name",
    "dataset_mixer_list",
    "trust_remote_code",
)
"""Flags that the directory answers, or this file does: repeated, they would be applied a second time."""


_OF_ADAPTERS = tuple(
    flag.name for flag in all_flags().values() if flag.panel == ADAPTER and flag.group == OwnOptions.__name__
)
"""What ftload's own flags ask of an adapter."""


class OpenInstruct:
    """`accelerate launch open_instruct/finetune.py …`."""

    name = "open-instruct"
    title = "Open Instruct"
    tested: Mapping[str, str] = {"open_instruct/finetune.py": "of 2026-08-20 (e6c3044aa)"}
    file_name = "open-instruct.sh"
    language = "sh"
    step = TrainingStep(reentrant=True, quantised_liger=False)

    def refusal(self, handover: Handover) -> Refusal | None:
        """It makes its adapter itself: what it has no flag for can't be had."""
        if handover.quantised_experts:
            return Refusal(
                reason="its experts are 4-bit, and finetune.py does not import ftload.register",
                hint="prepare it with --quantize_experts false, or take --for trl",
            )
        asked = [f"--{name}" for name in _OF_ADAPTERS if name in handover.given]
        if asked:
            what = " ".join(asked)
            return Refusal(
                reason=f"it was prepared with {what}; finetune.py makes a plain adapter of its own, of seven names",
                hint=f"prepare it without {what}, or take --for trl, which trains the prepared adapter",
            )
        return None

    def notes(self, handover: Handover) -> tuple[str, ...]:
        """What the script does with the directory."""
        notes = ["Run it in a checkout of Open Instruct."]
        if _is_directory(handover):
            notes.append(
                "finetune.py downloads its model by hub id (snapshot_download) and ends with HFValidationError for a "
                "directory: the first command copies it without that call. Or upload the directory (its README.md says "
                "how), name the hub id as the model, and run finetune.py itself."
            )
        if handover.adapter is not None:
            notes.append(
                "It makes the LoRA adapter anew, from --seed: the values of the prepared one, which it does not read."
            )
        if handover.strategy == "qlora":
            notes.append("--use_qlora goes with --use_lora there: alone it trains no adapter.")
        if handover.quantised and handover.liger:
            notes.append("It puts no Liger kernels on a 4-bit base: use_liger_kernel is for full fine-tuning and LoRA.")
        notes.append(
            "--chat_template_name and --add_bos are in the tokenizer already; --add_bos a second time is an error."
        )
        notes.append(
            "FlashAttention is taken wherever it is installed: there is no --use_flash_attn any more."
            if not handover.flags.use_flash_attn
            else "FlashAttention is taken where it is installed, else sdpa."
        )
        if handover.flags.push_to_hub:
            notes.append("It uploads what it trained unless --push_to_hub and --try_launch_beaker_eval_jobs are false.")
        return tuple(notes)

    def launch(self, handover: Handover, file: str) -> str:
        """A shell script."""
        return f"bash {shlex.quote(file)}"

    def body(self, handover: Handover) -> str:
        """A copy of the script where that is needed, and the command line."""
        script = "open_instruct/finetune.py"
        lines = ["set -euo pipefail", ""]
        if _is_directory(handover):
            copy = "open_instruct/finetune_directory.py"
            lines += [
                rf"sed 's/^\( *\)snapshot_download(model_path.*/\1pass  # a directory/' {script} > {copy}",
                "",
            ]
            script = copy
        return "\n".join([*lines, _command(handover, script)]) + "\n"

    def essentials(self, handover: Handover) -> str:
        """The flags that name the directory."""
        words = ["accelerate launch --mixed_precision bf16 open_instruct/finetune.py", *_answers(handover)]
        return " \\\n  ".join(words)


def _command(handover: Handover, script: str) -> str:
    flags = handover.flags
    words = [f"accelerate launch --mixed_precision bf16 {script}", *_answers(handover)]
    words.append(f"--output_dir {shlex.quote(handover.output_dir)}")
    words.append(f"--exp_name {shlex.quote(flags.exp_name)}")
    words.append(f"--dataset_mixer_list {_typed(flags.dataset_mixer_list)}")
    for field in dataclasses.fields(flags):
        if field.name in handover.given and field.name not in (*_REMOVED, *_ANSWERED):
            words.append(f"--{field.name} {_typed(getattr(flags, field.name))}")
    return " \\\n  ".join(words)


def _answers(handover: Handover) -> list[str]:
    words = [f"--model_name_or_path {shlex.quote(handover.model)}"]
    if handover.revision is not None:
        words.append(f"--model_revision {handover.revision}")
    if handover.by_reference:
        words.append(f"--tokenizer_name_or_path {shlex.quote(handover.directory)}")
    if handover.adapter is not None:
        words.append("--use_lora true")
    if handover.quantised:
        words.append("--use_qlora true")
    if handover.trust_remote_code:
        words.append("--trust_remote_code true")
    return words


def _is_directory(handover: Handover) -> bool:
    """Whether the model is a directory, which finetune.py tries to download all the same."""
    return handover.model.startswith("/")


def _typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(shlex.quote(str(item)) for item in value) if isinstance(value, list) else shlex.quote(str(value))
