"""What a training did."""

from __future__ import annotations

from rarefy.core.config import StrictModel


class TrainingReport(StrictModel):
    """``loss``: of the first and the last tenth of ``steps``, on average; ``tokens``: that were seen, repeated ones
    each time; ``bytes``: of what was trained, as it is stored."""

    model: str
    recipe: str
    out: str | None
    data: str
    steps: int
    tokens: int
    loss: tuple[float, float]
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def first_and_last(losses: list[float]) -> tuple[float, float]:
    """Means of the first and the last tenth."""
    part = max(1, len(losses) // 10)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part
