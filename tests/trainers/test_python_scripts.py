"""The text of recipes in Python: what is in it, and that nothing from outside becomes code. No trainer is needed."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftload.loaders.report.handed_over import hand_over
from ftload.loaders.report.outputs import read_report
from ftload.loaders.trainers.interface import Handover
from ftload.loaders.trainers.recipe_text import recipe_text
from ftload.loaders.trainers.registry import TRAINERS

from tests.conftest import Result

Ftload = Callable[..., Result]
SCRIPTS = ("trl", "transformers", "accelerate-fsdp")
HOSTILE = 'it\'s\n"""; import os  # \\ {x} \u2028 \udc80'


@pytest.fixture(scope="module")
def qlora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Handover:
    from ftload.cli.app import run

    out = tmp_path_factory.mktemp("prepared") / "out"
    words = ["prepare", str(llama), "--use_qlora", "--lora_rank", "4", "--output_dir", str(out), "--quiet"]
    assert run([*words, "--max_seq_length", "96"]) == 0
    return hand_over(read_report(out), str(out))


def text(trainer: str, handover: Handover, **flags: Any) -> str:
    handover = dataclasses.replace(handover, flags=dataclasses.replace(handover.flags, **flags))
    return recipe_text(TRAINERS[trainer], handover, TRAINERS[trainer].file_name)


def keywords(script: str, function: str) -> dict[str, str]:
    """The arguments of the one call of `function`, as source."""
    (found,) = (
        node
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function
    )
    return {one.arg: ast.unparse(one.value) for one in found.keywords if one.arg}


def constants(script: str) -> dict[str, Any]:
    found = {}
    for node in ast.parse(script).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found[ast.unparse(node.targets[0])] = node.value.value
    return found


def notes(script: str) -> str:
    return script.split("\n\n", 1)[0].replace("\n#   ", " ")


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_whatever_comes_from_outside_stays_a_value(trainer: str, qlora: Handover) -> None:
    hostile = dataclasses.replace(
        qlora, directory=HOSTILE, model=HOSTILE, by_reference=True, revision=HOSTILE, output_dir=HOSTILE,
        messages=HOSTILE, data=(HOSTILE, HOSTILE + ".json"),
    )  # fmt: skip
    mixture = {"dataset_mixer_list": [HOSTILE, "1.0", HOSTILE + ".json", HOSTILE], "report_to": HOSTILE}
    script = text(trainer, hostile, **mixture, with_tracking=True, dataset_mixer_list_splits=[HOSTILE])
    assert {"PREPARED", "MODEL", "TRAINED"} <= constants(script).keys()
    assert {constants(script)[name] for name in ("PREPARED", "MODEL", "TRAINED")} == {HOSTILE}
    plain = text(trainer, dataclasses.replace(
        hostile, directory="x", model="x", revision="x", output_dir="x", messages="x", data=("x", "x.json"),
    ), dataset_mixer_list=["x", "1.0", "x.json", "x"], report_to="x", with_tracking=True,
        dataset_mixer_list_splits=["x"])  # fmt: skip
    strings = [[type(node) for node in ast.walk(ast.parse(one))] for one in (script, plain)]
    assert strings[0] == strings[1]  # the same code, whatever the values are
    assert [line for line in script.split("\n\n")[0].splitlines() if not line.startswith("#")] == []


@pytest.mark.parametrize(("trainer", "function"), [("trl", "SFTConfig"), ("transformers", "TrainingArguments")])
def test_the_recorded_flags_become_arguments(trainer: str, function: str, qlora: Handover) -> None:
    flags = {
        "learning_rate": 1e-4, "num_train_epochs": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.01, "clip_grad_norm": 0.5, "seed": 7,
        "use_8bit_optimizer": True, "logging_steps": 5, "checkpointing_steps": "100", "keep_last_n_checkpoints": 2,
    }  # fmt: skip
    found = keywords(text(trainer, dataclasses.replace(qlora, gradient_checkpointing=True), **flags), function)
    assert found == {
        "output_dir": "TRAINED",
        "use_cpu": "not torch.accelerator.is_available()",
        "bf16": "True",
        "num_train_epochs": "3",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "4",
        "learning_rate": "0.0001",
        "lr_scheduler_type": "'cosine'",
        "warmup_steps": "0.1",
        "weight_decay": "0.01",
        "max_grad_norm": "0.5",
        "optim": "'paged_adamw_8bit'",
        "gradient_checkpointing": "True",
        "gradient_checkpointing_kwargs": "{'use_reentrant': False}",
        "seed": "7",
        "logging_steps": "5",
        "report_to": "'none'",
        "save_strategy": "'steps'",
        "save_steps": "100",
        "save_total_limit": "2",
        **({"max_length": "None", "router_aux_loss_coef": "0.0"} if trainer == "trl" else {}),
    }


