"""Ways to cut products up, tried inside the step that they are part of.

A product that is timed by itself has the whole GPU and finds some of its weights in the cache; in a step it begins
beside its neighbours. So each of a step's products is tried in place, the one that reads most first, and what makes the
step faster stays.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.cuda import measure, program, tuning
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.program import PLAIN, Ending, Tuning

Product = tuple[Ending, Code, int, int, int]  # what becomes of it, code, rows, columns, tokens


class Choices:
    """What is chosen for each product, instead of what ``tuning.choose_with`` would."""

    def __init__(self) -> None:
        self.chosen: dict[Product, Tuning] = {}
        self.uses: Counter[Product] = Counter()
        self.choose = tuning.choose_with

    def __call__(
        self, ending: Ending, code: Code, rows: int, columns: int, tokens: int, device: torch.device
    ) -> Tuning:
        key = ending, code, rows, columns, tokens
        self.uses[key] += 1
        if key not in self.chosen:
            self.chosen[key] = self.choose(ending, code, rows, columns, tokens, device)
        return self.chosen[key]

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Choose so for what is captured meanwhile."""
        tuning.choose_with = self  # type: ignore[assignment]
        try:
            yield
        finally:
            tuning.choose_with = self.choose

    def products(self, tokens: int) -> list[Product]:
        """Those of so many tokens, what reads most in a step first."""
        found = [key for key in self.chosen if key[4] == tokens]
        return sorted(found, key=lambda key: -key[2] * key[3] * key[1].bits * self.uses[key])

    def entries(self, tokens: int) -> list[dict[str, Any]]:
        """As ``kernels/cuda/tuning.py`` keeps them."""
        return [tuning.entry(*key[1:], self.chosen[key]) for key in self.products(tokens)]


def tune(choices: Choices, given: Callable[[], float], tokens: int, seconds: float, most: int = 10) -> list[str]:
    """Change ``choices`` so that a step, which ``given()`` captures anew and times, takes less. Returns what was
    found on the way."""
    deadline, found = time.monotonic() + seconds, []

    def step() -> float:
        try:
            return given()
        except UnsupportedError as reason:  # a kernel that this GPU does not take
            found.append(str(reason)[:100])
            return float("inf")

    best = step()
    found.append(f"as chosen: {best:.4f} ms")
    products = choices.products(tokens)
    tried = {key: _candidates(key, choices.chosen[key], most) for key in products}
    _compile({(key[1], each, key[0]) for key, some in tried.items() for each in some})
    # How launches follow each other concerns all products at once.
    for overlap in (False, True):
        before = dict(choices.chosen)
        choices.chosen.update({key: replace(choices.chosen[key], overlap=overlap) for key in products})
        took = step()
        found.append(f"overlap {overlap}: {took:.4f} ms")
        if took < best:
            best = took
        else:
            choices.chosen = before
    for key in products:
        for each in [*tried[key], None]:  # the last time with the other overlap
            if time.monotonic() > deadline:
                return [*found, "out of time"]
            before = choices.chosen[key]
            choices.chosen[key] = replace(each or before, overlap=before.overlap == (each is not None))
            took = step()
            if took < best * 0.998:
                best = took
                found.append(f"{key[2]}x{key[3]}: {best:.4f} ms with {choices.chosen[key]}")
            else:
                choices.chosen[key] = before
    return found


def _candidates(product: Product, chosen: Tuning, most: int) -> Sequence[Tuning]:
    ending, code, _, columns, tokens = product
    wide = measure.takes_wide(torch.device("cuda", 0)) and (ending == PLAIN or tokens == 1)
    every = measure.candidates(code, tokens, wide, columns)
    if ending.kind == "gated":
        halves = (each.with_halves() for each in every)
        every = (each for each in halves if tuning.can_be_stored(code, each, columns, ending))
    fitting = (each for each in dict.fromkeys(islice(every, 2 * most)) if each != replace(chosen, overlap=False))
    return list(islice(fitting, most))


def _compile(kernels: set[tuple[Code, Tuning, Ending]]) -> None:
    """All at once, since each takes a second."""

    def compiled(kernel: tuple[Code, Tuning, Ending]) -> None:
        code, tuning, ending = kernel
        with suppress(UnsupportedError):  # said when it is tried
            program.compiled(code, tuning, False, torch.device("cuda", 0), ending)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compiled, kernels))
