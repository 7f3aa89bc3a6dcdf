"""Learned gates as an estimator: one for blocks of queries in prefill, one for single queries in decoding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.attention.call import Call, by_mask_head
from rarefy.attention.estimators.base import Estimator, query_blocks
from rarefy.attention.gate import BlockGate
from rarefy.attention.policy import Phase
from rarefy.attention.pooling import mean, pooled
from rarefy.attention.reach import Blocks
from rarefy.core.errors import OptionError


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
        query = call.query_before_rope()
        if blocks.block_q > 1:
            query = mean(*query_blocks(query, blocks.block_q))
        places = call.reach.offset + blocks.block_q * torch.arange(query.shape[2], device=query.device)
        asked = gate.ask(query, places, call.rotary)
        return by_mask_head(gate.score(asked, self._compressed(call, gate, blocks.block_k)), call)

    def observe(self, call: Call, block_k: int) -> None:
        if "decode" in self.gates:  # the one whose state is worth its bytes: later steps read it again and again
            self._compressed(call, self.gates["decode"], block_k)

    def _compressed(self, call: Call, gate: BlockGate, block_k: int) -> Tensor:
        def make(x: Tensor, counts: Tensor | None, begins: Tensor) -> dict[str, Tensor]:
            return {"key": gate.compress(gate.summarize(x, counts), begins, call.rotary).to(call.query.dtype)}

        name = "decode gate" if gate is self.gates.get("decode") else "prefill gate"
        return pooled(call.source, name, block_k, make, valid=call.valid, read=call.keys_before_rope)["key"]
