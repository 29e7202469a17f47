"""The recipe for Open Instruct, run by its finetune.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result

from .script_runs import CASES, check_start, check_step, folder_of, needs, run_recipe

Ftload = Callable[..., Result]
CHECKOUT = folder_of("open-instruct")
TAKEN = [case for case in CASES if "experts" not in case and "packing" not in case]


@needs("trl")
@pytest.mark.skipif(
    not CHECKOUT.exists(), reason=f"no {CHECKOUT}: git clone https://github.com/allenai/open-instruct, at e6c3044aa"
)
@pytest.mark.parametrize("case", TAKEN)
def test_the_recipe_trains_what_was_prepared(
    ftload: Ftload,
    case: str,
    tiny_llama: Path,
    conversations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHECKOUT", str(CHECKOUT))
    offline = ("--push_to_hub", "false", "--try_launch_beaker_eval_jobs", "false", "--max_seq_length", "128")
    program = Path(__file__).with_name("open_instruct_on_cpu.py")
    run = run_recipe(
        ftload, "open-instruct", tiny_llama, conversations, tmp_path, *CASES[case], *offline, program=program
    )
    check_start(run)
    check_step(run, "open-instruct")
    assert run.facts["checkpointing"] == ("checkpointing" in case)
