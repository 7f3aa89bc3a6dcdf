"""What training makes small."""

from __future__ import annotations

import torch
from torch import Tensor


def row_divergence(scores: Tensor, target: Tensor, allowed: Tensor) -> Tensor:
    """KL divergence in nats of ``softmax(scores)`` from ``target``, averaged over rows: a scalar.

    ``scores`` and ``target [..., rows, choices]``; ``target`` need not sum to one. ``allowed`` bool, of a shape that
    expands to theirs: choices that a row has; rows without any are left out. A mean over all elements, which the
    released code takes, would let the gradient shrink with the number of choices.
    """
    allowed = allowed.expand(scores.shape)
    target = target.masked_fill(~allowed, 0.0)
    total = target.sum(-1, keepdim=True)
    rows = allowed.any(-1) & (total.squeeze(-1) > 0)
    wanted = target / total.clamp(min=torch.finfo(target.dtype).tiny)
    # A finite number: the gradient of a softmax over infinities only is not one.
    log_shares = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).log_softmax(-1)
    apart = torch.where(wanted > 0, wanted * (wanted.clamp(min=torch.finfo(target.dtype).tiny).log() - log_shares), 0.0)
    return apart.sum(-1)[rows].sum() / rows.sum().clamp(min=1)
