"""The loss that teaches a gate: what attention really looks at, block by block, against what the gate says it will."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import query_blocks, true_blocks
from rarefy.attention.gate import BlockGate
from rarefy.attention.policy import Phase
from rarefy.attention.pooling import mean, pooled
from rarefy.attention.summaries import summaries
from rarefy.training.losses import row_divergence

# The share of first queries that teach nothing: they see few blocks, and there is little to choose.
UNTAUGHT = {"prefill": 0.25, "decode": 0.5}


def gate_loss(call: Call, gates: Mapping[Phase, BlockGate], block: int) -> Tensor:
    """The sum over ``gates``, by phase, of the divergence in nats of a gate's shares of key blocks from the truth.

    The truth of a query and a block is the largest probability that the query gives to a key of the block: of a
    ``prefill`` gate the largest over the queries of a block, of a ``decode`` gate that over the heads which share keys.
    Each row of it is made to sum to one. ``call`` holds whole sequences from their beginning on; gradients reach the
    gates only.
    """
    count, device = call.query.shape[2], call.query.device
    singles, tiles = call.reach.blocks(1, block, device), call.reach.blocks(block, block, device)
    with torch.no_grad():
        peaks = true_blocks(call, singles, "max")
        query, rotary = call.query_before_rope(), call.rotary
    total = torch.zeros((), device=device)
    for phase, gate in gates.items():
        summary, begins = _summaries(call, gate, block)
        compressed = gate.compress(summary, begins, rotary)
        if phase == "prefill":
            asked = gate.ask(mean(*query_blocks(query, block)), begins, rotary)
            wanted, some = query_blocks(peaks, block)[0].amax(3), tiles.some
        else:
            asked = gate.ask(query, torch.arange(count, device=device), rotary)
            wanted, some = peaks, singles.some
        wanted = wanted.unflatten(1, (gate.maps, -1)).amax(2)
        first = int(wanted.shape[2] * UNTAUGHT[phase])
        scores = gate.score(asked[:, :, first:], compressed)
        total = total + row_divergence(scores, wanted[:, :, first:], some[:, :, first:])
    return total


@torch.no_grad()
def _summaries(call: Call, gate: BlockGate, block: int) -> tuple[Tensor, Tensor]:
    """What sums up each block of keys, and where it begins."""
    begins = torch.arange(0, call.reach.keys, block, device=call.query.device)

    def make(x: Tensor, counts: Tensor | None, places: range) -> dict[str, Tensor]:
        return {"summary": summaries(x, counts, *call.angles_of_blocks(places), gate.pools)}

    kept = pooled(call.source, f"summary of {block}, {','.join(gate.pools)}", block, make, valid=call.valid)
    return kept["summary"], begins
