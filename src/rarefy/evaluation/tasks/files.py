"""Examples of tasks in local files, in the record form of the data set that the task was written for.

Any task reads ``TASK.jsonl``, one record a line, as the hub's data set has them. Files in the form in which a data set
was first distributed, or in which collections pass it on, are read too: those named in ``KNOWN``.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rarefy.core.errors import OptionError, SourceError

Record = dict[str, Any]
LETTERS = "ABCDEFGH"


class Known(NamedTuple):
    """A distributed form: the file (pattern below the data folder), and how one of its records is read."""

    pattern: str
    convert: Callable[[Record], Record]


def find_records(folder: Path, task: str) -> tuple[list[Record], Path] | None:
    """The examples of ``task`` in or below ``folder`` and the file they are in, or None when there are none.

    Raises OptionError when ``folder`` is none, SourceError when a file is not in the form its name promises.
    """
    if not folder.is_dir():
        raise OptionError(f"--task-data '{folder}' is not a folder; name the one that holds the task files.")
    forms = [Known(f"{task}.jsonl", dict), *KNOWN.get(task, ())]
    for form in forms:
        path = min(folder.glob(f"**/{form.pattern}"), default=None)
        if path is None:
            continue
        try:
            records = [form.convert(record) for record in _read(path)]
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, OSError) as failure:
            raise SourceError(
                f"'{path}' does not hold records of task '{task}' ({type(failure).__name__}: {failure}); replace it."
            ) from None
        if not records:
            raise SourceError(f"'{path}' holds no example of task '{task}'; replace it.")
        return records, path
    return None


def file_names(task: str) -> str:
    """The files that would serve ``task``, for messages."""
    patterns = [f"{task}.jsonl", *(known.pattern for known in KNOWN.get(task, ()))]
    return " or ".join(f"'{pattern}'" for pattern in patterns)


def _read(path: Path) -> list[Record]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    if path.suffix == ".json":
        return list(json.loads(text))
    if path.suffix == ".raw":
        return [{"page": page} for page in _pages(text)]
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    labels = path.with_name(f"{path.stem}_labels.lst")  # a data set whose answers are in a file beside it
    if labels.is_file():
        answers = labels.read_text("utf-8").split()
        return [{**row, "label": int(answer)} for row, answer in zip(rows, answers, strict=True)]
    return rows


def _pages(text: str) -> list[str]:
    """WikiText cut into articles, each of which starts with a line ``= Title =``."""
    starts = [match.start() for match in re.finditer(r"(?m)^ = [^=\n](?:.*[^=])? = $", text)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _options(texts: Sequence[str], gold: int) -> Record:
    labels = list(LETTERS[: len(texts)])
    return {"choices": {"text": list(texts), "label": labels}, "answerKey": labels[gold]}


def _instruction(record: Record) -> tuple[str, list[str], int]:
    """Question, options and answer out of an instruction such as ``... question: Q  Answer1: a Answer2: b``."""
    body = re.split(r"\s*Answer format:", record["instruction"])[0]
    question, *options = re.split(r"\s*\b(?:Answer|Option|Solution|Ending)\d+:\s*", body)
    return question.split(": ", 1)[1], options, int(re.sub(r"\D", "", record["answer"])) - 1


def _with(*fields: str) -> Callable[[Record], Record]:
    """Records as they are, if they have what their task needs."""

    def convert(record: Record) -> Record:
        return {**record, **{field: record[field] for field in fields}}

    return convert


def _science(field: str) -> Callable[[Record], Record]:
    def convert(record: Record) -> Record:
        question, options, gold = _instruction(record)
        return {field: question, **_options(options, gold)}

    return convert


def _choices(record: Record) -> Record:
    return {"question": record["query"].removeprefix("Question: "), **_options(record["choices"], record["gold"])}


def _pronoun(record: Record) -> Record:
    first, second = record["context_options"]
    blank = {"sentence": f"_ {record['continuation']}", "option1": first, "option2": second}
    return {**blank, "answer": str(record["gold"] + 1)}


def _closed_book(record: Record) -> Record:
    question = re.split(r"\s*Answer format:", record["instruction"])[0].split("question: ", 1)[1]
    return {"question": question.rstrip("?"), "label": ("false", "true").index(record["answer"])}


KNOWN: dict[str, tuple[Known, ...]] = {
    "piqa": (Known("piqa_valid.jsonl", _with("goal", "sol1", "sol2", "label")),),
    "hellaswag": (Known("hellaswag_val*.jsonl", _with("ctx_a", "ctx_b", "activity_label", "endings", "label")),),
    "arc_easy": (Known("arc_easy_choices.jsonl", _choices), Known("ARC-Easy.json", _science("question"))),
    "arc_challenge": (Known("ARC-Challenge.json", _science("question")),),
    "openbookqa": (Known("openbookqa.json", _science("question_stem")),),
    "winogrande": (Known("winogrande_dev_choices.jsonl", _pronoun),),
    "boolq_closed_book": (Known("boolq.json", _closed_book),),
    "lambada_openai": (Known("lambada_test.jsonl", _with("text")),),
    "gsm8k": (Known("gsm8k/test.jsonl", _with("question", "answer")),),
    "mmlu_flat": (Known("mmlu_test*.jsonl", _with("subject", "question", "choices", "answer")),),
    "humaneval_greedy": (Known("HumanEval.jsonl.gz", _with("prompt", "test", "entry_point")),),
    "wikitext": (Known("wiki.test.raw", _with("page")),),
}
