"""What contexts are made of: prose that is at hand, made-up words, and ways to build to a length and never cut."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from rarefy.core.errors import OptionError

SYLLABLES = (
    "ba be bo da de du fa fi go ka ke ko la li lo ma me mu na ni no pa pe ra ri ro sa se so ta te to va vi zo"
).split()
NAMES = (
    "Alice Bruno Clara Dmitri Elena Farid Greta Hugo Irene Jonas Katya Liam Marta Nadia Oscar Petra Quentin Rosa "
    "Stefan Tessa Ulrich Vera Walter Xenia Yusuf Zelda"
).split()
Insert = tuple[float, str]


class Material:
    """Sentences of ``text`` as filler, and the length of anything in tokens of ``tokenizer``.

    Raises OptionError when the text has fewer than 50 sentences of ordinary length.
    """

    def __init__(self, tokenizer: Any, text: str):
        self._tokenizer = tokenizer
        found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
        self.sentences = [sentence for sentence in found if 20 <= len(sentence) <= 400]
        if len(self.sentences) < 50:
            raise OptionError(
                f"The text has {len(self.sentences)} sentences, too few to hide something in; use a longer one."
            )
        self._lengths: dict[int, int] = {}

    def count(self, text: str) -> int:
        """Tokens of ``text``."""
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prose(self, dice: random.Random, tokens: int, inserts: Sequence[Insert] = ()) -> str:
        """At most about ``tokens`` tokens of consecutive sentences, with each insert (depth from 0 to 1, text) between
        two of them at that share of the filler."""
        room = tokens - sum(self.count(text) for _, text in inserts)
        start, taken, filled = dice.randrange(len(self.sentences)), [], 0
        for step in range(10**6):
            index = (start + step) % len(self.sentences)
            length = self._length(index)
            if filled + length > room:
                break
            taken.append((filled, self.sentences[index]))
            filled += length
        if not taken:
            raise OptionError(f"{tokens} tokens are too few for a context of this task; use a greater length.")
        pieces = [(place / max(1, filled), 0, sentence + " ") for place, sentence in taken]
        pieces += [(depth, 1, text) for depth, text in inserts]
        return "".join(text for _, _, text in sorted(pieces, key=lambda piece: piece[:2]))

    def _length(self, index: int) -> int:
        if index not in self._lengths:
            self._lengths[index] = self.count(self.sentences[index] + " ")
        return self._lengths[index]

    def grow(self, make: Callable[[int], str], tokens: int, least: int) -> int:
        """The largest number of items, about, for which ``make(number)`` has at most ``tokens`` tokens.

        Raises OptionError when not even ``least`` items fit.
        """
        if self.count(make(least)) > tokens:
            raise OptionError(f"{tokens} tokens are too few for a context of this task; use a greater length.")
        low, high = least, 2 * least
        while self.count(make(high)) <= tokens:
            low, high = high, 2 * high
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            low, high = (middle, high) if self.count(make(middle)) <= tokens else (low, middle)
        return low


def word(dice: random.Random, syllables: int = 3) -> str:
    """A made-up word."""
    return "".join(dice.choice(SYLLABLES) for _ in range(syllables))


def words(dice: random.Random, count: int, syllables: int = 3) -> list[str]:
    """``count`` made-up words, no two alike, drawn so that more of them begin with the same ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(dice, syllables)] = None
    return list(found)


def number(dice: random.Random, digits: int) -> str:
    """A number of so many digits as text."""
    return str(dice.randrange(10 ** (digits - 1), 10**digits))


def quintiles(dice: random.Random, count: int) -> list[int]:
    """One index out of each fifth of ``range(count)``, in random order: questions about all of a context."""
    picked = [dice.randrange(part * count // 5, (part + 1) * count // 5) for part in range(5)]
    dice.shuffle(picked)
    return picked


@functools.cache
def depths(parts: int) -> tuple[float, ...]:
    """``parts`` depths from 5% to 95%: the very ends would lie in a cache's exact parts and always be found."""
    return tuple(0.05 + 0.9 * part / (parts - 1) for part in range(parts))
