"""Recipes in Python, run as `ftload recipe` prints them by the Python of their trainer, and what must be true then."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ftload.loaders.load import load_prepared
from ftload.loaders.trainers.registry import TRAINERS
from safetensors.torch import load_file

from tests.conftest import Result

from .conftest import CONVERSATIONS
from .simulated import saved_bytes


def python_of(environment: str) -> Path:
    """Of a trainer's own environment."""
    return folder_of(environment) / "bin" / "python"


def folder_of(trainer: str) -> Path:
    """A trainer's environment, or its source: below FTLOAD_TRAINERS, or where scripts/test_trainers makes them."""
    trainers = os.environ.get("FTLOAD_TRAINERS") or Path(__file__).parents[2] / ".cache" / "trainers"
    return Path(trainers) / trainer


def needs(environment: str) -> pytest.MarkDecorator:
    """Skips where there is no such environment."""
    python = python_of(environment)
    return pytest.mark.skipif(not python.exists(), reason=f"no {python}: scripts/test_trainers makes it")


needs_environment = needs("trl")
"""The one for TRL, transformers' Trainer and accelerate."""
COMMON = [
    "--lora_rank",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--max_train_steps",
    "2",
    "--learning_rate",
    "1e-3",
    "--warmup_ratio",
    "0",
]
CASES: dict[str, list[str]] = {
    "standard": [],
    "lora copied, checkpointing": ["--use_lora", "--base", "copy", "--gradient_checkpointing", "--clip_grad_norm", "1"],
    "lora by reference": ["--use_lora", "--base", "reference"],
    "lora, packing": ["--use_lora", "--packing", "--use_flash_attn", "false"],
    "qlora": ["--use_qlora"],
    "qlora as bfloat16, checkpointing": [
        *("--use_qlora", "--bnb_4bit_quant_storage", "bfloat16", "--use_8bit_optimizer", "--gradient_checkpointing"),
    ],
    "qlora, 4-bit experts": ["--use_qlora"],
    "qlora as bfloat16, experts trained": [
        *("--use_qlora", "--lora_experts", "2", "--bnb_4bit_quant_storage", "bfloat16"),
    ],
}
"""What is prepared, by name; mixtures are those with experts."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe that was run."""

    prepared: Path
    trained: Path
    recipe: str
    facts: dict[str, Any]
    before: dict[str, torch.Tensor]
    """What is trained, as it was before the first step; names as in the files."""
    report: dict[str, Any]


