"""The recipe for TRL, run by TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result

from .script_runs import (
    CASES,
    check_batch,
    check_end,
    check_liger,
    check_like_load_prepared,
    check_start,
    check_step,
    needs_environment,
    run_recipe,
)

Ftload = Callable[..., Result]


@needs_environment
@pytest.mark.parametrize("case", CASES)
def test_the_recipe_trains_what_was_prepared(
    ftload: Ftload, case: str, tiny_llama: Path, tiny_mixture: Path, conversations: Path, tmp_path: Path
) -> None:
    model = tiny_mixture if "experts" in case else tiny_llama
    run = run_recipe(ftload, "trl", model, conversations, tmp_path, *CASES[case], "--lora_dropout", "0")
    check_start(run)
    check_step(run, "trl")
    check_batch(run, 4)
    check_end(run)
    check_like_load_prepared(run)
    assert run.facts["checkpointing"] == ("checkpointing" in case)


@needs_environment
def test_liger_kernels_are_in_place_before_the_first_forward_pass(
    ftload: Ftload, tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    kernels = check_liger(ftload, "trl", tiny_llama, conversations, tmp_path)
    assert kernels == ["LigerRMSNorm.forward", "LigerSwiGLUMLP.forward"]
