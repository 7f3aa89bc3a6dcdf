"""The suite: which tasks there are, how long their contexts are, and how many sessions of each are made."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pydantic import Field

from rarefy.core.config import StrictModel
from rarefy.core.errors import OptionError
from rarefy.evaluation.long import learning, reading, retrieval
from rarefy.evaluation.long.material import Material
from rarefy.evaluation.long.sessions import Session

Generator = Callable[[Material, int, random.Random], Session]
# The twelve tasks of SCBench (2412.10319), by its names.
SHARED: dict[str, Generator] = {
    "kv": retrieval.key_value,
    "prefix_suffix": retrieval.prefix_suffix,
    "vt": retrieval.variable_tracing,
    "repoqa": reading.find_function,
    "qa_eng": reading.question_english,
    "qa_chn": reading.question_chinese,
    "choice_eng": reading.choice_english,
    "many_shot": learning.many_shot,
    "mf": learning.find_in_array,
    "summary": reading.summary,
    "summary_with_needles": reading.summary_with_needles,
    "repoqa_and_kv": reading.find_function_and_value,
}
MORE: dict[str, Generator] = {
    "kv_easy": retrieval.key_value_easy,
    "needle": retrieval.needle,
    "multi_needle": retrieval.multi_needle,
    "passkey": retrieval.passkey,
    "copy": retrieval.copy_lines,
    "language": learning.language,
    "language_without_book": learning.language_without_book,
}
TASKS = {**SHARED, **MORE}
# Positions likelihood by position, which is no session: text as it is.
POSITIONS = "positions"
# Tokens of a context that has room for everything a task hides in it.
SHORTEST = 256


class LongProtocol(StrictModel):
    """What a long evaluation does. ``length``: tokens of a context; needles are also hidden in a quarter and a half,
    where these have room.
    ``sessions``: of each task (and of each length of needles); ``documents``: windows for the likelihood by position.
    ``chunk``: tokens of a pass; each reads the KV cache of those before. Sessions are drawn from ``seed``.
    """

    length: int = Field(default=2048, ge=SHORTEST)
    sessions: int = Field(default=2, ge=1)
    documents: int = Field(default=4, ge=1)
    chunk: int = Field(default=256, ge=1)
    seed: int = 0
    tasks: tuple[str, ...] = (*TASKS, POSITIONS)
    text: str = ""
    dtype: str = ""

    def describe(self) -> str:
        """One line for tables."""
        return (
            f"contexts of {self.length} tokens, {self.sessions} sessions a task, in chunks of {self.chunk}, seed "
            f"{self.seed}, {self.dtype}, {self.text}"
        )


def make_sessions(material: Material, protocol: LongProtocol) -> list[Session]:
    """Every session of the protocol, in order; the same for the same seed, text and tokenizer.

    Raises OptionError for unknown tasks and for lengths too short for one.
    """
    check_tasks(protocol.tasks)
    found = []
    for name in protocol.tasks:
        lengths = [protocol.length]
        if name == "needle":
            lengths = [each for each in (protocol.length // 4, protocol.length // 2) if each >= SHORTEST]
            lengths.append(protocol.length)
        for length in lengths if name != POSITIONS else ():
            for index in range(protocol.sessions):
                family = name.removesuffix("_without_book")  # the same questions with and without
                dice = random.Random(f"{protocol.seed} {family} {length} {index}")
                session = TASKS[name](material, length, dice)
                found.append(session.model_copy(update={"id": f"{length}-{index}"}))
    return found


def check_tasks(names: Sequence[str]) -> None:
    """Raise OptionError, naming the first, unless all are tasks of the suite."""
    for name in names:
        if name not in (*TASKS, POSITIONS):
            raise OptionError(f"'{name}' is not a task of the long suite; known: {', '.join((*TASKS, POSITIONS))}.")
