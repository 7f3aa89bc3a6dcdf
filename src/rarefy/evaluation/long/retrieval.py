"""Tasks that ask for a string of the context: keys and values, variables, needles, pass keys, lines to copy."""

from __future__ import annotations

import random

from rarefy.evaluation.long.material import NAMES, Material, depths, number, quintiles, word, words
from rarefy.evaluation.long.sessions import Session, Turn

TURNS = 5


def _session(task: str, context: str, turns: list[Turn]) -> Session:
    return Session(task=task, id="", context=context, turns=tuple(turns))


def key_value(material: Material, tokens: int, dice: random.Random) -> Session:
    """Values of random 32-digit hexadecimal keys in one JSON object, keys from every fifth of it."""
    seed = dice.getrandbits(32)

    def pairs(count: int) -> list[tuple[str, str]]:
        own = random.Random(seed)
        return [(f"{own.getrandbits(128):032x}", f"{own.getrandbits(128):032x}") for _ in range(count)]

    def text(count: int) -> str:
        lines = ",\n".join(f'"{key}": "{value}"' for key, value in pairs(count))
        return f"JSON data:\n{{{lines}}}\n"

    count = material.grow(text, tokens, TURNS)
    found = pairs(count)
    turns = [
        Turn(prompt=f'\nThe value of key "{found[i][0]}" is "', answer=found[i][1], depth=i / count)
        for i in quintiles(dice, count)
    ]
    return _session("kv", text(count), turns)


def key_value_easy(material: Material, tokens: int, dice: random.Random) -> Session:
    """Numbers of made-up words, one a line: key and value for small models."""
    seed = dice.getrandbits(32)

    def pairs(count: int) -> list[tuple[str, str]]:
        own = random.Random(seed)
        return [(name, number(own, 3)) for name in words(own, count)]

    def text(count: int) -> str:
        return "".join(f"The number of {name} is {value}.\n" for name, value in pairs(count))

    count = material.grow(text, tokens, TURNS)
    found = pairs(count)
    turns = [
        Turn(prompt=f"\nThe number of {found[i][0]} is", answer=f" {found[i][1]}", depth=i / count)
        for i in quintiles(dice, count)
    ]
    return _session("kv_easy", text(count), turns)


def prefix_suffix(material: Material, tokens: int, dice: random.Random) -> Session:
    """The one string of a list that starts and ends in a given way."""
    seed = dice.getrandbits(32)

    def strings(count: int) -> list[tuple[str, str, str]]:
        own = random.Random(seed)
        return [(start, word(own, 4), word(own, 2)) for start in words(own, count, 2 if count < 800 else 3)]

    def text(count: int) -> str:
        return "Strings:\n" + "".join("".join(parts) + "\n" for parts in strings(count))

    count = material.grow(text, tokens, TURNS)
    found = strings(count)
    turns = [
        Turn(
            prompt=f'\nThe string that starts with "{found[i][0]}" and ends with "{found[i][2]}" is',
            answer=" " + "".join(found[i]), depth=i / count,
        )
        for i in quintiles(dice, count)
    ]  # fmt: skip
    return _session("prefix_suffix", text(count), turns)


def variable_tracing(material: Material, tokens: int, dice: random.Random) -> Session:
    """The number at the end of chains of assignments, one to four steps long, scattered over prose."""
    inserts, turns = [], []
    for chain in range(TURNS):
        hops = 1 + chain % 4
        names = [f"VAR_{name.upper()}" for name in words(dice, hops + 1)]
        value = number(dice, 5)
        places = sorted(dice.uniform(0.02, 0.98) for _ in range(hops + 1))
        inserts.append((places[0], f"{names[0]} = {value}. "))
        inserts += [(place, f"{new} = {old}. ") for place, old, new in zip(places[1:], names, names[1:], strict=False)]
        turns.append(Turn(prompt=f"\nThe value of {names[-1]} is", answer=f" {value}", depth=places[0]))
    return _session("vt", material.prose(dice, tokens, inserts), turns)


def needle(material: Material, tokens: int, dice: random.Random) -> Session:
    """Magic numbers of cities at five depths of prose, each asked for: one row of the map of length by depth."""
    keys, values = words(dice, TURNS), [number(dice, 7) for _ in range(TURNS)]
    inserts = [
        (depth, f"The special magic number of {key} is {value}. ")
        for depth, key, value in zip(depths(TURNS), keys, values, strict=True)
    ]
    turns = [
        Turn(prompt=f"\nThe special magic number of {key} is", answer=f" {value}", depth=depth)
        for depth, key, value in zip(depths(TURNS), keys, values, strict=True)
    ]
    return _session("needle", material.prose(dice, tokens, inserts), turns)


def multi_needle(material: Material, tokens: int, dice: random.Random) -> Session:
    """Eight magic numbers of one city, all to be listed in their order."""
    key = word(dice)
    values = [number(dice, 4) for _ in range(8)]
    inserts = [
        (depth, f"One of the magic numbers of {key} is {value}. ")
        for depth, value in zip(depths(8), values, strict=True)
    ]
    turn = Turn(prompt=f"\nIn order, the eight magic numbers of {key} are", answer=" " + ", ".join(values) + ".")
    return _session("multi_needle", material.prose(dice, tokens, inserts), [turn])


def passkey(material: Material, tokens: int, dice: random.Random) -> Session:
    """Pass keys of five people in prose."""
    people = dice.sample(NAMES, TURNS)
    keys = {name: number(dice, 5) for name in people}
    inserts = [
        (depth, f"\nThe pass key of {name} is {keys[name]}. Remember it.\n")
        for depth, name in zip(depths(TURNS), people, strict=True)
    ]
    turns = [
        Turn(prompt=f"\nWhat is the pass key of {name}? It is", answer=f" {keys[name]}.", depth=depth)
        for depth, name in zip(depths(TURNS), people, strict=True)
    ]
    dice.shuffle(turns)
    return _session("passkey", material.prose(dice, tokens, inserts), turns)


def copy_lines(material: Material, tokens: int, dice: random.Random) -> Session:
    """Numbered lines, some of which are to be repeated: many shots of copying before each question."""
    seed = dice.getrandbits(32)

    def lines(count: int) -> list[str]:
        own = random.Random(seed)
        return [" ".join(word(own, 2) for _ in range(4)) for _ in range(count)]

    def text(count: int) -> str:
        return "".join(f"Line {index + 1} says: {line}\n" for index, line in enumerate(lines(count)))

    count = material.grow(text, tokens, TURNS)
    found = lines(count)
    turns = [
        Turn(prompt=f"Line {i + 1} says:", answer=f" {found[i]}\n", depth=i / count) for i in quintiles(dice, count)
    ]
    return _session("copy", text(count), turns)
