"""The recipe for LLaMA-Factory, run by LLaMA-Factory."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import Result

from .conftest import CONVERSATIONS
from .script_runs import CASES, COMMON, Run, check_end, check_start

Ftload = Callable[..., Result]
HERE = Path(__file__).parent
TRAINERS = os.environ.get("FTLOAD_TRAINERS") or HERE.parents[1] / ".cache" / "trainers"
PYTHON = Path(TRAINERS) / "llamafactory" / "bin" / "python"
needs_environment = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: scripts/test_trainers makes it")
TAKEN = [case for case in CASES if not case.endswith("by reference") and "experts" not in case]


@needs_environment
@pytest.mark.parametrize("case", TAKEN)
def test_the_recipe_trains_what_was_prepared(
    ftload: Ftload, case: str, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    base = ("--base", "copy") if "--use_lora" in CASES[case] and "--base" not in CASES[case] else ()
    run = _run(ftload, tiny_llama, conversations, tmp_path, *CASES[case], *base)
    check_start(run)
    check_end(run)
    assert run.facts["attention"] == run.report["attention"]["effective"]
    assert run.facts["checkpointing"] == ("checkpointing" in case)
    assert len(run.facts["packed"]) == (14 if "qlora" in case else 0)
    if "packing" not in case:
        _check_rows(run, tmp_path)


@needs_environment
def test_a_mixture_is_trained(ftload: Ftload, tiny_mixture: Path, conversations: Path, tmp_path: Path) -> None:
    run = _run(
        ftload,
        tiny_mixture,
        conversations,
        tmp_path,
        "--use_qlora",
        "--quantize_experts",
        "false",
        "--min_quantized",
        "30",
    )
    check_start(run)
    check_end(run)
    assert run.facts["packed"]


@needs_environment
def test_liger_is_patched(ftload: Ftload, tiny_llama: Path, conversations: Path, tmp_path: Path) -> None:
    flags = ("--use_lora", "--base", "copy", "--use_liger_kernel")
    run = _run(ftload, tiny_llama, conversations, tmp_path, *flags, options=("--until-forward",))
    check_start(run)
    assert run.facts["liger"]


def _run(ftload: Ftload, model: Path, data: Path, folder: Path, *flags: str, options: tuple[str, ...] = ()) -> Run:
    out = folder / 'it\'s "OUT"'
    result = ftload(
        "prepare", "--model", model, *COMMON, "--max_seq_length", "128", *flags, "--output_dir", out, "--quiet"
    )
    assert result.code == 0, result.err
    recipe = folder / "recipe.sh"
    made = ftload("recipe", out, "--for", "llamafactory", "--data", data, "--output", recipe)
    assert made.code == 0, made.err
    variables = {
        **os.environ,
        "RECIPE": str(recipe),
        "FOLDER": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    variables.pop("PYTHONPATH", None)
    run = subprocess.run(
        [PYTHON, HERE / "watched.py", HERE / "llamafactory_on_cpu.py", folder, *options],
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
        recipe=recipe.read_text(),
        facts=json.loads((folder / "facts.json").read_text()),
        before={name.replace(".default.", "."): value for name, value in before.items()},
        report=json.loads((out / "ftload_report.json").read_text()),
    )


def _check_rows(run: Run, folder: Path) -> None:
    """The chat template's own token ids; trained is what the assistant says, its turn's end included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.prepared)
    rows = json.loads((folder / "rows.json").read_text())
    assert len(rows) == len(CONVERSATIONS)
    seen = {tuple(row["input_ids"]): row["labels"] for row in rows}
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in turns]
        labels = seen[tuple(tokenizer.apply_chat_template(messages, return_dict=False))]
        trained = tokenizer.decode([label for label in labels if label != -100])
        assert trained == "".join(f"{text}<|im_end|>\n" for role, text in turns if role == "assistant")
