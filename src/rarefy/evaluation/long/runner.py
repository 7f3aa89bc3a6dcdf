"""Running sessions: a context is encoded once, and both ways of asking about it start from copies of its cache."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rarefy.core.errors import OptionError
from rarefy.core.memory import available_bytes
from rarefy.core.progress import progress
from rarefy.evaluation.candidates import Candidate, check_length, plan_passes
from rarefy.evaluation.divergence import first_max
from rarefy.evaluation.forward import cache_bytes, fork, new_cache, step
from rarefy.evaluation.journal import Journal
from rarefy.evaluation.long.material import Material
from rarefy.evaluation.long.position import position_curve
from rarefy.evaluation.long.results import MODES, Answer, LongComparison, LongEvaluation, Mode, Stages
from rarefy.evaluation.long.sessions import Session
from rarefy.evaluation.long.suite import POSITIONS, LongProtocol, make_sessions
from rarefy.evaluation.results import Sizes
from rarefy.evaluation.scoring import Scorer
from rarefy.sources.windows import tokenize, windows

Logits = dict[tuple[Mode, int], torch.Tensor]


def evaluate_long(
    candidates: Sequence[Candidate],
    tokenizer: Any,
    text: str,
    protocol: LongProtocol,
    *,
    reference: Candidate | None = None,
    sessions: Sequence[Session] = (),
    begin: int | None = None,
    work_dir: Path | None = None,
    free_bytes: int | None = None,
) -> LongComparison:
    """Answers of every model in the sessions of ``protocol`` (made of ``text``) and in the given ``sessions``, in both
    modes, and likelihood by position.

    In mode multi_request each question meets the context alone; in multi_turn also the questions and right answers
    before it. Answers are scored as the tokens that follow their question, against those of the ``reference`` too,
    which runs beside the candidates. ``begin``: the token that starts every sequence, if any. ``work_dir`` keeps
    finished sessions of models that live in folders. Raises OptionError, UnsupportedError.
    """
    everyone = [*candidates] if reference is None else [reference, *candidates]
    if not everyone:
        raise OptionError("There is no model to evaluate; name at least one.")
    units: list[Session | str] = [*make_sessions(Material(tokenizer, text), protocol), *sessions]
    if POSITIONS in protocol.tasks:
        units.append(POSITIONS)
    run = _Run(tokenizer, text, protocol, begin, Journal(work_dir), reference)
    free = available_bytes() if free_bytes is None else free_bytes
    outcomes: dict[int, list[dict[str, Any]]] = {index: [] for index in range(len(everyone))}
    dtypes: dict[int, str] = {}
    passes = plan_passes(candidates, reference, free) or [[]]
    offset = 0 if reference is None else 1
    with progress("long", len(units) * (len(candidates) + (len(passes) if reference else 0))) as advance:
        for number, group in enumerate(passes):
            members = ([] if reference is None else [0]) + [index + offset for index in group]
            opened = _Opened([everyone[index] for index in members])
            for unit in units:
                found = run.unit(unit, [everyone[index] for index in members], opened)
                for index, outcome in zip(members, found, strict=True):
                    dtypes[index] = outcome["dtype"]
                    if index or reference is None or number == 0:
                        outcomes[index].append(outcome)
                advance(len(members), unit if isinstance(unit, str) else unit.task)
            opened.close()
    results = [
        _result(candidate, outcomes[index], protocol.model_copy(update={"dtype": dtypes.get(index, "")}))
        for index, candidate in enumerate(everyone)
    ]
    dense = None if reference is None else results.pop(0)
    return LongComparison(candidates=results, reference=dense)


class _Opened:
    """The models of a pass, loaded when the first of them has something to do."""

    def __init__(self, candidates: Sequence[Candidate]):
        self._candidates = candidates
        self._models: list[Any] | None = None

    @property
    def models(self) -> list[Any]:
        if self._models is None:
            self._models = [candidate.open() for candidate in self._candidates]
            for model in self._models:
                model.eval()
        return self._models

    def close(self) -> None:
        if self._models is not None:
            for candidate, model in zip(self._candidates, self._models, strict=True):
                candidate.share_read(model)  # warns where a plan stayed dense
        self._models = None
        gc.collect()  # models hold reference cycles, and the next pass needs their memory


class _Run:
    """What all units share."""

    def __init__(
        self,
        tokenizer: Any,
        text: str,
        protocol: LongProtocol,
        begin: int | None,
        journal: Journal,
        reference: Candidate | None,
    ):
        self._tokenizer, self._text, self._protocol, self._begin = tokenizer, text, protocol, begin
        self._journal, self._reference = journal, reference
        self._scorer = Scorer()

    def unit(self, unit: Session | str, candidates: Sequence[Candidate], opened: _Opened) -> list[dict[str, Any]]:
        """The outcome of one unit for every candidate of a pass, the reference first if there is one."""
        keys = [self._key(unit, candidate) for candidate in candidates]
        kept = [None if key is None else self._journal.take(key) for key in keys]
        if all(outcome is not None for outcome in kept):
            return kept  # type: ignore[return-value]
        found = (
            self._positions(candidates, opened.models)
            if isinstance(unit, str)
            else self._session(unit, candidates, opened.models)
        )
        for key, outcome, model in zip(keys, found, opened.models, strict=True):
            outcome["dtype"] = str(model.dtype).removeprefix("torch.")
            if key is not None:
                self._journal.keep(key, outcome)
        return found

    def _key(self, unit: Session | str, candidate: Candidate) -> dict[str, Any] | None:
        against = None if self._reference is None else self._reference.identity
        if candidate.identity is None or (self._reference is not None and against is None):
            return None
        if isinstance(unit, str):  # likelihood by position, which the text and its cut decide
            what: Any = {
                "positions": hashlib.sha256(self._text.encode()).hexdigest(), "length": self._protocol.length,
                "documents": self._protocol.documents,
            }  # fmt: skip
        else:
            what = unit.model_dump(mode="json")
        return {
            "long": what, "chunk": self._protocol.chunk, "begin": self._begin, "model": candidate.identity,
            # The reference is compared to nothing, also where a candidate is the same model.
            "reference": None if candidate is self._reference else against,
        }  # fmt: skip

    def _session(
        self, session: Session, candidates: Sequence[Candidate], models: Sequence[Any]
    ) -> list[dict[str, Any]]:
        expected: Logits = {}
        found = []
        for candidate, model in zip(candidates, models, strict=True):
            begin = time.perf_counter()
            outcome = self._answers(session, candidate, model, expected)
            found.append({**outcome, "seconds": time.perf_counter() - begin})
        return found

    @torch.inference_mode()
    def _answers(
        self, session: Session, candidate: Candidate, model: Any, expected: Logits
    ) -> dict[str, Any]:
        """All answers of one model; the reference leaves its logits in ``expected`` for those that come after it."""
        context = self._tokens(session.context)
        if self._begin is not None:
            context = torch.cat([torch.tensor([self._begin]), context])
        asked = [(self._tokens(turn.prompt), self._tokens(turn.answer)) for turn in session.turns]
        check_length(model, candidate.name, len(context) + sum(len(prompt) + len(answer) for prompt, answer in asked))
        past = new_cache(model, candidate.cache)
        start = time.perf_counter()
        for part in context.split(self._protocol.chunk):
            step(model, part[None], past, last=1)
        stages = {"tokens": len(context), "prefill": time.perf_counter() - start, "bytes": cache_bytes(past)}
        stages |= {"load": 0.0, "loads": 0, "step": 0.0, "steps": 0}
        talk = self._copy(past, stages)
        answers = []
        for number, (turn, (prompt, answer)) in enumerate(zip(session.turns, asked, strict=True)):
            # The first question meets the same in both ways, so that it is put once.
            ways: list[tuple[Mode, Any]] = [("multi_turn", talk)]
            if number:
                ways.append(("multi_request", self._copy(past, stages)))
            for mode, used in ways:
                start = time.perf_counter()
                logits = step(model, torch.cat([prompt, answer])[None], used, last=len(answer) + 1)[0, :-1]
                stages["step"] += time.perf_counter() - start
                stages["steps"] += 1
                scores = self._scorer.score(logits, answer, expected.get((mode, number)))
                if candidate is self._reference:
                    expected[mode, number] = logits.clone()
                answer_found = Answer(
                    task=session.task, session=session.id, mode=mode, turn=number, length=len(context),
                    depth=turn.depth, tokens=len(answer), nll=float(scores.nll.double().mean()),
                    exact=bool((first_max(logits.float()) == answer.to(logits.device)).all()),
                    kl=None if scores.kl is None else max(0.0, float(scores.kl.double().mean())),
                    top1_agreement=None if scores.agree is None else float(scores.agree.double().mean()),
                ).model_dump(mode="json")  # fmt: skip
                answers += [answer_found] if number else [{**answer_found, "mode": each} for each in MODES]
        return {"answers": answers, "stages": stages}

    @torch.inference_mode()
    def _positions(self, candidates: Sequence[Candidate], models: Sequence[Any]) -> list[dict[str, Any]]:
        """NLL and KL of every token of the documents; all models go through each together, chunk by chunk."""
        rows = windows(tokenize(self._tokenizer, self._text), self._protocol.length, None, self._begin)
        rows = rows[: self._protocol.documents]
        found: list[dict[str, Any]] = [{"nll": [], "kl": [], "seconds": 0.0} for _ in candidates]
        for candidate, model in zip(candidates, models, strict=True):
            check_length(model, candidate.name, rows.shape[1])
        for row in rows:
            pasts = [new_cache(model, candidate.cache) for candidate, model in zip(candidates, models, strict=True)]
            nll: list[list[float]] = [[] for _ in candidates]
            kl: list[list[float]] = [[] for _ in candidates]
            for start in range(0, len(row), self._protocol.chunk):
                part = row[start : start + self._protocol.chunk]
                targets = row[start + 1 : start + 1 + len(part)]
                expected: torch.Tensor | None = None
                for index, candidate in enumerate(candidates):
                    begin = time.perf_counter()
                    logits = step(models[index], part[None], pasts[index])[0, : len(targets)]
                    if not len(targets):
                        continue
                    scores = self._scorer.score(logits, targets, expected)
                    if candidate is self._reference:
                        expected = logits
                    nll[index] += scores.nll.double().tolist()
                    kl[index] += [] if scores.kl is None else scores.kl.double().tolist()
                    found[index]["seconds"] += time.perf_counter() - begin
            for index in range(len(candidates)):
                found[index]["nll"].append(nll[index])
                found[index]["kl"].append(kl[index])
        return found

    def _copy(self, past: Any, stages: dict[str, Any]) -> Any:
        start = time.perf_counter()
        twin = fork(past)
        stages["load"] += time.perf_counter() - start
        stages["loads"] += 1
        return twin

    def _tokens(self, text: str) -> torch.Tensor:
        return tokenize(self._tokenizer, text)


def _result(candidate: Candidate, outcomes: Sequence[dict[str, Any]], protocol: LongProtocol) -> LongEvaluation:
    answers = tuple(Answer.model_validate(answer) for outcome in outcomes for answer in outcome.get("answers", ()))
    places = next((outcome for outcome in outcomes if "nll" in outcome), None)
    stages = [outcome["stages"] for outcome in outcomes if "stages" in outcome]
    sizes = candidate.sizes or Sizes()
    return LongEvaluation(
        model=candidate.name, answers=answers, protocol=protocol, stages=_stages(stages) if stages else None,
        positions=None if places is None else position_curve(
            np.asarray(places["nll"]), np.asarray(places["kl"]) if places["kl"][0] else None
        ),
        bits_per_weight=sizes.bits_per_weight, stored_bytes=sizes.stored_bytes, dense_bytes=sizes.dense_bytes,
        seconds=sum(outcome["seconds"] for outcome in outcomes),
    )  # fmt: skip


def _stages(parts: Sequence[dict[str, Any]]) -> Stages:
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    return Stages(
        tokens=total["tokens"], prefill_tokens_per_second=total["tokens"] / total["prefill"],
        cache_bytes_per_token=total["bytes"] / total["tokens"], step_seconds=total["step"] / total["steps"],
        load_seconds=total["load"] / total["loads"],
    )  # fmt: skip
