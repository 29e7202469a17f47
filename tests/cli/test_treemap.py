"""Treemaps: areas in proportion, nothing left over, nothing twice, nearly square."""

from __future__ import annotations

import pytest
from ftload.cli.show.treemap import Rectangle, squarify
from hypothesis import example, given
from hypothesis import strategies as st


def test_the_paper_s_example() -> None:
    """Figure 4 of the paper: 6, 6, 4, 3, 2, 2, 1 in 6 × 4."""
    placed = squarify([6, 6, 4, 3, 2, 2, 1], Rectangle(0, 0, 6, 4))
    expected = [
        (0, 0, 3, 2),
        (0, 2, 3, 2),
        (3, 0, 12 / 7, 7 / 3),
        (3 + 12 / 7, 0, 9 / 7, 7 / 3),
        (3, 7 / 3, 6 / 5, 5 / 3),
        (4.2, 7 / 3, 6 / 5, 5 / 3),
        (5.4, 7 / 3, 3 / 5, 5 / 3),
    ]
    assert [(r.x, r.y, r.width, r.height) for r in placed] == [pytest.approx(one) for one in expected]


@given(
    sizes=st.lists(st.integers(1, 10**12), min_size=1, max_size=30),
    width=st.floats(1, 1000),
    height=st.floats(1, 1000),
)
@example(sizes=[178_218_148_757, 391, *[1] * 8], width=21.0, height=372.0)
def test_rectangles_tile_the_whole(sizes: list[int], width: float, height: float) -> None:
    sizes.sort(reverse=True)
    whole = Rectangle(5, 7, width, height)
    placed = squarify(sizes, whole)
    slack = 1e-6 * max(width, height)
    for size, one in zip(sizes, placed, strict=True):
        # a billionth of the whole is what rounding may make of an area, and no eye can see
        expected = size / sum(sizes) * width * height
        assert one.width * one.height == pytest.approx(expected, rel=1e-5, abs=1e-9 * width * height)
        assert one.x >= 5 - slack
        assert one.y >= 7 - slack
        assert one.x + one.width <= 5 + width + slack
        assert one.y + one.height <= 7 + height + slack
    for number, one in enumerate(placed):
        for other in placed[:number]:
            overlap_x = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
            overlap_y = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
            assert overlap_x <= slack or overlap_y <= slack
