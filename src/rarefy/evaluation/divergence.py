"""How far a model's predictions are from a reference's: KL divergence and top-1 agreement."""

from __future__ import annotations

import torch

BLOCK = 256


def kl_(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) in nats per row, over the whole vocabulary: [T].

    Both are log-probabilities [T, V]; both are overwritten, since a copy of either is as large as all the work.
    Exactly 0 for equal rows; rounding may leave rows that are nearly equal a float32 step below it.
    """
    difference = torch.sub(reference, candidate, out=candidate)
    return reference.exp_().mul_(difference).sum(-1)


def top1(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Whether the most probable token is the same, per row of two [T, V] scores: BoolTensor [T]. Of equally probable
    tokens the first counts, as in greedy decoding."""
    return first_max(reference) == first_max(candidate)


def first_max(scores: torch.Tensor) -> torch.Tensor:
    """``scores.argmax(-1)`` of [T, V] as LongTensor [T], the first of equals for certain, and faster.

    On a CPU torch finds the largest value with vector instructions, but where it is with scalar ones on one core: so
    look for the largest of each block first, and for the place in one block only.
    """
    vocab = scores.shape[1]
    blocks = vocab // BLOCK
    tops = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1)
    if blocks * BLOCK < vocab:
        tops = torch.cat([tops, scores[:, blocks * BLOCK :].amax(-1, keepdim=True)], 1)
    first = tops.argmax(-1, keepdim=True) * BLOCK
    # The last block may be short: its last column, repeated, is never the first of equals.
    columns = (first + torch.arange(BLOCK, device=scores.device)).clamp_max_(vocab - 1)
    return columns.gather(1, scores.gather(1, columns).argmax(-1, keepdim=True)).squeeze(1)