@pytest.mark.parametrize(("compute", "half"), [("float16", {"fp16": "True"}), ("float32", {"bf16": "False"})])
def test_the_run_has_the_dtype_of_its_4_bit_layers(compute: str, half: dict[str, str], qlora: Handover) -> None:
    handover = dataclasses.replace(qlora, compute_dtype=compute)
    for trainer, function in (("trl", "SFTConfig"), ("transformers", "TrainingArguments")):
        found = keywords(text(trainer, handover), function)
        assert {name: found[name] for name in ("bf16", "fp16") if name in found} == half
    accelerator = keywords(text("accelerate-fsdp", handover), "Accelerator")
    assert accelerator["mixed_precision"] == {"float16": "'fp16'", "float32": "'no'"}[compute]


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_ftload_is_imported_for_4_bit_experts_alone(trainer: str, qlora: Handover) -> None:
    assert "import ftload" not in text(trainer, qlora)
    experts = dataclasses.replace(qlora, quantised_experts=True)
    lines = text(trainer, experts).split("\n\n", 1)[1].splitlines()
    assert lines[0] == "import ftload.register  # transformers loads 4-bit experts after this"
    assert "without `import ftload.register`, transformers raises on loading" in notes(text(trainer, experts))


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_an_original_is_loaded_at_its_commit_and_trained_under_its_name(trainer: str, qlora: Handover) -> None:
    handover = dataclasses.replace(
        qlora, model="org/name", revision="0" * 40, by_reference=True, quantised=False, storage_dtype=None,
        compute_dtype=None, strategy="lora",
    )  # fmt: skip
    script = text(trainer, handover)
    assert constants(script)["MODEL"] == "org/name"
    assert keywords(script, "AutoModelForCausalLM.from_pretrained")["revision"] == f"'{'0' * 40}'"
    assert "AutoTokenizer.from_pretrained(PREPARED)" in script
    assert "prepare_model_for_kbit_training" not in script
    assert "AutoModelForCausalLM loads base and adapter as one model and trains all of it" in notes(script)


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_shares_of_data_sets_are_taken(trainer: str, qlora: Handover) -> None:
    handover = dataclasses.replace(qlora, data=("org/a", "/b.jsonl"))
    script = text(trainer, handover, dataset_mixer_list=["org/a", "0.5", "/b.jsonl", "100"], max_train_samples=50)
    assert 'part(load_dataset("org/a", split="train"), 0.5).select_columns(["messages"])' in script
    assert 'part(load_dataset("json", data_files="/b.jsonl", split="train"), 100).select_columns' in script
    assert "data = data.select(range(min(len(data), 50)))" in script
    assert "[:96]" in script
    ast.parse(script)


def test_what_trl_does_otherwise(qlora: Handover) -> None:
    assert "SFTTrainer casts a QLoRA adapter to bfloat16: the script puts" in notes(text("trl", qlora))
    lora = dataclasses.replace(qlora, quantised=False, storage_dtype=None, compute_dtype=None, strategy="lora")
    assert "bfloat16" not in notes(text("trl", lora))
    assert "all but the fused linear cross-entropy" in notes(text("trl", dataclasses.replace(lora, liger=True)))
    refusal = TRAINERS["trl"].refusal(dataclasses.replace(lora, lora_targets=("q_proj", "lm_head")))
    assert refusal is not None
    assert refusal.reason == "the head has an adapter, which SFTTrainer would not train"
    refusal = TRAINERS["trl"].refusal(dataclasses.replace(lora, rows_of_head=True))
    assert refusal is not None
    refused = TRAINERS["accelerate-fsdp"].refusal(dataclasses.replace(lora, rows_of_head=True))
    assert refused is not None
    assert refused.reason.startswith("embedding and head are one weight, rows of it are trained beside the adapter")
    refused = TRAINERS["accelerate-fsdp"].refusal(dataclasses.replace(lora, saves_tied=True))
    assert refused is not None
    assert refused.reason.startswith("embedding and head are one weight, one of them is trained beside the adapter")
    assert refusal.reason.startswith("rows of the head, or of the embedding that it is tied to, are trained")


@pytest.mark.parametrize(
    ("storage", "compute", "refused"),
    [
        ("uint8", "bfloat16", False), ("bfloat16", "bfloat16", False), ("float16", "float16", False),
        ("bfloat16", "float32", False), ("bfloat16", "float16", True), ("float16", "bfloat16", True),
    ],
)  # fmt: skip
def test_packed_codes_that_fsdp_would_cast_are_refused(
    storage: str, compute: str, refused: bool, qlora: Handover
) -> None:
    handover = dataclasses.replace(qlora, storage_dtype=storage, compute_dtype=compute)
    refusal = TRAINERS["accelerate-fsdp"].refusal(handover)
    assert (refusal is not None) == refused
    if refusal is not None:
        assert refusal.reason.startswith(
            f"its 4-bit codes are stored as {storage}, which a run in {compute} would cast"
        )
        assert refusal.hint == f"prepare it with --bnb_4bit_quant_storage {compute}"
    whole = "each GPU holds the whole 4-bit base" in notes(text("accelerate-fsdp", handover))
    assert whole == (storage == "uint8")


def test_a_refusal_ends_the_command(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--use_qlora", "--bnb_4bit_quant_storage", "bfloat16", "--bnb_4bit_compute_dtype", "float16"]
    assert ftload("prepare", llama, *flags, "--output_dir", out, "--quiet").code == 0
    result = ftload("recipe", out, "--for", "accelerate-fsdp")
    assert (result.code, result.out) == (2, "")
    assert "accelerate with FSDP2 can't train" in result.err
    assert "--bnb_4bit_quant_storage float16" in result.err
    assert ftload("recipe", out, "--for", "trl").code == 0
