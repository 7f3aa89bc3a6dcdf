"""Sessions hold their answers, have the length they were asked for, and are the same for the same seed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rarefy.core.errors import OptionError, SourceError
from rarefy.evaluation.long.learning import KINDS, Language
from rarefy.evaluation.long.material import Material, depths
from rarefy.evaluation.long.sessions import Session, read_sessions
from rarefy.evaluation.long.suite import MORE, POSITIONS, SHARED, SHORTEST, TASKS, LongProtocol, make_sessions

WORDS = "river stone bright under walked seldom morning house letter quiet field road winter answer silver".split()


class Pieces:
    """A tokenizer that knows words, numbers digit by digit, and marks: all that building to a length needs."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": re.findall(r"[^\W\d]{1,4}|\d|\s\s+|[^\w\s]", text)}


@pytest.fixture(scope="module")
def material() -> Material:
    dice = random.Random(0)
    text = " ".join(" ".join(dice.choices(WORDS, k=9)).capitalize() + "." for _ in range(200))
    return Material(Pieces(), text)


@pytest.fixture(scope="module")
def made(material: Material) -> list[Session]:
    return make_sessions(material, LongProtocol(length=1024, sessions=2, seed=3))


def test_the_suite_has_the_twelve_shared_tasks_and_more(made: list[Session]) -> None:
    assert len(SHARED) == 12 and not SHARED.keys() & MORE.keys()
    assert {session.task for session in made} == set(TASKS)
    assert len(made) == 2 * (len(TASKS) + 2)  # needles are hidden in three lengths
    needles = [session.id for session in made if session.task == "needle"]
    assert needles == ["256-0", "256-1", "512-0", "512-1", "1024-0", "1024-1"]
    assert len({(session.task, session.id) for session in made}) == len(made)


def test_the_shortest_length_has_room_for_every_needle(material: Material) -> None:
    (needle,) = make_sessions(material, LongProtocol(length=SHORTEST, sessions=1, tasks=("needle",)))
    assert needle.id == f"{SHORTEST}-0" and len(needle.turns) == 5


def test_contexts_have_the_length_that_was_asked_for(made: list[Session], material: Material) -> None:
    for session in made:
        if session.task == "language_without_book":
            continue
        asked = int(session.id.split("-")[0])
        assert 0.75 * asked <= material.count(session.context) <= asked + 30, (session.task, session.id)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("mf", "many_shot", "language_without_book")])
def test_answers_are_in_the_context_where_they_are_said_to_be(made: list[Session], task: str) -> None:
    for session in (session for session in made if session.task == task):
        for turn in session.turns:
            answer = turn.answer.strip().rstrip(".")
            if task in ("choice_eng",):
                letter = re.search(rf"^{answer}\. In the (\w+)$", turn.prompt, re.M)
                assert letter is not None
                answer = letter[1]
            if task in ("summary", "multi_needle", "summary_with_needles") and turn.depth is None:
                places = [session.context.index(part.removeprefix("on ")) for part in answer.split(", ")]
                assert places == sorted(places)
            elif task in ("language",):
                assert answer not in session.context  # translations are to be made, not found
            else:
                assert answer in session.context
                if turn.depth is not None:
                    found = [match.start() for match in re.finditer(re.escape(answer), session.context)]
                    gap = min(abs(place / len(session.context) - turn.depth) for place in found)
                    assert gap < 0.12, (task, answer)


def test_answers_are_not_given_away_in_a_conversation(made: list[Session]) -> None:
    for session in made:
        for number, turn in enumerate(session.turns):
            said = "".join(earlier.prompt + earlier.answer for earlier in session.turns[:number]) + turn.prompt
            if len(turn.answer.strip()) > 6:  # letters, kinds and small numbers do come again
                assert turn.answer.strip() not in said, session.task


