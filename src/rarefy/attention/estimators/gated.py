"""Learned gates as an estimator: one for blocks of queries in prefill, one for single queries in decoding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.attention.call import Call, by_mask_head
from rarefy.attention.estimators.base import Estimator, Products, query_blocks
from rarefy.attention.gate import BlockGate
from rarefy.attention.policy import Phase
from rarefy.attention.pooling import pooled
from rarefy.attention.reach import Blocks
from rarefy.attention.summaries import summaries
from rarefy.core.errors import OptionError
from rarefy.kv.rotary import unrotate


class Gated(Estimator):
    """Scores of one of ``gates``, by the phase of the call. Of a block of queries the mean is looked at. Keys are as
    they were before rotary embedding; what stands for a block of them is kept in the cache's state, in the model's
    dtype."""

    def __init__(self, gates: Mapping[Phase, BlockGate]):
        self.gates = gates

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        gate = self.gates.get(call.phase)
        if gate is None:
            raise OptionError(f"Layer {call.layer} has no trained gate for {call.phase}; train one, or leave it dense.")
        asked = self._asked(call, gate, blocks.block_q)
        compressed = self._compressed(call, gate, blocks.block_k)["key"]
        return by_mask_head(gate.score(asked, compressed), call)

    def products(self, call: Call, block_k: int) -> Products | None:
        gate = self.gates.get(call.phase)
        if gate is None or gate.maps != call.mask_heads:
            return None
        kept = self._compressed(call, gate, block_k, unfinished=False)
        return Products(self._asked(call, gate, 1)[:, :, 0], kept["key"], gate.scaling) if kept else None

    def observe(self, call: Call, block_k: int) -> None:
        if "decode" in self.gates:  # the one whose state is worth its bytes: later steps read it again and again
            self._compressed(call, self.gates["decode"], block_k, unfinished=False)

    def _asked(self, call: Call, gate: BlockGate, block_q: int) -> Tensor:
        """What stands for blocks of queries."""
        query = self._queries(call, block_q) if block_q > 1 else call.query_before_rope()
        places = call.reach.offset + block_q * torch.arange(query.shape[2], device=query.device)
        return gate.ask(query, places, call.rotary)

    @staticmethod
    def _queries(call: Call, block_q: int) -> Tensor:
        """Mean queries of blocks, as they were before rotary embedding."""
        whole = call.query.shape[2] // block_q * block_q
        cos, sin = call.query_angles()
        parts = [summaries(*query_blocks(call.query[:, :, :whole], block_q), cos[:, :whole], sin[:, :whole], ("mean",))]
        if whole < call.query.shape[2]:
            rest = unrotate(call.query[:, :, whole:], cos[:, None, whole:], sin[:, None, whole:])
            parts.append(rest.mean(2, keepdim=True))
        return torch.cat(parts, 2)

    @staticmethod
    def _compressed(call: Call, gate: BlockGate, block_k: int, unfinished: bool = True) -> dict[str, Tensor]:
        """What stands for blocks of keys."""

        def make(x: Tensor, counts: Tensor | None, begins: range) -> dict[str, Tensor]:
            pools = summaries(x, counts, *call.angles_of_blocks(begins), gate.pools)
            places = torch.arange(begins.start, begins.stop, begins.step, device=x.device)
            return {"key": gate.compress(pools, places, call.rotary).to(call.query.dtype)}

        name = f"gate for {gate.maps} maps of {block_k}" + (", normed" if gate.gain is not None else "")
        return pooled(call.source, name, block_k, make, valid=call.valid, unfinished=unfinished)
