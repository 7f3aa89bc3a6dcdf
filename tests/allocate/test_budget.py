"""Choices within a budget: what is bought first, and what all choices together could save at most."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.allocate.budget import within_budget

PRICES = (2, 3, 4)


def test_bits_go_where_they_save_most():
    costs = [[16.0, 4.0, 1.0], [1.6, 0.4, 0.1], [160.0, 40.0, 10.0]]
    assert within_budget(costs, PRICES, 6) == [0, 0, 0]
    assert within_budget(costs, PRICES, 8) == [0, 0, 2]
    assert within_budget(costs, PRICES, 9) == [1, 0, 2]
    assert within_budget(costs, PRICES, 12) == [2, 2, 2]


def test_nothing_is_bought_that_saves_nothing_or_cannot_be_paid():
    assert within_budget([[1.0, 1.0, 2.0]], PRICES, 4) == [0]
    assert within_budget([[9.0, 5.0, 1.0]], PRICES, 1) == [0]
    assert within_budget([], PRICES, 4) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.05, 0.9)), min_size=1, max_size=5), st.integers(0, 10))
def test_costs_that_fall_ever_less_are_the_least_for_what_was_spent(shapes: list[tuple[float, float]], spare: int):
    costs = [[size * fall**bits for bits in range(3)] for size, fall in shapes]
    chosen = within_budget(costs, PRICES, 2 * len(costs) + spare)
    spent = sum(PRICES[choice] for choice in chosen)
    assert spent <= 2 * len(costs) + spare
    least = min(
        sum(own[choice] for own, choice in zip(costs, every, strict=True))
        for every in itertools.product(range(3), repeat=len(costs))
        if sum(PRICES[choice] for choice in every) <= spent
    )
    assert sum(own[choice] for own, choice in zip(costs, chosen, strict=True)) == pytest.approx(least)
