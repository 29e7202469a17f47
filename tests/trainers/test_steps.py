"""What is known of each trainer's step is what its recipe asks for. No trainer is needed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from ftload.loaders.flags import declared
from ftload.loaders.report.handed_over import hand_over
from ftload.loaders.report.outputs import read_report
from ftload.loaders.trainers.interface import Handover
from ftload.loaders.trainers.registry import TRAINERS

CONFIGURED = [name for name in TRAINERS if name != "open-instruct"]
"""Those that are told of checkpointing and optimizer by name; Open Instruct has flags of its own."""


@pytest.fixture(scope="module")
def qlora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Handover:
    from ftload.cli.app import run

    out = tmp_path_factory.mktemp("prepared") / "out"
    words = ["prepare", str(llama), "--use_qlora", "--lora_rank", "4", "--output_dir", str(out), "--quiet"]
    assert run([*words, "--max_seq_length", "96", "--gradient_checkpointing", "--use_liger_kernel"]) == 0
    return hand_over(read_report(out), str(out))


@pytest.fixture
def full(qlora: Handover) -> Handover:
    return dataclasses.replace(
        qlora, strategy="standard", adapter=None, quantised=False, storage_dtype=None, compute_dtype=None
    )


def test_plan_takes_the_trainers_that_are_known() -> None:
    assert tuple(TRAINERS) == declared.TRAINERS


@pytest.mark.parametrize("trainer", CONFIGURED)
def test_checkpointing_is_re_entrant_where_the_recipe_says_so(trainer: str, qlora: Handover) -> None:
    asked = re.search(r"""use_reentrant(_gc)?["']?: (\w+)""", TRAINERS[trainer].body(qlora))
    assert asked is not None
    assert (asked[2].lower() == "true") == TRAINERS[trainer].step.reentrant


def test_open_instruct_leaves_checkpointing_to_k_bit_preparation(qlora: Handover) -> None:
    assert "reentrant" not in TRAINERS["open-instruct"].body(qlora)
    assert TRAINERS["open-instruct"].step.reentrant


def test_trls_adapter_is_what_the_script_makes_of_it(qlora: Handover) -> None:
    restored = "model.get_parameter(name).data = value" in TRAINERS["trl"].body(qlora)
    assert TRAINERS["trl"].step.adapter_dtype == ("float32" if restored else "bfloat16")


@pytest.mark.parametrize("trainer", CONFIGURED)
def test_a_loss_in_chunks_is_sfttrainers(trainer: str, qlora: Handover) -> None:
    assert (TRAINERS[trainer].step.loss == "chunks") == ("SFTTrainer(" in TRAINERS[trainer].body(qlora))


@pytest.mark.parametrize("trainer", CONFIGURED)
def test_what_is_not_quantised_is_float32_where_there_is_k_bit_preparation(trainer: str, qlora: Handover) -> None:
    prepared = "prepare_model_for_kbit_training(model" in TRAINERS[trainer].body(qlora)
    assert TRAINERS[trainer].step.unquantised_dtype == ("float32" if prepared else "bfloat16")


@pytest.mark.parametrize("trainer", CONFIGURED)
def test_there_is_autocast_but_where_the_recipe_asks_for_pure_bfloat16_or_for_fsdp(
    trainer: str, full: Handover, qlora: Handover
) -> None:
    step, body = TRAINERS[trainer].step, TRAINERS[trainer].body(full)
    expected = "adapters" if "pure_bf16" in body else "never" if "FullyShardedDataParallelPlugin" in body else "always"
    assert step.autocast == expected
    assert re.search("""bf16["']?[:=] ?true|mixed_precision="bf16\"""", body, re.IGNORECASE)
    assert "pure_bf16" not in TRAINERS[trainer].body(qlora)


@pytest.mark.parametrize("trainer", CONFIGURED)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_quantised_base_has_the_optimizer_that_the_recipe_names(
    trainer: str, eight_bit: bool, qlora: Handover
) -> None:
    handover = dataclasses.replace(qlora, flags=dataclasses.replace(qlora.flags, use_8bit_optimizer=eight_bit))
    name = "paged_adamw_8bit" if eight_bit else "paged_adamw_32bit"
    assert TRAINERS[trainer].step.named_optimizer == (name in TRAINERS[trainer].body(handover))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_liger_runs_on_a_quantised_base_but_where_the_trainer_notes_that_it_does_not(
    trainer: str, qlora: Handover
) -> None:
    noted = any("no Liger kernels" in note for note in TRAINERS[trainer].notes(qlora))
    assert TRAINERS[trainer].step.quantised_liger != noted
