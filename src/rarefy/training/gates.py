"""What teaches a gate: what attention really looks at, block by block, against what the gate says it will."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import query_blocks, true_blocks
from rarefy.attention.estimators.rows import seen
from rarefy.attention.gate import BlockGate, Truth
from rarefy.attention.policy import Phase, Policy
from rarefy.attention.pooling import mean, pooled
from rarefy.attention.reach import Reach
from rarefy.attention.summaries import summaries
from rarefy.kv.rotary import Rotary
from rarefy.training.losses import row_divergence

# The share of first queries that teach nothing: they see few blocks, and there is little to choose.
UNTAUGHT = {"prefill": 0.25, "decode": 0.5}
# Queries of a text that teach a gate for decoding. Neighbours look at much the same; another text teaches more.
TAUGHT = 128
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Lesson:
    """What one gate learns from one text. ``query [B, H, n, D]``: queries or means of blocks of them, before rotary
    embedding, at ``places [n]``; ``summary [B, Hkv, N, pools * D]`` of the blocks of keys that begin at ``begins [N]``;
    ``wanted [B, maps, n, N]``: what attention gives to each block, of those in ``some``, bool ``[B or 1, 1, n, N]``;
    ``free``: those among them that are not read in any case, bool ``[B or 1, 1 or maps, n, N]``."""

    query: Tensor
    places: Tensor
    summary: Tensor
    begins: Tensor
    wanted: Tensor
    some: Tensor
    free: Tensor
    rotary: Rotary

    def loss(self, gate: BlockGate) -> Tensor:
        """The divergence in nats of the gate's shares of blocks from the truth, whose rows are made to sum to one:
        that of all blocks, and that of the free ones among themselves, which alone decides what is chosen and of which
        the first hardly tells where few blocks have nearly all of a row."""
        asked = gate.ask(self.query, self.places, self.rotary)
        scores = gate.score(asked, gate.compress(self.summary, self.begins, self.rotary))
        return row_divergence(scores, self.wanted, self.some) + row_divergence(scores, self.wanted, self.free)

    @property
    def kind(self) -> Hashable:
        """What lessons have to share to be joined."""
        shapes = (self.query.shape, self.summary.shape, self.wanted.shape)
        return (*shapes, tuple(self.rotary.inv_freq.tolist()), self.rotary.factor)

    @classmethod
    def join(cls, lessons: Sequence[Lesson]) -> Lesson:
        """Lessons of several layers on one text as one lesson, with their heads side by side."""
        shape = lessons[0].wanted.shape

        def side_by_side(name: str) -> Tensor:
            return torch.cat([getattr(lesson, name) for lesson in lessons], 1)

        some, free = (
            torch.cat([getattr(lesson, name).expand(shape) for lesson in lessons], 1) for name in ("some", "free")
        )
        return replace(
            lessons[0], query=side_by_side("query"), summary=side_by_side("summary"), wanted=side_by_side("wanted"),
            some=some, free=free,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        parts = (getattr(self, field.name) for field in fields(self))
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))


@torch.no_grad()
def lessons(
    call: Call, gates: Mapping[Phase, BlockGate], policy: Policy, block: int, truth: Truth = "both"
) -> dict[Phase, Lesson]:
    """What ``gates``, by phase, can learn from ``call``, which holds whole sequences from their beginning on.

    The truth of a block is the largest probability (``max``) or the sum of probabilities (``mass``) that the queries of
    a block (``prefill``) or one query (``decode``) give to its keys, of heads that share a map joined likewise; or the
    mean of a block's shares by one and by the other (``both``). ``policy`` says which blocks are read in any case.
    """
    count, device = call.query.shape[2], call.query.device
    query = call.query_before_rope().to(call.query.dtype)
    found: dict[Phase, Lesson] = {}
    for phase, gate in gates.items():
        span = block if phase == "prefill" else 1
        blocks = call.reach.blocks(span, block, device)
        first = int(blocks.rows * UNTAUGHT[phase])
        if phase == "prefill":
            rows = torch.arange(first, blocks.rows, device=device)
            asked = mean(*query_blocks(query, block))
        else:
            rows = torch.arange(first, count, max(1, (count - first) // TAUGHT), device=device)
            asked = query
        forced = policy.forced(call.reach, blocks, call.layer, gate.maps, call.heads)
        summary, begins = _summaries(call, gate, block)
        found[phase] = Lesson(
            query=asked[:, :, rows], places=rows * span, summary=summary, begins=begins,
            wanted=_truth(call, rows, span, block, gate.maps, truth), some=blocks.some[:, :, rows],
            free=(blocks.some & ~forced)[:, :, rows], rotary=call.rotary,
        )  # fmt: skip
    return found


def _truth(call: Call, rows: Tensor, span: int, block: int, maps: int, truth: Truth) -> Tensor:
    """What attention gives to blocks of keys from blocks ``rows [n]`` of ``span`` queries: ``[B, maps, n, N]``."""
    if truth == "both":
        parts = (_truth(call, rows, span, block, maps, each) for each in ("max", "mass"))
        return torch.stack([part / part.sum(-1, keepdim=True).clamp(min=TINY) for part in parts]).mean(0)
    if span == 1:  # of these only, since there are as many as there are tokens
        keys = torch.arange(call.reach.keys, device=rows.device)
        reach = Reach(len(rows), len(keys), 0, mask=seen(call.reach, rows, keys))
        some = replace(call, query=call.query[:, :, rows], reach=reach)
        found = true_blocks(some, reach.blocks(1, block), truth)
    else:
        found = true_blocks(call, call.reach.blocks(span, block, rows.device), truth)[:, :, rows]
    shared = found.unflatten(1, (maps, -1))
    return shared.amax(2) if truth == "max" else shared.sum(2)


def _summaries(call: Call, gate: BlockGate, block: int) -> tuple[Tensor, Tensor]:
    """What sums up each block of keys, and where it begins."""
    begins = torch.arange(0, call.reach.keys, block, device=call.query.device)

    def make(x: Tensor, counts: Tensor | None, places: range) -> dict[str, Tensor]:
        return {"summary": summaries(x, counts, *call.angles_of_blocks(places), gate.pools)}

    kept = pooled(call.source, f"summary of {block}, {','.join(gate.pools)}", block, make, valid=call.valid)
    return kept["summary"], begins
