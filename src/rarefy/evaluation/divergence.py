"""How far a model's predictions are from a reference's: KL divergence and top-1 agreement."""

from __future__ import annotations

import torch


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
    return reference.argmax(-1) == candidate.argmax(-1)
