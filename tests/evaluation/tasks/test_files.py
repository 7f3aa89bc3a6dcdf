"""Every form in which examples come becomes the record that the task was written for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rarefy.core.errors import OptionError, SourceError
from rarefy.evaluation.tasks.files import KNOWN, find_records

LETTERED = {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"}
ASK = "Please choose the correct answer to the question: What colour: sky?\n\nAnswer1: red Answer2: blue\n\n"
SCIENCE = [{"instruction": f"{ASK}Answer format: answer1/answer2", "answer": "answer2"}]
MATH = {"question": "1+1?", "answer": "#### 2"}
RECORDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "arc_easy": (
        "arc_easy_choices.jsonl",
        [{"query": "Question: Sky?", "choices": ["red", "blue"], "gold": 1}],
        {"question": "Sky?", **LETTERED},
    ),
    "arc_challenge": ("ARC-Challenge.json", SCIENCE, {"question": "What colour: sky?", **LETTERED}),
    "openbookqa": ("openbookqa.json", SCIENCE, {"question_stem": "What colour: sky?", **LETTERED}),
    "winogrande": (
        "deep/er/winogrande_dev_choices.jsonl",
        [{"context_options": ["Ann fell so Ann", "Ann fell so Bob"], "continuation": "cried.", "gold": 0}],
        {"sentence": "_ cried.", "option1": "Ann fell so Ann", "option2": "Ann fell so Bob", "answer": "1"},
    ),
    "boolq_closed_book": (
        "boolq.json",
        [{"instruction": "Please answer, question: is ice cold?\n\nAnswer format: true/false", "answer": "true"}],
        {"question": "is ice cold", "label": 1},
    ),
    "lambada_openai": ("lambada_test.jsonl", [{"text": "one two"}], {"text": "one two"}),
    "gsm8k": ("gsm8k/test.jsonl", [MATH], MATH),
}


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize("task", RECORDS)
def test_distributed_forms(task: str, tmp_path: Path) -> None:
    name, rows, wanted = RECORDS[task]
    write(tmp_path / name, rows)
    found = find_records(tmp_path, task)
    assert found is not None and found == ([wanted], tmp_path / name)


def test_the_plain_form_of_any_task_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "lambada_test.jsonl", [{"text": "old"}])
    write(tmp_path / "lambada_openai.jsonl", [{"text": "new"}, {"text": "er"}])
    write(tmp_path / "anything.jsonl", [{"x": 1}])
    assert find_records(tmp_path, "lambada_openai") == (
        [{"text": "new"}, {"text": "er"}], tmp_path / "lambada_openai.jsonl",
    )  # fmt: skip
    assert find_records(tmp_path, "anything") == ([{"x": 1}], tmp_path / "anything.jsonl")
    assert find_records(tmp_path, "piqa") is None


def test_answers_in_a_file_of_their_own(tmp_path: Path) -> None:
    row = {"goal": "g", "sol1": "a", "sol2": "b"}
    write(tmp_path / "piqa_valid.jsonl", [row, row])
    with pytest.raises(SourceError, match=r"does not hold records of task 'piqa'.*label"):
        find_records(tmp_path, "piqa")
    (tmp_path / "piqa_valid_labels.lst").write_text("0\n1\n")
    found = find_records(tmp_path, "piqa")
    assert found is not None and [record["label"] for record in found[0]] == [0, 1]
    (tmp_path / "piqa_valid_labels.lst").write_text("0\n")
    with pytest.raises(SourceError, match="replace it"):
        find_records(tmp_path, "piqa")


def test_packed_problems_and_articles(tmp_path: Path) -> None:
    problem = {"prompt": "def f():", "test": "def check(f): pass", "entry_point": "f"}
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))
    found = find_records(tmp_path, "humaneval_greedy")
    assert found is not None and found[0] == [problem]
    (tmp_path / "wiki.test.raw").write_text(" \n = One = \n \n text\n = = Part = = \n \n = Two = = More = \n \n end\n")
    pages = find_records(tmp_path, "wikitext")
    assert pages is not None and [page["page"].split(" = ")[1] for page in pages[0]] == ["One", "Two"]
    assert "Part" in pages[0][0]["page"]


@pytest.mark.parametrize("content", ["", "{", '{"other": 1}', "[1]", '"text"'])
def test_wrong_files_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "lambada_test.jsonl").write_text(content)
    with pytest.raises(SourceError, match=r"lambada_test\.jsonl' .*replace it"):
        find_records(tmp_path, "lambada_openai")
    with pytest.raises(OptionError, match="is not a folder"):
        find_records(tmp_path / "none", "piqa")


def test_every_known_form_is_tried_here() -> None:
    assert set(KNOWN) == {*RECORDS, "piqa", "humaneval_greedy", "wikitext", "hellaswag", "mmlu_flat"}
