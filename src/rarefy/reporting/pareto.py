"""Which of many trade-offs nobody beats."""

from __future__ import annotations

from collections.abc import Sequence


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other point matches or beats in both, by rising cost.

    Of equal points the first counts. Less is better in both.
    """
    best: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index], index)):
        if not best or points[index][1] < points[best[-1]][1]:
            best.append(index)
    return best
