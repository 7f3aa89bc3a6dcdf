"""Thresholds by head: the largest whose error stays within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.call import Call
from rarefy.attention.executors import choose
from rarefy.attention.plan import AttentionPlan


@torch.no_grad()
def head_errors(plans: Sequence[AttentionPlan], call: Call) -> tuple[Tensor, Tensor]:
    """Sums of absolute differences between each plan's output and the dense one, float64 ``[plans, H]``, and of the
    dense output itself, ``[H]``. All plans have the estimator of the first, which runs once."""
    first = plans[0]
    call = first.prepared(call)

    def run(chosen: BlockMap) -> Tensor:
        executor = choose("auto", call.query, call.source, chosen, call.softcap, call.phase)
        return executor.run(call.query, call.source, chosen, call.scaling, call.softcap)[0]

    blocks = call.reach.blocks(first.block_q, first.block_k, call.query.device)
    scores = first.estimator.scores(call, blocks)
    forced = first.policy.forced(call.reach, blocks, call.layer, call.mask_heads, call.heads)
    everything = BlockMap.from_mask(blocks.some.expand(scores.shape), call.reach, blocks)
    dense = run(everything).float()
    apart, before, error = [], None, dense.new_zeros(call.heads, dtype=torch.float64)
    for plan in plans:
        keep = plan.selector.select(scores, blocks.some, forced)
        if before is None or not torch.equal(keep, before):
            sparse = run(BlockMap.from_mask(keep, call.reach, blocks)).float()
            error, before = (sparse - dense).abs().sum((0, 2, 3), dtype=torch.float64), keep
        apart.append(error)
    return torch.stack(apart), dense.abs().sum((0, 2, 3), dtype=torch.float64)


def largest_within(levels: Tensor, errors: Tensor, budget: float) -> Tensor:
    """For each head the first of ``levels [n]`` (falling) from which on no error of ``errors [n, H]`` exceeds
    ``budget``: float32 ``[H]``. The last level is one without error."""
    within = (errors <= budget).flip(0).cumprod(0).flip(0)
    return levels.to(errors.device)[within.argmax(0)].float()
