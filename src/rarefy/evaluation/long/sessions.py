"""A context and the questions asked about it: what generators make, and what files of others are read as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from rarefy.core.config import StrictModel
from rarefy.core.errors import SourceError, UnsupportedError


class Turn(StrictModel):
    """A question and its answer, which follows ``prompt`` directly. ``depth``: where in the context the answer lies,
    from 0 (its start) to 1, None where it is all over."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    depth: float | None = Field(default=None, ge=0, le=1)


class Session(StrictModel):
    """Questions about one context, asked one after another in one conversation or each on its own."""

    task: str
    id: str
    context: str = Field(min_length=1)
    turns: tuple[Turn, ...] = Field(min_length=1)


def read_sessions(path: Path) -> list[Session]:
    """Sessions in a file of SCBench (records of ``{id, context, multi_turns: [{input, answer}]}``), of kvpress
    (``{context, question, answer_prefix, answer}``) or of RULER (``{input, outputs}``, the question being the last
    paragraph of the input), as .jsonl or, with pyarrow installed, .parquet.

    Consecutive kvpress records about one context become one session. The task is what a record says, else the file's
    name. Of several answers the first is asked for where they are alternatives, and all of them, comma-separated, where
    all are to be found (RULER but for its questions, variables of SCBench). Raises SourceError.
    """
    sessions: list[Session] = []
    for number, row in enumerate(_rows(path)):
        try:
            new = _session(row, str(row.get("task") or path.stem), number)
        except (KeyError, TypeError, ValueError, IndexError) as failure:
            raise SourceError(
                f"Record {number} of '{path}' is not a session of SCBench, kvpress or RULER "
                f"({type(failure).__name__}: {str(failure).splitlines()[0]}); repair or remove it."
            ) from None
        last = sessions[-1] if sessions else None
        if "question" in row and last is not None and (last.task, last.context) == (new.task, new.context):
            sessions[-1] = last.model_copy(update={"turns": (*last.turns, *new.turns)})
        else:
            sessions.append(new)
    if not sessions:
        raise SourceError(f"'{path}' holds no session; name another file.")
    return sessions


def _session(row: dict[str, Any], task: str, number: int) -> Session:
    kind = task.lower().split("_")
    if "multi_turns" in row:
        turns = [
            Turn(prompt=f"\n\n{turn['input']}\n", answer=_answer(turn["answer"], every=kind[-1] == "vt"))
            for turn in row["multi_turns"]
        ]
        return Session(task=task, id=str(row.get("id", number)), context=row["context"], turns=tuple(turns))
    every = "qa" not in kind and ("outputs" in row or "task" in row)
    if "outputs" in row:
        context, between, question = row["input"].rstrip("\n").rpartition("\n")
        prompt, answer = f"{between}{question}{row.get('answer_prefix') or ''}", _answer(row["outputs"], every)
    else:
        context, prompt = row["context"], f"\n\n{row['question']}{row.get('answer_prefix') or ''}"
        answer = _answer(row["answer"], every)
    # Words follow their question after a space, which many tokenizers keep at the start of a word.
    if "outputs" in row or row.get("answer_prefix"):
        answer = answer if prompt[-1].isspace() or answer[0].isspace() else f" {answer}"
    return Session(task=task, id=str(number), context=context, turns=(Turn(prompt=prompt, answer=answer),))


def _answer(answer: Any, every: bool) -> str:
    if not isinstance(answer, list):
        return str(answer)
    return ", ".join(map(str, answer)) if every and answer else str(answer[0])


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise UnsupportedError(f"'{path}' is a parquet file, which needs pyarrow; install it.") from None
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as failure:
        raise SourceError(f"'{path}' cannot be read as lines of JSON ({failure}); name another file.") from None
