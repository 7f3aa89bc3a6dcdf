"""How well a plan of sparse attention chooses: the mass it keeps, beside the most that as few blocks could keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import true_blocks
from rarefy.attention.executors import Reference
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.report import PlanReport


@dataclass(frozen=True)
class HeadChoice:
    """What a plan chose for one pass of one layer, by query head (``[H]``; maps ``[B, H, query blocks, key blocks]``).

    ``density``: share of the blocks in reach that are kept. ``recall``: share of attention's probability that lies in
    them; ``best``: the most that as many blocks of each row could hold. ``error``: how far the result is from dense
    attention's, relative to it (Frobenius norm). ``scores``: what the estimator said, for the plan's mask heads.
    """

    density: Tensor
    recall: Tensor
    best: Tensor
    error: Tensor
    kept: Tensor
    mass: Tensor
    scores: Tensor


@torch.no_grad()
def examine(plan: AttentionPlan, call: Call) -> HeadChoice:
    """Let ``plan`` choose for ``call`` whatever its policy says of short passes, and hold it against the truth."""
    policy = plan.policy.model_copy(update={"dense_below": 0, "max_density": 1.0, "phases": "both", "dense_layers": ()})
    report = PlanReport(keep_scores=True)
    found = replace(plan, policy=policy).map(call, report)
    assert found is not None
    blocks = call.reach.blocks(found.block_q, found.block_k, call.query.device)
    kept = found.per_head(call.heads).dense()
    mass = true_blocks(call, blocks)
    total = mass.sum((0, 2, 3)).clamp(min=1e-30)
    count = kept.sum(-1, keepdim=True)
    ranked = mass.sort(-1, descending=True).values
    within = torch.arange(mass.shape[-1], device=mass.device) < count
    sparse, _ = Reference().run(call.query, call.source, found, call.scaling, call.softcap)
    whole = found.from_mask(blocks.some.expand(kept.shape), call.reach, blocks)
    dense, _ = Reference().run(call.query, call.source, whole, call.scaling, call.softcap)
    apart = (sparse.float() - dense.float()).square().sum((0, 2, 3)).sqrt()
    return HeadChoice(
        density=found.per_head(call.heads).density(),
        recall=(mass * kept).sum((0, 2, 3)) / total,
        best=(ranked * within).sum((0, 2, 3)) / total,
        error=apart / dense.float().square().sum((0, 2, 3)).sqrt().clamp(min=1e-30),
        kept=kept,
        mass=mass,
        scores=report.scores[call.layer],
    )