def run_recipe(
    ftload: Callable[..., Result],
    trainer: str,
    model: Path,
    data: Path,
    folder: Path,
    *flags: str,
    options: tuple[str, ...] = (),
    processes: int = 0,
    environment: str = "trl",
    program: Path | None = None,
) -> Run:
    """Prepare, print the recipe, and run it; with `processes`, as torchrun does.

    A recipe that is no script is given to `program` as $RECIPE.
    """
    out = folder / 'it\'s "OUT"'
    result = ftload("prepare", "--model", model, *COMMON, *flags, "--output_dir", out, "--quiet")
    assert result.code == 0, result.err
    made = ftload("recipe", out, "--for", trainer, "--data", data)
    assert made.code == 0, made.err
    recipe = folder / ("train.py" if program is None else "recipe.yaml")
    recipe.write_text(made.out)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes else []
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    variables |= {"RECIPE": str(recipe), "ROWS": str(folder / "rows.json"), "DO_NOT_TRACK": "1"}
    variables.pop("PYTHONPATH", None)
    watched = Path(__file__).with_name("watched.py")
    run = subprocess.run(
        [python_of(environment), *launcher, watched, program or recipe, folder, *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env=variables,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    before = load_file(folder / "before.safetensors")
    return Run(
        prepared=out,
        trained=Path(f"{out}-trained"),
        recipe=made.out,
        facts=json.loads((folder / "facts.json").read_text()),
        before={name.replace(".default.", "."): value for name, value in before.items()},
        report=json.loads((out / "ftload_report.json").read_text()),
    )


def check_start(run: Run, *, dtype: torch.dtype | None = None) -> None:
    """What is trained is what was prepared, and nothing else is: tensor by tensor; made `dtype` where that is given."""
    adapter = run.prepared / "adapter" / "adapter_model.safetensors"
    stored = load_file(adapter if adapter.exists() else run.prepared / "model.safetensors")
    assert sorted(run.before) == sorted(stored)
    for name, value in stored.items():
        assert run.before[name].dtype == (dtype or value.dtype), name
        assert torch.equal(run.before[name], value if dtype is None else value.to(dtype)), name
    assert run.facts["trained"] == run.report["parameters"]["trainable"]


def check_step(run: Run, trainer: str, *, sharded: bool = False) -> None:
    """What the first step held is what the trainer's `TrainingStep` says."""
    step, seen = TRAINERS[trainer].step, run.facts["step"]
    has_adapter, quantised = (run.prepared / "adapter").exists(), run.report["quantization"] is not None
    autocast = step.autocast == "always" or (has_adapter and step.autocast == "adapters")
    tokens, rows = seen["batch"][0] * seen["batch"][1], run.report["embeddings"]["rows_after"]
    assert seen["autocast"] == autocast
    if step.loss == "chunks":
        assert seen["head"] is None
        assert not seen["saved_logits"]
    else:
        assert seen["head"] == "bfloat16"
        assert ["float32", [tokens, rows]] in seen["saved_logits"]
        assert seen["outputs"] == ("float32" if autocast else "bfloat16")
    assert seen["logits_live"] == step.keeps_outputs
    if run.facts["checkpointing"]:
        assert seen["reentrant"] == [quantised and step.reentrant]
    for name, dtype in seen["parameters"].items():
        if name in run.facts["packed"]:
            continue
        plain = name.replace(".default.", ".")
        if has_adapter and plain in run.before:
            expected = step.adapter_dtype
        elif has_adapter:
            expected = step.unquantised_dtype if quantised else "bfloat16"
        elif sharded:
            expected = "float32"
        else:
            is_wide = any(part in name for part in ("norm", "embed_tokens", "lm_head"))
            expected = step.embedding_dtype if is_wide else "bfloat16"
        assert dtype == expected, name
    assert set(seen["gradients"]) == {str(one.dtype).removeprefix("torch.") for one in run.before.values()}
    optimizer, size = seen["optimizer"]
    is_named = quantised and step.named_optimizer
    assert optimizer.partition(".")[0] == ("bitsandbytes" if is_named else "torch")
    if not sharded:
        # two states as wide as what is trained, none large enough for 8 bits here, and torch's count of steps
        steps = 0 if is_named else 4 * len(run.before)
        assert size == sum(2 * value.nbytes for value in run.before.values()) + steps
        # the logits are far more than all else, and counted apart; axolotl's first layer has a gradient to pass on
        logits = 0 if step.loss == "chunks" else 4 * tokens * rows
        passes_on = trainer == "axolotl" and has_adapter and not run.facts["checkpointing"]
        simulated = saved_bytes(run.report, trainer, run.facts["attention"], tuple(seen["batch"]))
        assert seen["saved"] - logits == pytest.approx(simulated - logits, rel=0.15 if passes_on else 0.01)


def check_end(run: Run) -> None:
    """Finite losses; the result loads, and holds what was trained: other values than before."""
    assert all(torch.tensor(run.facts["losses"]).isfinite())
    assert len(run.facts["losses"]) == 2
    if not (run.prepared / "adapter").exists():
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(run.trained, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        after = dict(model.named_parameters())
        assert all(not torch.equal(after[name].to(value.dtype), value) for name, value in run.before.items())
        return
    import ftload.register  # noqa: F401 - the experts
    from peft import AutoPeftModelForCausalLM

    config = json.loads((run.trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (
        str(run.prepared)
        if (run.prepared / "config.json").exists() and run.report["base"] == "copy"
        else run.report["adapter"]["base"]
    )
    model = AutoPeftModelForCausalLM.from_pretrained(run.trained, is_trainable=True)
    after = {name.replace(".default.", "."): value for name, value in model.named_parameters() if value.requires_grad}
    stored = load_file(run.trained / "adapter_model.safetensors")
    assert sorted(after) == sorted(stored) == sorted(run.before)
    assert all(torch.equal(after[name], value.to(after[name].dtype)) for name, value in stored.items())
    moved = [name for name, value in run.before.items() if not torch.equal(after[name], value)]
    assert any(".lora_A." in name for name in moved)
    assert any(".lora_B." in name for name in moved)


def check_like_load_prepared(run: Run) -> None:
    """The first step's loss is that of `load_prepared`'s model, without dropout: the mean over what assistants say.

    What is frozen has the same dtypes.
    """
    model, tokenizer = load_prepared(run.prepared)
    assert run.facts["frozen"] == sorted({str(one.dtype) for one in model.parameters() if not one.requires_grad})
    total, count = 0.0, 0
    for turns in CONVERSATIONS:
        ids, labels = _rendered(tokenizer, turns)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        trained = sum(label != -100 for label in labels[1:])
        total, count = total + loss.item() * trained, count + trained
    assert run.facts["losses"][0] == pytest.approx(total / count, abs=2e-3)


def check_batch(run: Run, rows: int) -> None:
    """The first batch: each row is a conversation in the chat template, and what the assistant says is trained."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.prepared)
    known = [list(_rendered(tokenizer, turns)) for turns in CONVERSATIONS]
    assert len(run.facts["batch"]) == rows
    assert all(row in known for row in run.facts["batch"])


def check_rows(run: Run, folder: Path, *, end: str) -> None:
    """What a trainer that reads the conversations by itself makes of them: the chat template's own token ids.

    Trained is what the assistant says, with the `end` of its turn.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.prepared)
    rows = json.loads((folder / "rows.json").read_text())
    assert len(rows) == len(CONVERSATIONS)
    seen = {tuple(row["input_ids"]): row["labels"] for row in rows}
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in turns]
        labels = seen[tuple(tokenizer.apply_chat_template(messages, return_dict=False))]
        trained = tokenizer.decode([label for label in labels if label != -100])
        assert trained == "".join(f"{text}{end}" for role, text in turns if role == "assistant")


def _rendered(tokenizer: Any, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """SmolLM2's template by hand: what the assistant says, to the end of its turn, is trained."""
    if turns[0][0] != "system":
        turns = [("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"), *turns]
    ids: list[int] = []
    labels: list[int] = []
    for role, text in turns:
        head, said = f"<|im_start|>{role}\n", f"{text}<|im_end|>\n"
        for piece, trained in ((head, False), (said, role == "assistant")):
            tokens = tokenizer(piece, add_special_tokens=False).input_ids
            ids += tokens
            labels += tokens if trained else [-100] * len(tokens)
    return ids, labels


def check_liger(
    ftload: Callable[..., Result], trainer: str, model: Path, data: Path, folder: Path, *, processes: int = 0
) -> list[str]:
    """The functions of Liger's that a model is run by, where it was prepared with them and a LoRA adapter."""
    options = ("--until-forward", *(("--fsdp",) if processes else ()))
    flags = ("--use_lora", "--use_liger_kernel")
    run = run_recipe(ftload, trainer, model, data, folder, *flags, options=options, processes=processes)
    check_start(run)
    return run.facts["liger"]
