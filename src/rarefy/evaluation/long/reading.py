"""Tasks that ask about what a text says: facts hidden in prose, choices, outlines, functions of a source tree."""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
from pathlib import Path

from rarefy.evaluation.long.material import NAMES, Material, depths, number, words
from rarefy.evaluation.long.retrieval import TURNS, key_value_easy
from rarefy.evaluation.long.sessions import Session, Turn

THINGS = "lantern violin compass kettle ladder mirror saddle telescope umbrella clock anchor basket".split()
COLOURS = "copper silver green crimson yellow purple white black".split()
PLACES = "attic cellar garden kitchen stable library harbour chapel barn tower orchard workshop".split()
# The same in Chinese: people, things, places.
PEOPLE_CHN = "王芳 李明 张伟 刘洋 陈静 赵磊 孙丽 周杰".split()
THINGS_CHN = "灯笼 小提琴 指南针 水壶 梯子 镜子 望远镜 雨伞".split()
PLACES_CHN = "阁楼 地窖 花园 厨房 马厩 图书馆 港口 塔楼".split()
FILLER_CHN = (
    "今天 天气 很好 大家 一起 去 河边 散步 风 轻轻 "
    "吹过 树叶 发出 声音 孩子们 在 草地 上 玩耍 老人 聊天"
).split()
TOPICS = (
    "rivers bridges weather music bread ships gardens glass paper winter horses lamps maps salt trains wool"
).split()
# Modules of Python's own library with many small documented functions, in every release.
MODULES = (
    "statistics textwrap random shutil fractions calendar bisect heapq colorsys string tokenize inspect"
).split()


def _facts(dice: random.Random) -> list[tuple[str, str, str]]:
    """Who keeps what where; no person, thing or place twice."""
    things = [f"{dice.choice(COLOURS)} {thing}" for thing in dice.sample(THINGS, TURNS)]
    return list(zip(dice.sample(NAMES, TURNS), things, dice.sample(PLACES, TURNS), strict=True))


def question_english(material: Material, tokens: int, dice: random.Random) -> Session:
    """Where people keep things, said once each somewhere in prose and asked in other words."""
    facts = _facts(dice)
    inserts = [
        (depth, f"{who} had put the {what} away in the {where}. ")
        for depth, (who, what, where) in zip(depths(TURNS), facts, strict=True)
    ]
    turns = [
        Turn(
            prompt=f"\nQuestion: Where is the {what} that {who} put away?\nAnswer: In the", answer=f" {where}",
            depth=depth,
        )
        for depth, (who, what, where) in zip(depths(TURNS), facts, strict=True)
    ]  # fmt: skip
    return Session(task="qa_eng", id="", context=material.prose(dice, tokens, inserts), turns=tuple(turns))


def question_chinese(material: Material, tokens: int, dice: random.Random) -> Session:
    """The same in Chinese, in filler made of everyday words."""
    people, things, places = (dice.sample(kind, TURNS) for kind in (PEOPLE_CHN, THINGS_CHN, PLACES_CHN))
    facts = [f"{who}把{what}放在{where}里。" for who, what, where in zip(people, things, places, strict=True)]
    seed = dice.getrandbits(32)

    def text(count: int) -> str:
        own = random.Random(seed)
        lines = ["".join(own.choices(FILLER_CHN, k=9)) + "。" for _ in range(count)]
        for depth, fact in zip(reversed(depths(TURNS)), reversed(facts), strict=True):
            lines.insert(int(depth * count), fact)
        return "".join(lines)

    context = text(material.grow(text, tokens, TURNS))
    turns = [
        Turn(prompt=f"\n问题：{who}把{what}放在哪里？\n回答：", answer=where, depth=depth)
        for depth, who, what, where in zip(depths(TURNS), people, things, places, strict=True)
    ]
    return Session(task="qa_chn", id="", context=context, turns=tuple(turns))


def choice_english(material: Material, tokens: int, dice: random.Random) -> Session:
    """Facts in prose, each asked with four places to choose from."""
    session = question_english(material, tokens, dice)
    turns = []
    for turn in session.turns:
        right = turn.answer.strip()
        options = [right, *dice.sample([place for place in PLACES if place != right], 3)]
        dice.shuffle(options)
        listed = "\n".join(f"{letter}. In the {place}" for letter, place in zip("ABCD", options, strict=True))
        prompt = turn.prompt.replace("\nAnswer: In the", f"\n{listed}\nThe right letter is")
        turns.append(Turn(prompt=prompt, answer=f" {'ABCD'[options.index(right)]}", depth=turn.depth))
    return session.model_copy(update={"task": "choice_eng", "turns": tuple(turns)})


