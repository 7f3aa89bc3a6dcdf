from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rarefy.reporting.pareto import frontier

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(POINTS)
def test_nobody_beats_the_frontier_and_the_frontier_beats_everybody(points: list[tuple[int, int]]) -> None:
    best = frontier(points)
    chosen = [points[index] for index in best]
    assert chosen == sorted(chosen) and len(set(chosen)) == len(chosen)
    for x, y in chosen:
        assert not any((a, b) != (x, y) and a <= x and b <= y for a, b in points)
    for x, y in points:
        assert any(a <= x and b <= y for a, b in chosen)


def test_of_equal_points_the_first_is_taken() -> None:
    assert frontier([(2, 1), (1, 2), (1, 2), (3, 3)]) == [1, 0] and frontier([]) == []
