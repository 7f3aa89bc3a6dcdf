"""Choosing the next token on the GPU: the largest logit, or a draw from those that top-k and top-p leave.

A draw is the largest sum of logit and Gumbel noise, so no running sum over the vocabulary is needed. What top-k and
top-p leave is everything from some logit on; that logit is found two bits at a time, with a launch for each two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.triton.step import begin, launch

BLOCK = 1024


@triton.jit
def _ordered(x):
    """Whole numbers that are in the order of the floats ``x``."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _last(arrived, PARTS: tl.constexpr):
    """Whether this program is the last of ``PARTS`` to come here; what the others wrote is then visible."""
    tl.debug_barrier()  # so that all of the program's numbers are written when it is counted
    last = tl.atomic_add(arrived, 1) == PARTS - 1
    if last:
        tl.store(arrived, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _weigh(
    logits, settings, bottom, peak, needed, part, arrived, vocabulary,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The largest logit, and which mass, relative to its own, top-p wants of all from ``bottom`` on."""
    begin(EARLY)
    sequence, number = tl.program_id(0), tl.program_id(1)
    row = logits + sequence.to(tl.int64) * vocabulary
    sharpness, floor = tl.load(settings), tl.load(bottom + sequence).to(tl.uint32, bitcast=True)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    each = tl.cdiv(tl.cdiv(vocabulary, BLOCK), PARTS) * BLOCK
    for first in range(number * each, tl.minimum((number + 1) * each, vocabulary), BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
        x = tl.where(_ordered(x) >= floor, x.to(tl.float32) * sharpness, float("-inf"))
        higher = tl.maximum(top, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    highest = tl.max(top, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    own = part + (sequence * PARTS + number) * 4
    tl.store(own, highest)
    tl.store(own + 1, tl.sum(mass * tl.exp(top - safe), 0))
    if _last(arrived + sequence, PARTS):
        place = part + (sequence * PARTS + tl.arange(0, PARTS)) * 4
        tops = tl.load(place, cache_modifier=".cg")
        peak_of_all = tl.max(tops, 0)
        total = tl.sum(tl.load(place + 1, cache_modifier=".cg") * tl.exp(tops - peak_of_all), 0)
        tl.store(peak + sequence, peak_of_all)
        tl.store(needed + sequence, total * tl.load(settings + 2))


@triton.jit
def _narrow(
    logits, settings, least, bottom, peak, needed, part, arrived, vocabulary, shift,
    MASS: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Two more bits of the largest number ``least`` from which on there are still as many logits as top-k wants, or,
    with ``MASS``, as much mass as top-p does."""
    begin(EARLY)
    sequence, number = tl.program_id(0), tl.program_id(1)
    row = logits + sequence.to(tl.int64) * vocabulary
    known = tl.zeros((), tl.uint32)
    if not FIRST:
        known = tl.load(least + sequence).to(tl.uint32, bitcast=True)
    step = tl.full((), 1, tl.uint32) << shift
    sharpness, highest = tl.load(settings), tl.load(peak + sequence)
    floor = tl.load(bottom + sequence).to(tl.uint32, bitcast=True)
    one, two, three = (tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32))
    each = tl.cdiv(tl.cdiv(vocabulary, BLOCK), PARTS) * BLOCK
    for first in range(number * each, tl.minimum((number + 1) * each, vocabulary), BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
        order = _ordered(x)
        here = at < vocabulary
        weight = here.to(tl.float32)
        if MASS:
            weight = tl.where(here & (order >= floor), tl.exp(x.to(tl.float32) * sharpness - highest), 0.0)
        one += tl.where(order >= known + step, weight, 0.0)
        two += tl.where(order >= known + 2 * step, weight, 0.0)
        three += tl.where(order >= known + 3 * step, weight, 0.0)
    own = part + (sequence * PARTS + number) * 4
    tl.store(own, tl.sum(one, 0))
    tl.store(own + 1, tl.sum(two, 0))
    tl.store(own + 2, tl.sum(three, 0))
    if _last(arrived + sequence, PARTS):
        place = part + (sequence * PARTS + tl.arange(0, PARTS)) * 4
        wanted = tl.load(needed + sequence) if MASS else tl.load(settings + 1)
        enough = (tl.sum(tl.load(place, cache_modifier=".cg"), 0) >= wanted).to(tl.uint32)
        enough += (tl.sum(tl.load(place + 1, cache_modifier=".cg"), 0) >= wanted).to(tl.uint32)
        enough += (tl.sum(tl.load(place + 2, cache_modifier=".cg"), 0) >= wanted).to(tl.uint32)
        tl.store(least + sequence, (known + enough * step).to(tl.int32, bitcast=True))


@triton.jit
def _pick(
    logits, settings, seed, kept, bottom, tokens, positions, written, part, part_token, arrived, vocabulary, length,
    DRAW: tl.constexpr, KEPT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The token of the largest logit; with ``DRAW`` of the largest sum with noise, which draws from the softmax."""
    begin(EARLY)
    sequence, number = tl.program_id(0), tl.program_id(1)
    row = logits + sequence.to(tl.int64) * vocabulary
    position = tl.load(positions + sequence)
    best, token = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.int32)
    each = tl.cdiv(tl.cdiv(vocabulary, BLOCK), PARTS) * BLOCK
    for first in range(number * each, tl.minimum((number + 1) * each, vocabulary), BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
        scores = x.to(tl.float32)
        if DRAW:
            random, _, _, _ = tl.philox(tl.load(seed), at, position, sequence, 0)
            scores = scores * tl.load(settings) - tl.log(-tl.log(tl.uint_to_uniform_float(random)))
            if KEPT:
                least = tl.load(kept + sequence).to(tl.uint32, bitcast=True)
                least = tl.maximum(least, tl.load(bottom + sequence).to(tl.uint32, bitcast=True))
                scores = tl.where(_ordered(x) >= least, scores, float("-inf"))
        peak, index = tl.max(scores, 0, return_indices=True)
        token = tl.where(peak > best, first + index, token)
        best = tl.maximum(best, peak)
    tl.store(part + sequence * PARTS + number, best)
    tl.store(part_token + sequence * PARTS + number, token)
    if not _last(arrived + sequence, PARTS):
        return
    place = sequence * PARTS + tl.arange(0, PARTS)
    _, winner = tl.max(tl.load(part + place, cache_modifier=".cg"), 0, return_indices=True)
    token = tl.load(part_token + sequence * PARTS + winner, cache_modifier=".cg").to(tl.int64)
    tl.store(tokens + sequence, token)
    tl.store(written + sequence.to(tl.int64) * length + (position + 1) % length, token)
    tl.store(positions + sequence, position + 1)


class Picker:
    """Chooses the next token of M sequences on the GPU, and writes it down.

    ``settings`` float32 ``[3]``: 1 / temperature, top-k, top-p; ``seed`` int64 ``[1]``. A token drawn depends on the
    seed, its position and its sequence's number alone. ``written`` int64 ``[M, length]``: the token of position ``p``
    stands at ``p % length``.
    """

    def __init__(self, sequences: int, vocabulary: int, length: int, device: torch.device):
        self.vocabulary, self.length = vocabulary, length
        self.parts = max(1, min(32, triton.next_power_of_2(vocabulary // 4096)))
        self.settings = torch.ones(3, dtype=torch.float32, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.written = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        # The least logits of top-p and of top-k, as ordered numbers.
        self._least, self._bottom, self._part_token, self._arrived = (
            torch.zeros(sequences * size, dtype=torch.int32, device=device) for size in (1, 1, self.parts, 1)
        )
        self._peak, self._needed, self._part = (
            torch.zeros(sequences * size, dtype=torch.float32, device=device) for size in (1, 1, 4 * self.parts)
        )

    def __call__(
        self, logits: Tensor, tokens: Tensor, positions: Tensor, *, draw: bool, top_k: bool, top_p: bool
    ) -> None:
        """Put what follows ``logits [M, vocabulary]`` into ``tokens`` int64 ``[M]``, and its position into
        ``positions`` int32 ``[M]``. Without ``draw`` the largest logit wins, the first of equal ones."""
        grid, device = (len(logits), self.parts), logits.device
        shared = (self._peak, self._needed, self._part, self._arrived, self.vocabulary)
        cut: dict[str, Any] = {"PARTS": self.parts, "BLOCK": BLOCK}
        last = 16 if logits.dtype == torch.bfloat16 else 0  # bits below are none of the logits'
        for wanted, least in ((top_k, self._bottom), (top_p, self._least)):
            if draw and (top_k or top_p) and not wanted:
                least.zero_()  # of an earlier draw that wanted more
        for mass, least in ((False, self._bottom), (True, self._least)):
            if not draw or not (top_p if mass else top_k):
                continue
            if mass:
                launch(_weigh, grid, device, logits, self.settings, self._bottom, *shared, **cut)
            for shift in range(30, last - 1, -2):
                launch(
                    _narrow, grid, device, logits, self.settings, least, self._bottom, *shared, shift,
                    MASS=mass, FIRST=shift == 30, **cut,
                )  # fmt: skip
        launch(
            _pick, grid, device, logits, self.settings, self.seed, self._least, self._bottom, tokens, positions,
            self.written, self._part, self._part_token, self._arrived, self.vocabulary, self.length,
            DRAW=draw, KEPT=draw and (top_k or top_p), **cut,
        )  # fmt: skip
