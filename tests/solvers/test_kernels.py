"""Solvers by the native library find what they find in torch."""

from __future__ import annotations

import pytest

from rarefy.kernels.cpu import library
from tests.solvers.kinds import SOLVERS, compared
from tests.solvers.problems import problem

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")


@pytest.mark.parametrize("kind", SOLVERS)
def test_solvers_find_what_they_find_in_torch(kind: str) -> None:
    weight, _, gram = problem(48, 150)
    cost, share = compared(kind, weight, gram)
    assert cost <= 1.001 and share >= 0.999
