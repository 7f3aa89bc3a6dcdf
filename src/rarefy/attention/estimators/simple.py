"""Scores that look at nothing, or at everything: the bounds between which an estimator has to be."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rarefy.attention.call import Call, by_mask_head
from rarefy.attention.estimators.base import Estimator, grouped
from rarefy.attention.reach import Blocks
from rarefy.kernels.triton import usable

# Scores of one pass over queries: 256 MB in float32.
SCORES_AT_ONCE = 1 << 26


class Even(Estimator):
    """The same score for every block."""

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        shape = (call.query.shape[0], call.mask_heads, blocks.rows, blocks.columns)
        return torch.zeros(shape, device=call.query.device)


class Nearness(Estimator):
    """A score that falls with the distance of a block."""

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        shape = (call.query.shape[0], call.mask_heads, blocks.rows, blocks.columns)
        return torch.arange(blocks.columns, dtype=torch.float32, device=call.query.device).expand(shape)


class Noise(Estimator):
    """Random scores: a fresh draw for each layer, the same for the same number of keys."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        # Hashes of whole numbers are the same in every process.
        generator = torch.Generator().manual_seed(hash((self.seed, call.layer, call.reach.keys)) % 2**63)
        shape = (call.query.shape[0], call.mask_heads, blocks.rows, blocks.columns)
        return torch.rand(shape, generator=generator).log().to(call.query.device)


class TrueMass(Estimator):
    """What attention really gives to each block, by computing it all: ``mass`` of a block over the queries of the
    other, or the ``max`` of its probabilities. An upper bound for every estimator, and slower than attention itself."""

    def __init__(self, reduce: Literal["mass", "max"] = "mass"):
        self.reduce = reduce

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        found = true_blocks(call, blocks, self.reduce)
        return by_mask_head(found.log(), call, "max" if self.reduce == "max" else "logsumexp")


def true_blocks(call: Call, blocks: Blocks, reduce: Literal["mass", "max"] = "mass") -> Tensor:
    """For each query head, the attention probabilities between two blocks, float32 ``[B, H, query blocks, key
    blocks]``: their sum (``mass``: each query counts 1 over its row) or their ``max``. Memory is bounded; no full map
    is made."""
    if _fits(call, blocks):
        from rarefy.kernels.triton.block_mass import block_mass

        return block_mass(
            call.query, call.source.keys(), block_q=blocks.block_q, block_k=blocks.block_k, scaling=call.scaling,
            offset=call.reach.offset, first=call.reach.first, reduce=reduce,
        )  # fmt: skip
    batch, heads, count, _ = call.query.shape
    keys = call.source.keys().float()
    query = grouped(call.query, call.source.heads)
    at_once = max(1, SCORES_AT_ONCE // (batch * heads * call.reach.keys * blocks.block_q))
    place = torch.arange(call.reach.keys, device=keys.device).expand(1, 1, -1)
    parts = []
    for first in range(0, blocks.rows, at_once):
        low, high = first * blocks.block_q, min(count, (first + at_once) * blocks.block_q)
        logits = torch.matmul(query[:, :, :, low:high].float(), keys[:, :, None].mT) * call.scaling
        logits = logits.flatten(1, 2)
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(~call.reach.between(low, high, place), -torch.inf)
        shares = torch.nan_to_num(logits.softmax(-1))
        missing = blocks.columns * blocks.block_k - shares.shape[3]
        more = -(high - low) % blocks.block_q
        tiles = torch.nn.functional.pad(shares, (0, missing, 0, more))
        tiles = tiles.unflatten(3, (-1, blocks.block_k)).unflatten(2, (-1, blocks.block_q))
        parts.append(tiles.amax((3, 5)) if reduce == "max" else tiles.sum((3, 5)))
    return torch.cat(parts, 2)


def _fits(call: Call, blocks: Blocks) -> bool:
    """Whether the kernel serves: tiles are of its sizes, and only causality and left padding hide keys."""
    plain = call.reach.padded_causal and call.softcap is None and not call.query.requires_grad
    tiles = all(16 <= size <= 128 and size.bit_count() == 1 for size in (blocks.block_q, blocks.block_k))
    return plain and tiles and call.query.shape[3] <= 256 and usable(call.query.device)
