"""The recipe for axolotl, run by axolotl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import Result

from .script_runs import CASES, Run, check_end, check_rows, check_start, check_step, needs, run_recipe

Ftload = Callable[..., Result]
PROGRAM = Path(__file__).with_name("axolotl_on_cpu.py")
TAKEN = [case for case in CASES if "experts" not in case and case not in ("standard", "lora, packing")]


def _run(ftload: Ftload, model: Path, data: Path, folder: Path, *flags: str, options: tuple[str, ...] = ()) -> Run:
    flags = (*flags, "--max_seq_length", "128")
    return run_recipe(
        ftload, "axolotl", model, data, folder, *flags, options=options, environment="axolotl", program=PROGRAM
    )


@needs("axolotl")
@pytest.mark.parametrize("case", TAKEN)
def test_the_recipe_trains_the_prepared_adapter(
    ftload: Ftload, case: str, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    run = _run(ftload, tiny_llama, conversations, tmp_path, *CASES[case])
    check_start(run)
    check_step(run, "axolotl")
    check_end(run)
    assert run.facts["attention"] == run.report["attention"]["effective"]
    assert run.facts["checkpointing"] == ("checkpointing" in case)
    assert len(run.facts["packed"]) == (14 if "qlora" in case else 0)
    check_rows(run, tmp_path, end="<|im_end|>")
    assert yaml.safe_load(run.recipe)["chat_template"] == "tokenizer_default"


@needs("axolotl")
def test_a_standard_output_is_trained_with_float32_norms_and_embeddings(
    ftload: Ftload, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    run = _run(ftload, tiny_llama, conversations, tmp_path)
    check_step(run, "axolotl")
    widened = {name for name, value in run.before.items() if value.dtype == torch.float32}
    assert widened == {name for name in run.before if "norm" in name or "embed" in name}
    run.before.update({name: run.before[name].to(torch.bfloat16) for name in widened})
    check_start(run)  # bfloat16 values, made wider
    assert len(run.facts["losses"]) == 2
    assert all(torch.tensor(run.facts["losses"]).isfinite())
    check_rows(run, tmp_path, end="<|im_end|>")
    assert yaml.safe_load(run.recipe)["chat_template"] == "tokenizer_default"


@needs("axolotl")
def test_liger_is_patched(ftload: Ftload, tiny_llama: Path, conversations: Path, tmp_path: Path) -> None:
    run = _run(
        ftload, tiny_llama, conversations, tmp_path, "--use_lora", "--use_liger_kernel", options=("--until-forward",)
    )
    check_start(run)
    assert "LigerPlugin" in run.recipe
    assert run.facts["liger"]
