"""The recipe for LLaMA-Factory, run by LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result

from .script_runs import CASES, Run, check_end, check_rows, check_start, check_step, needs, run_recipe

Ftload = Callable[..., Result]
PROGRAM = Path(__file__).with_name("llamafactory_on_cpu.py")
TAKEN = [case for case in CASES if not case.endswith("by reference") and "experts" not in case]


@needs("llamafactory")
@pytest.mark.parametrize("case", TAKEN)
def test_the_recipe_trains_what_was_prepared(
    ftload: Ftload, case: str, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    base = ("--base", "copy") if "--use_lora" in CASES[case] and "--base" not in CASES[case] else ()
    run = _run(ftload, tiny_llama, conversations, tmp_path, *CASES[case], *base)
    check_start(run)
    check_step(run, "llamafactory")
    check_end(run)
    assert run.facts["attention"] == run.report["attention"]["effective"]
    assert run.facts["checkpointing"] == ("checkpointing" in case)
    assert len(run.facts["packed"]) == (14 if "qlora" in case else 0)
    if "packing" not in case:
        check_rows(run, tmp_path, end="<|im_end|>\n")


@needs("llamafactory")
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
    check_step(run, "llamafactory")
    check_end(run)
    assert run.facts["packed"]


@needs("llamafactory")
def test_liger_is_patched(ftload: Ftload, tiny_llama: Path, conversations: Path, tmp_path: Path) -> None:
    flags = ("--use_lora", "--base", "copy", "--use_liger_kernel")
    run = _run(ftload, tiny_llama, conversations, tmp_path, *flags, options=("--until-forward",))
    check_start(run)
    assert run.facts["liger"]


def _run(ftload: Ftload, model: Path, data: Path, folder: Path, *flags: str, options: tuple[str, ...] = ()) -> Run:
    flags = ("--max_seq_length", "128", *flags)
    return run_recipe(
        ftload,
        "llamafactory",
        model,
        data,
        folder,
        *flags,
        options=options,
        environment="llamafactory",
        program=PROGRAM,
    )
