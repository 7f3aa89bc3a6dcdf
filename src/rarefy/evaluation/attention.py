"""How well a plan of sparse attention chooses: the mass it keeps, beside the most that as few blocks could keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.call import Call
from rarefy.attention.estimators import true_blocks
from rarefy.attention.executors import choose
from rarefy.attention.plan import AttentionPlan


@dataclass(frozen=True)
class Choice:
    """What a plan chose for one pass of one layer, by query head (``[H]``; maps ``[B, H, query blocks, key blocks]``).

    Numbers are those of the query blocks from ``first`` on. ``density``: share of the blocks in reach that are kept.
    ``recall``: share of attention's probability that lies in them; ``best``: the most that as many blocks of each row
    could hold. ``error``: how far the result is from that of dense attention, relative to it (Frobenius norm).
    ``scores``: what the estimator said; ``mass``: probability, added up over keys and averaged over queries; ``some``:
    which blocks are in reach.
    """

    density: Tensor
    recall: Tensor
    best: Tensor
    error: Tensor
    scores: Tensor
    kept: Tensor
    mass: Tensor
    some: Tensor


@torch.no_grad()
def examine(plan: AttentionPlan, call: Call, first: int = 0) -> Choice:
    """Let ``plan`` choose for ``call``, whatever its policy says of short passes, and hold it against the truth."""
    call = plan.prepared(call)
    blocks = call.reach.blocks(min(plan.block_q, call.query.shape[2]), plan.block_k, call.query.device)
    scores = plan.estimator.scores(call, blocks)
    forced = plan.policy.forced(call.reach, blocks, call.layer, call.mask_heads, call.heads)
    chosen = BlockMap.from_mask(plan.selector_of(call.phase).select(scores, blocks.some, forced), call.reach, blocks)
    chosen = chosen.per_head(call.heads)
    kept, mass = chosen.dense(), true_blocks(call, blocks)
    whole = BlockMap.from_mask(blocks.some.expand(kept.shape), call.reach, blocks)
    tiny = torch.finfo(mass.dtype).tiny
    sparse, dense = (
        choose("auto", call.query, call.source, each, call.softcap, call.phase).run(
            call.query, call.source, each, call.scaling, call.softcap
        )[0][:, :, first * blocks.block_q :]
        for each in (chosen, whole)
    )
    size = dense.float().square().sum((0, 2, 3)).sqrt().clamp(min=tiny)
    held, own, some = mass[:, :, first:], kept[:, :, first:], blocks.some.expand(kept.shape)
    total = held.sum((0, 2, 3)).clamp(min=tiny)
    within = torch.arange(blocks.columns, device=mass.device) < own.sum(-1, keepdim=True)
    return Choice(
        density=own.sum((0, 2, 3)) / some[:, :, first:].sum((0, 2, 3)).clamp(min=1),
        recall=(held * own).sum((0, 2, 3)) / total,
        best=(held.sort(-1, descending=True).values * within).sum((0, 2, 3)) / total,
        error=(sparse.float() - dense.float()).square().sum((0, 2, 3)).sqrt() / size,
        scores=scores.repeat_interleave(call.heads // scores.shape[1], 1),
        kept=kept,
        mass=mass / mass.sum(-1, keepdim=True).clamp(min=tiny),
        some=some,
    )


@dataclass(frozen=True)
class AttentionMaps:
    """What ``plan`` chose in every layer for ``tokens`` tokens of ``text``."""

    model: str
    plan: str
    text: str
    tokens: int
    block_q: int
    block_k: int
    layers: dict[int, Choice]

    def summary(self) -> dict[str, Any]:
        """Means over layers and heads."""
        found = self.layers.values()
        means = {
            name: float(torch.stack([getattr(choice, name).mean() for choice in found]).mean())
            for name in ("density", "recall", "best", "error")
        }
        return {"model": self.model, "plan": self.plan, "text": self.text, "tokens": self.tokens, **means}
