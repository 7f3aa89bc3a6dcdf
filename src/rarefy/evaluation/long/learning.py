"""Tasks that need the whole context: rules learned from examples, an array, a language learned from its book."""

from __future__ import annotations

import random
from collections import Counter

from rarefy.evaluation.long.material import Material, word, words
from rarefy.evaluation.long.retrieval import TURNS
from rarefy.evaluation.long.sessions import Session, Turn

KINDS = {"a": "bird", "e": "fish", "i": "tree", "o": "stone"}
VERBS = "sees follows helps calls finds".split()
NOUNS = "dog river child farmer star ship king bird house teacher tree friend".split()
QUALITIES = "old small red quiet strong".split()


def many_shot(material: Material, tokens: int, dice: random.Random) -> Session:
    """The class of made-up words, which their last letter decides, after as many examples as fit."""
    seed = dice.getrandbits(32)

    def examples(count: int) -> list[str]:
        own = random.Random(seed)
        found: list[str] = []
        while len(found) < count:
            new = word(own, 2)
            if new[-1] in KINDS:
                found.append(new)
        return found

    def text(count: int) -> str:
        return "".join(f"{example}: {KINDS[example[-1]]}\n" for example in examples(count))

    count = material.grow(text, tokens, TURNS)
    known = set(examples(count))
    fresh = [new for new in words(dice, 400) if new not in known and new[-1] in KINDS][:TURNS]
    turns = [Turn(prompt=f"{new}:", answer=f" {KINDS[new[-1]]}\n") for new in fresh]
    return Session(task="many_shot", id="", context=text(count), turns=tuple(turns))


def find_in_array(material: Material, tokens: int, dice: random.Random) -> Session:
    """The largest, the smallest, the second largest, the most frequent and the median number of an array."""
    seed = dice.getrandbits(32)

    def numbers(count: int) -> list[int]:
        own = random.Random(seed)
        frequent = own.randrange(100, 900)
        drawn = [own.randrange(100, 999) for _ in range(count)]
        for place in own.sample(range(count), max(2, count // 10)):
            drawn[place] = frequent
        return drawn

    def text(count: int) -> str:
        return "Numbers: " + ", ".join(map(str, numbers(count))) + ".\n"

    count = material.grow(text, tokens, 2 * TURNS)
    drawn = numbers(count)
    rising = sorted(drawn)
    second = max(value for value in drawn if value != rising[-1])
    answers = {
        "largest": rising[-1], "smallest": rising[0], "second largest": second,
        "most frequent": Counter(drawn).most_common(1)[0][0], "median": rising[len(rising) // 2],
    }  # fmt: skip
    turns = [Turn(prompt=f"\nThe {name} of the numbers is", answer=f" {value}") for name, value in answers.items()]
    return Session(task="mf", id="", context=text(count), turns=tuple(turns))


class Language:
    """A language that nobody speaks: a lexicon, an order of words, and endings for plural, past and object."""

    def __init__(self, dice: random.Random):
        meanings = [*NOUNS, *QUALITIES, *VERBS]
        self.name = word(dice, 2).capitalize() + "ish"
        self.lexicon = dict(zip(meanings, words(dice, len(meanings), 2), strict=True))
        self.plural, self.past, self.object = (dice.choice(("n", "s", "k", "l")) + vowel for vowel in "iau")
        self.order = dice.choice(("SOV", "VSO", "OVS", "OSV"))
        self.quality_first = dice.random() < 0.5

    def sentence(self, dice: random.Random) -> tuple[str, str]:
        """An English sentence and its translation."""
        subject, target = dice.sample(NOUNS, 2)
        quality, verb = dice.choice(QUALITIES), dice.choice(VERBS)
        many, past = dice.random() < 0.5, dice.random() < 0.5
        english = f"The {quality} {subject}{'s' if many else ''} {self._english(verb, many, past)} the {target}."
        actor = self.lexicon[subject] + (self.plural if many else "")
        pair = [self.lexicon[quality], actor]
        parts = {
            "S": " ".join(pair if self.quality_first else pair[::-1]),
            "O": self.lexicon[target] + self.object,
            "V": self.lexicon[verb] + (self.past if past else ""),
        }
        foreign = " ".join(parts[place] for place in self.order)
        return english, foreign[0].upper() + foreign[1:] + "."

    def book(self, dice: random.Random, examples: int) -> str:
        """Grammar, dictionary, and so many sentences with their translation."""
        place = {"S": "the subject", "O": "the object", "V": "the verb"}
        order = ", then ".join(place[letter] for letter in self.order)
        grammar = (
            f"A short grammar of {self.name}.\nA sentence has {order}. Qualities stand "
            f"{'before' if self.quality_first else 'after'} their noun. Many take the ending -{self.plural}, what was "
            f"done in the past the ending -{self.past}, the object the ending -{self.object}.\n"
        )
        entries = "".join(f"{foreign}: {meaning}\n" for meaning, foreign in self.lexicon.items())
        pairs = [self.sentence(dice) for _ in range(examples)]
        parallel = "".join(f"English: {english}\n{self.name}: {foreign}\n" for english, foreign in pairs)
        return f"{grammar}\nDictionary.\n{entries}\nSentences.\n{parallel}"

    @staticmethod
    def _english(verb: str, many: bool, past: bool) -> str:
        irregular = {"sees": "saw", "finds": "found"}
        if past:
            return irregular.get(verb, verb.removesuffix("s") + "ed")
        return verb.removesuffix("s") if many else verb


def language(material: Material, tokens: int, dice: random.Random) -> Session:
    """Translations, both ways, of sentences that are not in the book of the language."""
    session, _ = _language(material, tokens, dice)
    return session


def language_without_book(material: Material, tokens: int, dice: random.Random) -> Session:
    """The same questions without the book: what the answers cost when there is nothing to learn from."""
    session, name = _language(material, tokens, dice)
    return session.model_copy(update={"task": "language_without_book", "context": f"Sentences in {name}.\n"})


def _language(material: Material, tokens: int, dice: random.Random) -> tuple[Session, str]:
    spoken = Language(dice)
    seed = dice.getrandbits(32)

    def text(count: int) -> str:
        return spoken.book(random.Random(seed), count)

    context = text(material.grow(text, tokens, 2))
    turns: list[Turn] = []
    while len(turns) < 2 * TURNS:
        english, foreign = spoken.sentence(dice)
        if english in context:
            continue
        # Ways take turns, each with a sentence of its own: a conversation must not hold the answer.
        if len(turns) % 2:
            turns.append(Turn(prompt=f"{spoken.name}: {foreign}\nEnglish:", answer=f" {english}\n"))
        else:
            turns.append(Turn(prompt=f"English: {english}\n{spoken.name}:", answer=f" {foreign}\n"))
    return Session(task="language", id="", context=context, turns=tuple(turns)), spoken.name
