"""The order in which a plan is carried out, and that it changes no byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from ftload.loaders.plan.output_files import OutputFile
from ftload.loaders.plan.planning import choose_chunk_bytes
from ftload.loaders.progress import Silent, Stopwatch
from ftload.loaders.write.stream import Task, in_order, write_tensors

from .plans import make_plan


def files_of(order: list[Task]) -> list[str]:
    """The file of each task."""
    return [file.path for (file,), _ in order]


def check_is_whole(order: list[Task], files: tuple[OutputFile, ...]) -> None:
    """Every step is there, once, and the largest of each file come first."""
    for file in files:
        steps = [step for into, (step,) in order if into == (file,)]
        assert Counter(map(id, steps)) == Counter(map(id, file.steps))
        sizes = [step.nbytes for step in steps]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_adapter_ends_with_the_hash_of_the_last_file(llama: Path, tmp_path: Path, workers: int, rank: int) -> None:
    plan, _ = make_plan(llama, tmp_path, "--use_qlora", "--lora_rank", str(rank), "--max_shard_size", "40KB")
    adapter, model = plan.adapter_file, plan.model_files
    assert adapter is not None
    assert len(model) > 1

    order = in_order(plan.files, adapter, workers)

    (place,) = (place for place, (files, _) in enumerate(order) if files == (adapter,))
    assert order[place] == ((adapter,), adapter.steps)
    others = order[:place] + order[place + 1 :]
    assert files_of(others) == [file.path for file in model for _ in file.steps]
    check_is_whole(others, model)
    after = [step.nbytes for _, (step,) in order[place + 1 :]]
    wanted = (adapter.size - model[-1].size // 4) * (workers - 1)
    if wanted <= 0:
        assert not after
    else:
        assert sum(after) >= wanted or place == 0
        assert sum(after[1:]) < wanted


def test_without_an_adapter_or_with_nothing_else(llama: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(llama, tmp_path, "--use_lora")
    adapter = plan.adapter_file
    assert adapter is not None
    assert plan.files == (adapter,)
    assert in_order(plan.files, adapter, 2) == [((adapter,), adapter.steps)]
    assert in_order((), adapter, 2) == []  # the share of another process


def nine_files(llama: Path, work: Path) -> tuple[OutputFile, ...]:
    """Files of a plan, of one to a few steps each."""
    plan, _ = make_plan(llama, work, "--max_shard_size", "16KB")
    assert len(plan.model_files) > 9
    return plan.model_files[:9]


@pytest.mark.parametrize(
    ("workers", "at_once"), [(1, 1), (3, 1), (15, 1), (16, 2), (23, 2), (25, 3), (40, 5), (65, 8), (1000, 125)]
)
def test_with_many_workers_files_are_written_beside_each_other(
    llama: Path, tmp_path: Path, workers: int, at_once: int
) -> None:
    files = nine_files(llama, tmp_path)

    order = in_order(files, None, workers)

    check_is_whole(order, files)
    groups = -(-8 // at_once)
    each = -(-8 // groups)  # as even as they can be
    expected = []
    for group in [*(files[first : min(8, first + each)] for first in range(0, 8, each)), files[8:]]:
        left = {file.path: len(file.steps) for file in group}
        while any(left.values()):
            expected += [path for path, count in left.items() if count]
            left = {path: max(0, count - 1) for path, count in left.items()}
    assert files_of(order) == expected


@pytest.mark.parametrize("workers", [3, 16, 1000])
def test_what_arrives_first_is_done_first(llama: Path, tmp_path: Path, workers: int) -> None:
    """Else workers would wait for files on their way that stand last, with work that could be done."""
    files = nine_files(llama, tmp_path)
    places = {step: place // 4 for place, step in enumerate(step for file in files for step in file.steps)}

    order = in_order(files, None, workers, places.__getitem__)

    assert Counter(files_of(order)) == {file.path: len(file.steps) for file in files}
    arrivals = [places[step] for _, (step,) in order]
    assert arrivals == sorted(arrivals)


@pytest.mark.parametrize(
    "flags",
    [
        ("--embedding_init", "reference", "--base", "copy", "--max_shard_size", "16KB"),
        ("--use_qlora", "--lora_rank", "4", "--max_shard_size", "20KB"),
        ("--use_qlora", "--lora_rank", "4", "--max_shard_size", "20KB", "--init_lora_weights", "pissa_niter_2"),
        ("--use_qlora", "--lora_rank", "4"),
    ],
    ids=["standard", "qlora", "pissa", "one file"],
)
def test_workers_change_no_byte(llama: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    plan, _ = make_plan(llama, tmp_path, *flags)
    quantisation = plan.strategy.quantisation
    encode = quantisation.choose_encoder("cpu")[0] if quantisation is not None else None
    found = []
    for workers in (1, 3, 16, 64):
        stage = tmp_path / str(workers)
        stage.mkdir()
        watch = Stopwatch(Silent())
        carried_out = replace(plan, workers=workers, chunk_bytes=128 * workers)
        found.append(write_tensors(carried_out, plan.files, encode, stage, watch, lambda *_: None).hashes)
    assert found == found[:1] * 4
    assert found[0].keys() == {file.path for file in plan.files}


@pytest.mark.parametrize(
    ("workers", "budget", "chunk"),
    [
        (2, 2 * 10**9, 2 * 2**20),
        (7, 2 * 10**9, 2 * 2**20),
        (8, 2 * 10**9, 4 * 2**20),
        (17, 2 * 10**9, 4 * 2**20),
        (65, 2 * 10**9, 2 * 10**9 // (8 * 65)),
        (65, 64 * 10**9, 4 * 2**20),
        (17, 10**8, 10**8 // (8 * 17)),
        (3, 10**6, 64 * 1024),
    ],
)
def test_chunks_are_larger_with_many_workers_within_the_budget(workers: int, budget: int, chunk: int) -> None:
    assert choose_chunk_bytes(workers, budget) == chunk
