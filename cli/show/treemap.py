"""Squarified treemaps: rectangles whose areas are given, nearly square, that fill a larger one.

The method is that of Bruls, Huizing and van Wijk, "Squarified Treemaps" (VisSym 2000): rectangles are laid along the
shorter side of what is left for as long as the worst ratio of sides among them does not get worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle, in whatever unit its parent has."""

    x: float
    y: float
    width: float
    height: float


def squarify(sizes: Sequence[float], whole: Rectangle) -> list[Rectangle]:
    """One rectangle for each size, in their order, with areas in proportion. `sizes` are positive and descend."""
    scale = whole.width * whole.height / sum(sizes)
    areas = [size * scale for size in sizes]
    placed: list[Rectangle] = []
    left = whole
    while len(placed) < len(areas):
        side = min(left.width, left.height)
        count = 1
        rest = areas[len(placed) :]
        while count < len(rest) and _worst(rest[: count + 1], side) <= _worst(rest[:count], side):
            count += 1
        row, left = _lay(rest[:count], left)
        placed += row
    return placed


def _worst(areas: Sequence[float], side: float) -> float:
    """The largest ratio of sides, at least 1, when these areas fill one side of that length."""
    depth = sum(areas) / side
    return max(max(area / depth**2, depth**2 / area) for area in areas)


def _lay(areas: Sequence[float], left: Rectangle) -> tuple[list[Rectangle], Rectangle]:
    """These areas along the shorter side of `left`, and what remains of it."""
    if left.width < left.height:
        turned = Rectangle(left.y, left.x, left.height, left.width)
        row, rest = _lay(areas, turned)
        return [Rectangle(r.y, r.x, r.height, r.width) for r in row], Rectangle(rest.y, rest.x, rest.height, rest.width)
    depth = min(sum(areas) / left.height, left.width)
    row = []
    y = left.y
    for area in areas:
        height = area / sum(areas) * left.height
        row.append(Rectangle(left.x, y, depth, height))
        y += height
    return row, Rectangle(left.x + depth, left.y, left.width - depth, left.height)
