"""Choosing the next token on the GPU: the largest logit, or a draw from those that top-k and top-p leave.

A draw is the largest sum of logit and Gumbel noise, so no running sum over the vocabulary is needed. What top-k and
top-p leave is everything from some logit on; that logit is found bit by bit, with a pass over the logits for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.kernels.triton.step import begin, launch


@triton.jit
def _ordered(x):
    """Whole numbers that are in the order of the floats ``x``."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _keep(
    logits, settings, kept, vocabulary, BITS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The least logit, as an ordered number, that top-k and top-p leave: found bit by bit from the highest."""
    begin(EARLY)
    sequence = tl.program_id(0)
    row = logits + sequence.to(tl.int64) * vocabulary
    sharpness, top_k, top_p = tl.load(settings), tl.load(settings + 1).to(tl.int32), tl.load(settings + 2)
    least = tl.zeros((), tl.uint32)
    if TOP_K:
        for number in range(BITS):
            candidate = least | (tl.full((), 0x80000000, tl.uint32) >> number)
            count = tl.zeros((BLOCK,), tl.int32)
            for first in range(0, vocabulary, BLOCK):
                at = first + tl.arange(0, BLOCK)
                x = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
                count += ((_ordered(x) >= candidate) & (at < vocabulary)).to(tl.int32)
            least = tl.where(tl.sum(count, 0) >= top_k, candidate, least)
    if TOP_P:
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
            highest = tl.maximum(highest, x.to(tl.float32))
        peak = tl.max(highest, 0)
        bottom, needed = least, tl.zeros((), tl.float32)
        least = tl.zeros((), tl.uint32)
        for number in range(BITS + 1):
            # The first pass weighs all that top-k left.
            bit = tl.where(number == 0, 0, tl.full((), 0x80000000, tl.uint32) >> tl.maximum(number - 1, 0))
            candidate = least | bit
            from_here = tl.maximum(candidate, bottom)
            masses = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, vocabulary, BLOCK):
                at = first + tl.arange(0, BLOCK)
                x = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
                heavy = tl.exp((x.to(tl.float32) - peak) * sharpness)
                masses += tl.where(_ordered(x) >= from_here, heavy, 0.0)
            mass = tl.sum(masses, 0)
            needed = tl.where(number == 0, mass * top_p, needed)
            least = tl.where(mass >= needed, candidate, least)
        least = tl.maximum(least, bottom)
    tl.store(kept + sequence, least.to(tl.int32, bitcast=True))


@triton.jit
def _pick(
    logits, settings, seed, kept, tokens, positions, written, part, part_token, arrived, vocabulary, length,
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
                allowed = _ordered(x) >= tl.load(kept + sequence).to(tl.uint32, bitcast=True)
                scores = tl.where(allowed, scores, float("-inf"))
        peak, index = tl.max(scores, 0, return_indices=True)
        token = tl.where(peak > best, first + index, token)
        best = tl.maximum(best, peak)
    tl.store(part + sequence * PARTS + number, best)
    tl.store(part_token + sequence * PARTS + number, token)
    tl.debug_barrier()
    if tl.atomic_add(arrived + sequence, 1) < PARTS - 1:
        return
    tl.store(arrived + sequence, 0)
    tl.debug_barrier()
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
        self._block = min(8192, triton.next_power_of_2(vocabulary))
        self.parts = max(1, min(32, triton.next_power_of_2(vocabulary // 4096)))
        self.settings = torch.ones(3, dtype=torch.float32, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.written = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        self._kept = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._part = torch.empty(sequences, self.parts, dtype=torch.float32, device=device)
        self._part_token = torch.empty(sequences, self.parts, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(sequences, dtype=torch.int32, device=device)

    def __call__(
        self, logits: Tensor, tokens: Tensor, positions: Tensor, *, draw: bool, top_k: bool, top_p: bool
    ) -> None:
        """Put what follows ``logits [M, vocabulary]`` into ``tokens`` int64 ``[M]``, and its position into
        ``positions`` int32 ``[M]``. Without ``draw`` the largest logit wins, the first of equal ones."""
        if draw and (top_k or top_p):
            launch(
                _keep, (len(logits),), logits.device, logits, self.settings, self._kept, self.vocabulary,
                BITS=16 if logits.dtype == torch.bfloat16 else 32, TOP_K=top_k, TOP_P=top_p, BLOCK=self._block,
                num_warps=16,
            )  # fmt: skip
        launch(
            _pick, (len(logits), self.parts), logits.device, logits, self.settings, self.seed, self._kept, tokens,
            positions, self.written, self._part, self._part_token, self._arrived, self.vocabulary, self.length,
            DRAW=draw, KEPT=draw and (top_k or top_p), PARTS=self.parts, BLOCK=1024,
        )  # fmt: skip
