"""The simulated training step against 20 steps that others measured on a GPU."""

from __future__ import annotations

import pytest

from .gpu_rows import DATA, GpuRow, estimate_row, read_rows

ROWS = read_rows()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_memory_is_what_a_gpu_measured(row: GpuRow) -> None:
    estimated = estimate_row(row)
    assert estimated.peak == pytest.approx(row.peak_allocated, rel=0.02)
    assert row.peak_allocated == max(row.peak_forward, row.peak_backward, row.peak_optimizer)
    assert estimated.moment != "optimizer step"
    # pieces of up to 1 MiB that the allocator does not split off are no tensor's: up to 23 MiB where weights are loaded
    assert estimated.resident == pytest.approx(row.resident_before_step, rel=0.02)
    assert estimated.resident <= row.resident_before_step
    assert estimated.optimizer_states == row.optimizer_states
    assert estimated.gradients == row.gradients
    # and up to 7 MiB in the step itself
    step = row.peak_allocated - row.resident_before_step
    assert estimated.peak - estimated.resident == pytest.approx(step, rel=0.003)
    update = row.peak_optimizer - row.resident_before_step
    assert estimated.peak_optimizer - estimated.resident == pytest.approx(update, rel=0.005)


def test_the_rows_differ_in_all_that_matters() -> None:
    assert len(ROWS) == len(set(map(str, ROWS))) == 20
    assert {row.quantization for row in ROWS} == {"nf4", "none"}
    assert {row.attention for row in ROWS} == {"eager", "sdpa"}
    assert len({row.model for row in ROWS}) == 8
    assert {estimate_row(row).moment.partition(" of ")[0] for row in ROWS} == {"loss", "backward pass"}


def test_the_rows_come_with_their_licence() -> None:
    licence = DATA.with_suffix(".LICENSE").read_text()
    assert "MIT License" in licence
    assert "Copyright (c) 2026 Anas Bouzid" in licence
