"""Two thousand hostile inputs; `scripts/fuzz` runs as many as there is time for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from .cases import cases
from .run import check, write_bases

CASES = 2000
SHARES = 4
"""Tests that the cases are divided among: pytest's workers can take them in parallel."""


@pytest.mark.parametrize("share", range(SHARES))
def test_hostile_input_ends_in_one_line(tmp_path: Path, share: int) -> None:
    bases = write_bases(tmp_path / "bases")

    @seed(share)
    @settings(
        max_examples=CASES // SHARES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def hunt(data: st.DataObject) -> None:
        case = data.draw(cases(bases))
        check(case, bases, tmp_path / "work")

    hunt()
