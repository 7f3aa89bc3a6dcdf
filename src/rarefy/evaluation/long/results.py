"""What a long evaluation says: answer by answer, task by task, and by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from rarefy.core.config import StrictModel
from rarefy.evaluation.bootstrap import Interval, mean_interval, paired_interval
from rarefy.evaluation.long.position import PositionCurve
from rarefy.evaluation.long.suite import LongProtocol

Mode = Literal["multi_turn", "multi_request"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Answer(StrictModel):
    """One answer, given its question and the context. ``length`` is that of the context in tokens, ``depth`` where
    in it the answer lies.

    ``nll`` and ``kl`` (reference || model) are means in nats over the answer's ``tokens``, ``top1_agreement`` a share.
    ``exact`` says whether each of them was the most probable one, which is when greedy decoding gives the answer.
    """

    task: str
    session: str
    mode: Mode
    turn: int
    length: int
    depth: float | None
    tokens: int
    nll: float
    exact: bool
    kl: float | None
    top1_agreement: float | None


class Stages(StrictModel):
    """What the life of a context cost. Generation: ``prefill_tokens_per_second``. Compression: the
    ``cache_bytes_per_token`` that are kept. Retrieval: ``step_seconds`` of a pass over a question and its answer, which
    reads them. Loading: ``load_seconds`` to have a copy of a kept cache. ``tokens``: of all contexts.
    """

    tokens: int
    prefill_tokens_per_second: float
    cache_bytes_per_token: float
    step_seconds: float
    load_seconds: float


class LongEvaluation(StrictModel):
    """One model and its cache over the whole suite."""

    model: str
    answers: tuple[Answer, ...]
    positions: PositionCurve | None
    stages: Stages | None
    protocol: LongProtocol
    bits_per_weight: dict[str, float] | None
    stored_bytes: int | None
    dense_bytes: int | None
    seconds: float


class LongComparison(StrictModel):
    """Several models over the same suite: ``candidates`` in the order given, ``reference`` None without one."""

    candidates: list[LongEvaluation]
    reference: LongEvaluation | None


class TaskSummary(StrictModel):
    """One task in one mode. ``accuracy``: share of exact answers. ``nll_change``: mean answer NLL minus the
    reference's. It and ``kl`` have intervals over answers (over sessions for the whole suite), None without one."""

    task: str
    mode: Mode | Literal["both"]
    answers: int
    accuracy: float
    reference_accuracy: float | None
    nll: float
    nll_change: Interval | None
    kl: Interval | None


def summarize(evaluation: LongEvaluation, reference: LongEvaluation | None) -> list[TaskSummary]:
    """Every task in every mode, then all of them together as task ``all``, whose units are sessions."""
    dense = {_key(answer): answer for answer in reference.answers} if reference is not None else {}
    rows = []
    for task, mode in dict.fromkeys((answer.task, answer.mode) for answer in evaluation.answers):
        own = [answer for answer in evaluation.answers if (answer.task, answer.mode) == (task, mode)]
        rows.append(_summary(task, mode, [[answer] for answer in own], dense))
    sessions: dict[tuple[str, str], list[Answer]] = {}
    for answer in evaluation.answers:
        sessions.setdefault((answer.task, answer.session), []).append(answer)
    if sessions:
        rows.append(_summary("all", "both", list(sessions.values()), dense))
    return rows


def gain(evaluation: LongEvaluation) -> float | None:
    """What the book of a language taught: answer NLL without it minus with it, in nats per token; None unless asked."""
    with_book = [answer.nll for answer in evaluation.answers if answer.task == "language"]
    without = [answer.nll for answer in evaluation.answers if answer.task == "language_without_book"]
    return None if not with_book or not without else _mean(without) - _mean(with_book)


def _summary(
    task: str, mode: Mode | Literal["both"], units: Sequence[Sequence[Answer]], dense: dict[tuple[str, ...], Answer]
) -> TaskSummary:
    answers = [answer for unit in units for answer in unit]
    nll = [_mean(answer.nll for answer in unit) for unit in units]
    change = kl = accuracy = None
    if dense:
        theirs = [_mean(dense[_key(answer)].nll for answer in unit) for unit in units]
        change = paired_interval(nll, theirs)
        kl = mean_interval([_mean(answer.kl or 0.0 for answer in unit) for unit in units])
        accuracy = _mean(dense[_key(answer)].exact for answer in answers)
    return TaskSummary(
        task=task, mode=mode, answers=len(answers), accuracy=_mean(answer.exact for answer in answers),
        reference_accuracy=accuracy, nll=_mean(nll), nll_change=change, kl=kl,
    )  # fmt: skip


def _key(answer: Answer) -> tuple[str, ...]:
    return answer.task, answer.session, answer.mode, str(answer.turn)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