def test_answers_that_have_to_be_worked_out(made: list[Session]) -> None:
    for session in (session for session in made if session.task == "mf"):
        numbers = sorted(map(int, re.findall(r"\d+", session.context)))
        answers = {re.sub(r"\nThe (.*) of the numbers is", r"\1", t.prompt): int(t.answer) for t in session.turns}
        assert answers["largest"] == numbers[-1] and answers["smallest"] == numbers[0]
        assert answers["most frequent"] == max(set(numbers), key=numbers.count)
        assert answers["median"] == numbers[len(numbers) // 2]
        assert answers["second largest"] == max(number for number in numbers if number < numbers[-1])
    for session in (session for session in made if session.task == "many_shot"):
        for turn in session.turns:
            assert turn.answer.strip() == KINDS[turn.prompt[-2]] and turn.prompt not in session.context


def test_a_language_follows_its_own_rules() -> None:
    for seed in range(20):
        spoken = Language(random.Random(seed))
        english, foreign = spoken.sentence(random.Random(seed))
        words = english.rstrip(".").split()
        parts = foreign.lower().rstrip(".").split()
        assert len(parts) == 4 and spoken.lexicon[words[1]] in parts
        assert spoken.lexicon[words[-1]] + spoken.object in parts
        verb = next(part for part in parts if any(part.startswith(spoken.lexicon[verb]) for verb in _verbs()))
        place = {"S": 0, "V": 0, "O": 0} | {letter: index for index, letter in enumerate(spoken.order)}
        assert (parts.index(verb) < parts.index(spoken.lexicon[words[-1]] + spoken.object)) == (
            place["V"] < place["O"]
        )
        assert spoken.book(random.Random(0), 5).count("English: ") == 5


def _verbs() -> list[str]:
    from rarefy.evaluation.long.learning import VERBS

    return VERBS


def test_the_same_seed_makes_the_same_sessions(material: Material, made: list[Session]) -> None:
    assert make_sessions(material, LongProtocol(length=1024, sessions=2, seed=3)) == made
    assert make_sessions(material, LongProtocol(length=1024, sessions=2, seed=4)) != made
    some = make_sessions(material, LongProtocol(length=1024, sessions=1, seed=3, tasks=("passkey", POSITIONS)))
    assert some == [session for session in made if (session.task, session.id) == ("passkey", "1024-0")]


def test_a_book_makes_the_only_difference(made: list[Session]) -> None:
    by_task = {(session.task, session.id): session for session in made}
    book, none = by_task["language", "1024-0"], by_task["language_without_book", "1024-0"]
    assert book.turns == none.turns and len(none.context) < 40 < len(book.context)


def test_needles_stay_clear_of_the_ends() -> None:
    assert depths(5) == pytest.approx((0.05, 0.275, 0.5, 0.725, 0.95))


def test_too_little_text_and_too_short_lengths(material: Material) -> None:
    with pytest.raises(OptionError, match="too few to hide something in"):
        Material(Pieces(), "One short sentence. " * 10)
    with pytest.raises(OptionError, match="too few for a context"):
        material.prose(random.Random(0), 5)
    with pytest.raises(OptionError, match="too few for a context"):
        material.grow(lambda count: "word " * count, 4, 5)
    with pytest.raises(OptionError, match="'poem' is not a task"):
        make_sessions(material, LongProtocol(tasks=("poem",)))


def test_files_of_others(tmp_path: Path) -> None:
    turns = [{"input": "Q1", "answer": ["A1", "B"]}, {"input": "Q2", "answer": 3}]
    scbench = {"id": 7, "context": "C", "multi_turns": turns}
    (tmp_path / "kv.jsonl").write_text(json.dumps(scbench) + "\n")
    session = read_sessions(tmp_path / "kv.jsonl")[0]
    assert (session.task, session.id, session.context) == ("kv", "7", "C")
    assert [(turn.prompt, turn.answer) for turn in session.turns] == [("\n\nQ1\n", "A1"), ("\n\nQ2\n", "3")]
    rows = [
        {"context": "C", "question": "Q1", "answer_prefix": " It is", "answer": " a", "max_new_tokens": 3},
        {"context": "C", "question": "Q2", "answer": ["b"], "answer_prefix": None},
        {"context": "D", "question": "Q3", "answer": "c"},
    ]
    (tmp_path / "niah.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_sessions(tmp_path / "niah.jsonl")
    assert [turn.prompt for turn in first.turns] == ["\n\nQ1 It is", "\n\nQ2"] and second.context == "D"


def test_files_of_others_that_ask_for_several_answers(tmp_path: Path) -> None:
    def read(name: str, *rows: dict[str, Any]) -> list[Session]:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return read_sessions(tmp_path / name)

    ruler = {"index": 0, "input": "Find them.\nThe text.\nWhich? They are", "outputs": ["12", "34"], "length": 9}
    (session,) = read("niah_multivalue.jsonl", ruler)
    assert (session.context, session.turns[0].prompt) == ("Find them.\nThe text.", "\nWhich? They are")
    assert session.turns[0].answer == " 12, 34"
    assert read("qa_1.jsonl", ruler)[0].turns[0].answer == " 12"  # of alternatives the first
    kvpress = {"context": "C", "question": "Q", "answer_prefix": "They are", "answer": ["a", "b"], "task": "cwe"}
    cwe, qa = read("ruler.jsonl", kvpress, {**kvpress, "task": "qa_2"})
    assert (cwe.task, cwe.turns[0].answer, qa.task, qa.turns[0].answer) == ("cwe", " a, b", "qa_2", " a")
    traced = {"id": 1, "context": "C", "multi_turns": [{"input": "Q1", "answer": ["VAR A", "VAR B"]}]}
    assert read("scbench_vt.jsonl", traced)[0].turns[0].answer == "VAR A, VAR B"


def test_parquet_files(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"context": ["C"], "question": ["Q"], "answer": ["A"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read_sessions(tmp_path / "x.parquet")[0].turns[0].answer == "A"


@pytest.mark.parametrize(
    "content",
    [
        "{", "", '{"context": "C"}', '{"context": "C", "question": "Q", "answer": []}',
        '{"input": "one line", "outputs": ["a"]}',
    ],
)  # fmt: skip
def test_other_files_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text(content)
    with pytest.raises(SourceError, match=r"odd\.jsonl"):
        read_sessions(tmp_path / "odd.jsonl")
