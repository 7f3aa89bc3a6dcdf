"""What a run of tasks says."""

from __future__ import annotations

from pydantic import Field

from rarefy.core.config import StrictModel
from rarefy.evaluation.bootstrap import Interval


class TaskScore(StrictModel):
    """One metric of one task. ``difference``: score minus that of the reference on the same examples, with a paired
    bootstrap interval; None without a reference. ``filter`` says how an answer was read out of a generated text.
    """

    task: str
    version: str
    metric: str
    filter: str = "none"
    value: float
    examples: int = Field(ge=1)
    higher_is_better: bool = True
    difference: Interval | None = None


class TaskEvaluation(StrictModel):
    """One model's scores, with what it weighs (as in ``Evaluation``) and how it was run.

    ``few_shot`` None leaves the number of examples in the prompt to each task; ``limit`` None takes every example.
    ``data``: where the examples came from. ``chunk``: tokens of a pass, None for whole sequences.
    """

    model: str
    scores: tuple[TaskScore, ...]
    limit: int | None
    few_shot: int | None
    data: str
    dtype: str
    chunk: int | None = None
    bits_per_weight: dict[str, float] | None
    stored_bytes: int | None
    dense_bytes: int | None
    seconds: float


class TaskComparison(StrictModel):
    """Several models on the same examples: ``candidates`` in the order given, ``reference`` None without one."""

    candidates: list[TaskEvaluation]
    reference: TaskEvaluation | None
