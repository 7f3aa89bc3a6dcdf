"""Negative log-likelihood and perplexity."""

from __future__ import annotations

import math

import torch


def token_nll(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of ``targets`` (LongTensor [T]) under ``log_probs`` ([T, V]): [T]."""
    return log_probs.gather(1, targets[:, None]).squeeze(1).neg()


def perplexity(nll: float, tokens: int) -> float:
    """exp(``nll`` / ``tokens``) for a total ``nll`` in nats; infinite where that overflows a float."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
