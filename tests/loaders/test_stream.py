"""The order in which a plan is carried out."""

from __future__ import annotations

from pathlib import Path

import pytest
from ftload.loaders.write.stream import in_order

from .plans import make_plan


@pytest.mark.parametrize("workers", [1, 2, 3, 1000])
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
    assert [files for files, _ in others] == [(file,) for file in model for _ in file.steps]
    for file in model:
        sizes = [step.nbytes for files, (step,) in others if files == (file,)]
        assert sizes == sorted((step.nbytes for step in file.steps), reverse=True)
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
