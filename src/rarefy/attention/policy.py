"""Where a plan applies and what it always keeps, whatever its scores say."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rarefy.attention.reach import Blocks, Reach
from rarefy.core.config import StrictModel

Phase = Literal["prefill", "decode"]
FEW = 16  # queries of a pass that decodes; more of them read most blocks


def phase_of(queries: int) -> Phase:
    """What a pass of so many queries to each row is."""
    return "decode" if queries <= FEW else "prefill"


class Policy(StrictModel):
    """``dense_below``: keys up to which attention stays dense. ``dense_layers``: layers that do (negative: from the
    last). ``dense_heads``: pairs of layer and query head whose blocks are all kept. ``sink``: first blocks that a query
    may see, ``local``: blocks up to its own, which are always kept. ``last_rows``: last query blocks of a prefill that
    keep all. ``max_density``: above it attention stays dense (None: where that was measured to be faster). ``phases``:
    passes of many tokens, of few, or both.
    """

    dense_below: int = Field(4096, ge=0)
    dense_layers: tuple[int, ...] = ()
    dense_heads: tuple[tuple[int, int], ...] = ()
    sink: int = Field(1, ge=0)
    local: int = Field(1, ge=1)
    last_rows: int = Field(0, ge=0)
    max_density: float | None = Field(None, ge=0, le=1)
    phases: Literal["both", "prefill", "decode"] = "both"

    def dense(self, phase: Phase, keys: int, layer: int, layers: int) -> str | None:
        """Why a pass over ``keys`` keys stays dense, known without looking at it; None where it does not."""
        if self.phases not in ("both", phase):
            return f"not in {phase}"
        if layer in (index % layers for index in self.dense_layers if -layers <= index < layers):
            return "dense layer"
        return f"below {self.dense_below} keys" if keys < self.dense_below else None

    def forced(self, reach: Reach, blocks: Blocks, layer: int, mask_heads: int, heads: int) -> Tensor:
        """Blocks that are kept in any case, bool ``[B or 1, 1 or M, query blocks, key blocks]``, all in reach."""
        own = tuple(head * mask_heads // heads for index, head in self.dense_heads if index == layer)
        key = ("forced", self.sink, self.local, self.last_rows, own, mask_heads, blocks.block_q, blocks.block_k)
        return reach.once(key, lambda: self._forced(reach, blocks, mask_heads, own))

    def _forced(self, reach: Reach, blocks: Blocks, mask_heads: int, own: tuple[int, ...]) -> Tensor:
        some = blocks.some
        column = torch.arange(blocks.columns, device=some.device)
        begin = torch.arange(blocks.rows, device=some.device)[:, None] * blocks.block_q + reach.offset
        # In a window the first key that is seen moves along and is no sink.
        first = some.to(torch.uint8).argmax(-1, keepdim=True) if reach.window is None else 0
        forced = column < first + self.sink
        if reach.causal:
            forced = forced | (column > begin // blocks.block_k - self.local)
        if self.last_rows and phase_of(reach.queries) == "prefill":
            forced = forced | (torch.arange(blocks.rows, device=some.device)[:, None] >= blocks.rows - self.last_rows)
        if own:
            whole = torch.zeros(mask_heads, dtype=torch.bool, device=some.device)
            whole[list(own)] = True
            forced = forced | whole[:, None, None]
        return forced & some
