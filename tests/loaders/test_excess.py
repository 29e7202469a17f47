"""Methods that train less take less; where one takes more, the part is named that is to blame."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ftload.cli.show.memory_tables import excess_words
from ftload.loaders.memory.estimate import compare_methods
from ftload.loaders.memory.training_memory import Excess, Part, TrainingMemory, excesses
from ftload.loaders.memory.training_run import TrainingRun

from ..headers import write_headers
from .plans import make_plan

SHAPES: dict[str, tuple[int, int, int, int]] = {
    "1 B": (2048, 8192, 16, 32),
    "8 B": (4096, 14_336, 32, 32),
    "70 B": (8192, 28_672, 80, 64),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llamas")
    made = {}
    for name, (hidden, intermediate, layers, heads) in SHAPES.items():
        shape = {
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
        }  # fmt: skip
        made[name] = write_headers(root / name.replace(" ", ""), "LlamaConfig", shape)
    return made


def compared(model: Path, work: Path, trainer: str, *flags: str) -> list[TrainingMemory]:
    plan, arguments = make_plan(model, work, *flags, "--max_seq_length", "2048")
    found = compare_methods(plan, arguments, TrainingRun(trainer=trainer))
    assert all(isinstance(one, TrainingMemory) for one in found)
    return [one for one in found if isinstance(one, TrainingMemory)]


CHECKPOINTING = ("--gradient_checkpointing", "--per_device_train_batch_size", "1")


@pytest.mark.parametrize(
    ("name", "trainer", "flags", "expected"),
    [
        ("1 B", "axolotl", CHECKPOINTING, {}),
        ("8 B", "open-instruct", CHECKPOINTING, {}),
        ("70 B", "open-instruct", CHECKPOINTING, {}),
        ("70 B", "trl", CHECKPOINTING, {}),
        # all activations are kept: dropout's masks and inputs of the adapters, then float32 between layers
        ("1 B", "open-instruct", (), {"lora": "activations", "qlora": "activations"}),
        ("8 B", "open-instruct", (), {"qlora": "activations"}),
        # Open Instruct puts no Liger kernels on a 4-bit base
        ("8 B", "open-instruct", ("--gradient_checkpointing", "--use_liger_kernel"), {"qlora": "logits and loss"}),
    ],
)
def test_a_method_that_takes_more_than_one_that_trains_more_is_explained(
    models: dict[str, Path], tmp_path: Path, name: str, trainer: str, flags: tuple[str, ...], expected: dict[str, str]
) -> None:
    methods = compared(models[name], tmp_path, trainer, *flags)
    assert {one.method: one.part for one in excesses(methods)} == expected
    totals = {one.method: one.total for one in methods}
    assert {later for earlier, later in pairwise(totals) if totals[later] > totals[earlier]} == {*expected}


def test_the_part_that_grew_most_is_to_blame_and_is_said_in_words(models: dict[str, Path], tmp_path: Path) -> None:
    first = compared(models["1 B"], tmp_path, "trl", *CHECKPOINTING)[0]

    def one(method: str, **sizes: int) -> TrainingMemory:
        parts = tuple(Part(name=name.replace("_", " "), bytes=size, origin="") for name, size in sizes.items())
        return replace(first, method=method, parts=parts)

    methods = [
        one("full", weights=8 * 10**9, activations=10**9),
        one("lora", weights=8 * 10**9, adapter=10**9, activations=4 * 10**9),
        one("qlora", weights=2 * 10**9, adapter=10**9, activations=6 * 10**9),
    ]
    assert list(excesses(methods)) == [
        Excess(
            method="lora", other="full", bytes=4 * 10**9, part="activations", part_bytes=4 * 10**9, other_bytes=10**9
        )
    ]
    assert excess_words(methods) == [
        "lora takes 4.00 GB more than full, for its activations: 4.00 GB instead of 1.00 GB"
    ]
    assert excess_words(methods[:1]) == []


def test_what_is_float32_beside_quantised_weights_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    def origin(trainer: str) -> Any:
        method = compared(models["1 B"], tmp_path, trainer, *CHECKPOINTING)[2]
        return next(part.origin for part in method.parts if part.name == "activations")

    assert ", float32 beside 4-bit weights" in origin("open-instruct")
    assert ", bfloat16 beside 4-bit weights" in origin("axolotl")
