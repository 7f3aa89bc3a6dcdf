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
    context: str
    turns: tuple[Turn, ...] = Field(min_length=1)


def read_sessions(path: Path) -> list[Session]:
    """Sessions in a file of SCBench (lines of ``{id, context, multi_turns: [{input, answer}]}``) or of kvpress (records
    of ``{context, question, answer_prefix, answer}``), as .jsonl or, with pyarrow installed, .parquet.

    Consecutive kvpress records about one context become one session. The task is the file's name. Raises SourceError.
    """
    sessions: list[Session] = []
    for number, row in enumerate(_rows(path)):
        try:
            if "multi_turns" in row:
                turns = [
                    Turn(prompt=f"\n\n{turn['input']}\n", answer=_first(turn["answer"])) for turn in row["multi_turns"]
                ]
                name = str(row.get("id", number))
                sessions.append(Session(task=path.stem, id=name, context=row["context"], turns=tuple(turns)))
                continue
            turn = Turn(prompt=f"\n\n{row['question']}{row.get('answer_prefix') or ''}", answer=_first(row["answer"]))
            last = sessions[-1] if sessions else None
            if last is not None and last.context == row["context"]:
                sessions[-1] = last.model_copy(update={"turns": (*last.turns, turn)})
            else:
                sessions.append(Session(task=path.stem, id=str(number), context=row["context"], turns=(turn,)))
        except (KeyError, TypeError, ValueError, IndexError) as failure:
            raise SourceError(
                f"Record {number} of '{path}' is not a session of SCBench or kvpress "
                f"({type(failure).__name__}: {str(failure).splitlines()[0]}); repair or remove it."
            ) from None
    if not sessions:
        raise SourceError(f"'{path}' holds no session; name another file.")
    return sessions


def _first(answer: Any) -> str:
    return str(answer[0] if isinstance(answer, list) else answer)


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