def _outline(material: Material, tokens: int, dice: random.Random) -> tuple[str, str]:
    """Prose in parts under headings, and the headings in one sentence: a summary whose truth is known."""
    topics = dice.sample(TOPICS, 5)
    inserts = [(part / 5, f"\nPart {part + 1}, on {topic}.\n") for part, topic in enumerate(topics)]
    return material.prose(dice, tokens, inserts), ", ".join(f"on {topic}" for topic in topics)


def summary(material: Material, tokens: int, dice: random.Random) -> Session:
    """The outline of a text in five parts."""
    context, outline = _outline(material, tokens, dice)
    turn = Turn(prompt="\nIn short, the text has five parts:", answer=f" {outline}.")
    return Session(task="summary", id="", context=context, turns=(turn,))


def summary_with_needles(material: Material, tokens: int, dice: random.Random) -> Session:
    """The outline of a text, then numbers that were hidden in it."""
    names, values = words(dice, TURNS - 1), [number(dice, 5) for _ in range(TURNS - 1)]
    topics = dice.sample(TOPICS, 5)
    inserts = [(part / 5, f"\nPart {part + 1}, on {topic}.\n") for part, topic in enumerate(topics)]
    inserts += [
        (depth, f"The number of {name} is {value}. ")
        for depth, name, value in zip(depths(TURNS - 1), names, values, strict=True)
    ]
    turns = [Turn(prompt="\nIn short, the text has five parts:", answer=f" on {', on '.join(topics)}.")]
    turns += [
        Turn(prompt=f"\nThe number of {name} is", answer=f" {value}", depth=depth)
        for depth, name, value in zip(depths(TURNS - 1), names, values, strict=True)
    ]
    context = material.prose(dice, tokens, inserts)
    return Session(task="summary_with_needles", id="", context=context, turns=tuple(turns))


def find_function(material: Material, tokens: int, dice: random.Random) -> Session:
    """A function of a source tree by what its documentation says; that is taken out of the context."""
    chosen: list[tuple[str, str, str]] = []
    room = tokens
    for name, about, source in dice.sample(_functions(), len(_functions())):
        length = material.count(source + "\n\n")
        if length <= room and name not in (known for known, _, _ in chosen):
            chosen.append((name, about, source))
            room -= length
        if room < 40:
            break
    context = "".join(f"{source}\n\n" for _, _, source in chosen)
    asked = dice.sample(range(len(chosen)), min(TURNS, len(chosen)))
    turns = []
    for index in asked:
        _, about, source = chosen[index]
        answer = "\n".join(source.split("\n")[:4]) + "\n"
        prompt = f"\n# The function above that does this: {about}\n"
        turns.append(Turn(prompt=prompt, answer=answer, depth=context.index(source) / len(context)))
    return Session(task="repoqa", id="", context=context, turns=tuple(turns))


def find_function_and_value(material: Material, tokens: int, dice: random.Random) -> Session:
    """Half a source tree, half keys and values; questions about both in turn."""
    first, second = find_function(material, tokens // 2, dice), key_value_easy(material, tokens // 2, dice)
    turns = [turn for pair in zip(first.turns[:3], second.turns[:3], strict=False) for turn in pair][:TURNS]
    context = f"{first.context}\n{second.context}"
    shares = len(first.context) / len(context), len(second.context) / len(context)
    shifted = [
        turn.model_copy(update={"depth": (turn.depth or 0) * shares[index % 2] + (index % 2) * shares[0]})
        for index, turn in enumerate(turns)
    ]
    return Session(task="repoqa_and_kv", id="", context=context, turns=tuple(shifted))


@functools.cache
def _functions() -> tuple[tuple[str, str, str], ...]:
    """Name, first line of documentation, and source without documentation of small functions of Python's library."""
    found = []
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            continue
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))
        for node in tree.body:
            about = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not isinstance(node, ast.FunctionDef) or about is None or len(node.body) < 2:
                continue
            node.body = node.body[1:]
            source = ast.unparse(node)
            if 3 <= source.count("\n") <= 20:
                found.append((node.name, about.replace("\n", " ").split(". ")[0], source))
    return tuple(found)
