"""What recipes in Python have in common: a prepared directory loaded as `load_prepared` does it, and conversations.

Whatever comes from outside is written as a Python literal: no path, name or column can become code.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from .interface import Handover
from .run_settings import asks_for_flash, is_file, left_out, mixed_precision, mixture, optimizer, saving


def literal(value: Any) -> str:
    """A value as Python source."""
    if isinstance(value, float) and not isfinite(value):
        return f'float("{value}")'
    text = repr(value)
    # double quotes where that changes nothing, as the rest of the script is written
    return f'"{text[1:-1]}"' if isinstance(value, str) and text[0] == "'" and '"' not in text else text


def call(function: str, arguments: Mapping[str, str], *, first: Iterable[str] = ()) -> str:
    """A call whose values are expressions: on one line, or with an argument on each."""
    pieces = [*first, *(f"{name}={expression}" for name, expression in arguments.items())]
    line = f"{function}({', '.join(pieces)})"
    return line if len(line) <= 100 else f"{function}(\n" + "".join(f"    {piece},\n" for piece in pieces) + ")"


def imports(
    handover: Handover, *more: str, accelerate: tuple[str, ...] = (), transformers: tuple[str, ...] = ()
) -> str:
    """The script's imports: what the common pieces use, `more` lines, and further names of two libraries."""
    names = sorted(("AutoModelForCausalLM", "AutoTokenizer", *transformers), key=lambda name: (name[0].islower(), name))
    several = "concatenate_datasets, " if len(mixture(handover)) > 1 else ""
    lines = {
        f"from accelerate import {', '.join((*accelerate, 'PartialState'))}",
        f"from datasets import {several}load_dataset",
        f"from transformers import {', '.join(names)}",
        *more,
    }
    if handover.adapter is not None:
        lines.add("from peft import PeftModel" + ", prepare_model_for_kbit_training" * handover.quantised)
    if asks_for_flash(handover):
        lines.add("from transformers.utils import is_flash_attn_2_available")
    if handover.quantised_experts:
        lines.add("import ftload.register  # transformers loads 4-bit experts after this")
    return "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line)))


def constants(handover: Handover) -> str:
    """Where things are."""
    lines = [f"PREPARED = {literal(handover.directory)}"]
    if handover.by_reference:
        lines.append(f"MODEL = {literal(handover.model)}  # the base is not in the prepared directory")
    else:
        lines.append("MODEL = PREPARED")
    lines.append(f"TRAINED = {literal(handover.output_dir)}")
    return "\n".join(lines)


def loading(handover: Handover, *, device: str | None, loader: str = "AutoModelForCausalLM") -> str:
    """The tokenizer and the model, its prepared adapter included, as `load_prepared` returns them.

    `device` is an expression; None leaves the model where it is loaded. Gradient checkpointing is the trainer's.
    """
    remote = {"trust_remote_code": "True"} if handover.trust_remote_code else {}
    arguments = {
        **({"revision": literal(handover.revision)} if handover.revision is not None else {}),
        "dtype": '"bfloat16"',
        "attn_implementation": _attention(handover),
        **({"device_map": f'{{"": {device}}}'} if device is not None else {}),
        **remote,
    }
    tokenizer = "".join(f", {name}={value}" for name, value in remote.items())
    lines = [
        f"tokenizer = AutoTokenizer.from_pretrained(PREPARED{tokenizer})",
        "model = " + call(f"{loader}.from_pretrained", arguments, first=("MODEL",)),
    ]
    if handover.by_reference:
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id  # the base has its own")
    lines += [
        f"model.get_parameter({literal(name)}).requires_grad_(False)  # the model's class makes it without a gradient"
        for name in handover.never_trained
    ]
    if handover.flags.load_balancing_loss:
        lines.append("model.config.output_router_logits = True")
        lines.append(f"model.config.router_aux_loss_coef = {literal(handover.flags.load_balancing_weight)}")
    if handover.adapter is not None:
        lines += adapter_lines(handover)
        lines.append(
            'model.peft_config["default"].base_model_name_or_path = MODEL  # what the result names as its base'
        )
    return "\n".join(lines)


def adapter_lines(handover: Handover) -> list[str]:
    """The prepared adapter, to be trained, on the loaded base."""
    kbit = ["model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)"]
    return [
        *(kbit if handover.quantised else ()),
        'model = PeftModel.from_pretrained(model, f"{PREPARED}/adapter", is_trainable=True)',
    ]


def short(handover: Handover, *more: str) -> str:
    """The lines without which a script goes wrong, `more` at their end."""
    lines = ["import ftload.register"] if handover.quantised_experts else []
    lines.append(f"PREPARED = {literal(handover.directory)}")
    revision = f", revision={literal(handover.revision)}" if handover.revision is not None else ""
    model = literal(handover.model) if handover.by_reference else "PREPARED"
    lines.append(f'model = AutoModelForCausalLM.from_pretrained({model}{revision}, dtype="bfloat16")')
    if handover.adapter is not None:
        lines += adapter_lines(handover)
    return "\n".join([*lines, "tokenizer = AutoTokenizer.from_pretrained(PREPARED)", *more]) + "\n"


def conversations(handover: Handover) -> str:
    """`data`: rows of `input_ids` and `labels`, made and masked as Open Instruct's `sft_tulu_tokenize_and_truncate_v1`.

    Each row is a conversation in the tokenizer's chat template; what the assistant does not say is -100 in `labels`.
    """
    column = literal(handover.messages)
    cut = "" if handover.max_length is None else f"[:{handover.max_length}]"
    mixed = mixture(handover)
    sources = [_source(name, split, share, handover) for name, split, share in mixed]
    lines = [_TOKENIZE.format(column=column, cut=cut)]
    if any(share != 1.0 for _, _, share in mixed):
        lines.append(_PART.format(seed=handover.flags.seed))
    if len(sources) == 1:
        data = sources[0]
    else:
        each = "".join(f"        {source}.select_columns([{column}]),\n" for source in sources)
        data = f"concatenate_datasets([\n{each}    ])"
    made = [f"data = {data}"]
    if handover.flags.max_train_samples is not None:
        made.append(f"data = data.select(range(min(len(data), {handover.flags.max_train_samples})))")
    made.append("data = data.map(tokenize, remove_columns=data.column_names)")
    made.append('data = data.filter(lambda row: any(label != -100 for label in row["labels"]))')
    lines.append("with PartialState().local_main_process_first():  # the others read what it has cached")
    return "\n".join([*lines, *(f"    {line}" for line in made)])


_TOKENIZE = """\

def tokenize(row):
    \"\"\"A conversation in the chat template; the loss is on what the assistant says alone.\"\"\"
    turns = row[{column}]

    def ids(some, **options):
        return tokenizer.apply_chat_template(some, return_dict=False, **options){cut}

    labels = ids(turns)
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            start = len(ids(turns[:index])) if index else 0
            answered = turns[index + 1 : index + 2] and turns[index + 1]["role"] == "assistant"
            end = len(ids(turns[: index + 1], add_generation_prompt=bool(answered)))
            labels[start:end] = [-100] * len(labels[start:end])
    return {{"input_ids": ids(turns), "labels": labels}}

"""
_PART = """\
def part(rows, share):
    \"\"\"A share of a data set, or so many of its rows, in random order; beyond its end, rows come again.\"\"\"
    count = int(share * len(rows)) if isinstance(share, float) else share
    return rows.shuffle(seed={seed}).select([index % len(rows) for index in range(count)])

"""


def training_arguments(handover: Handover) -> dict[str, str]:
    """transformers' `TrainingArguments` from the recorded flags: names and expressions."""
    flags = handover.flags
    steps = flags.max_train_steps
    return {
        "output_dir": "TRAINED",
        "use_cpu": "not torch.accelerator.is_available()",
        **{dtype: literal(on) for dtype, on in _half(handover).items()},
        **({"max_steps": literal(steps)} if steps is not None else {}),
        "num_train_epochs": literal(flags.num_train_epochs),
        "per_device_train_batch_size": literal(flags.per_device_train_batch_size),
        "gradient_accumulation_steps": literal(flags.gradient_accumulation_steps),
        "learning_rate": literal(flags.learning_rate),
        "lr_scheduler_type": literal(flags.lr_scheduler_type),
        "warmup_steps": literal(flags.warmup_ratio),
        "weight_decay": literal(flags.weight_decay),
        "max_grad_norm": literal(max(flags.clip_grad_norm, 0.0)),
        "optim": literal(optimizer(handover)),
        "gradient_checkpointing": literal(handover.gradient_checkpointing),
        **({"gradient_checkpointing_kwargs": '{"use_reentrant": False}'} if handover.gradient_checkpointing else {}),
        **({"use_liger_kernel": "True"} if handover.liger else {}),
        "seed": literal(flags.seed),
        "logging_steps": literal(flags.logging_steps or 10),
        "report_to": literal(flags.report_to if flags.with_tracking else "none"),
        **{name: literal(value) for name, value in saving(handover).items()},
    }


def common_notes(handover: Handover) -> tuple[str, ...]:
    """What is so of each of these scripts."""
    notes = []
    if handover.by_reference:
        notes.append(
            "The base is not in the directory, which holds the tokenizer and the adapter: given the directory alone, "
            "AutoModelForCausalLM loads base and adapter as one model and trains all of it."
        )
    elif handover.adapter is not None:
        notes.append("Given the directory alone, a trainer that knows no adapter trains the base itself.")
    if handover.quantised_experts:
        notes.append("Its experts are 4-bit: without `import ftload.register`, transformers raises on loading.")
    notes += left_out(handover)
    if asks_for_flash(handover):
        notes.append(f"FlashAttention 2 is taken where it is installed, else {handover.attention}.")
    return tuple(notes)


def launched(handover: Handover, file: str) -> str:
    """On one GPU or several."""
    return f"accelerate launch {shlex.quote(file)}"


def _attention(handover: Handover) -> str:
    here = literal(handover.attention)
    return f'"flash_attention_2" if is_flash_attn_2_available() else {here}' if asks_for_flash(handover) else here


def _half(handover: Handover) -> dict[str, bool]:
    word = mixed_precision(handover)
    return {"fp16": True} if word == "fp16" else {"bf16": word == "bf16"}


def _source(name: str, split: str, share: float | int, handover: Handover) -> str:
    if is_file(name):
        source = f'load_dataset("json", data_files={literal(name)}, split="train")'
    else:
        source = f"load_dataset({literal(name)}, split={literal(split)})"
    return source if share == 1.0 and isinstance(share, float) else f"part({source}, {literal(share)})"
