"""What every estimator does: say, before attention, how much of it each block of keys will take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.reach import Blocks


@dataclass(frozen=True)
class Products:
    """Scores that are products: of one query to each row, ``query [B, H, D]``, and one key for each block, ``high [B,
    M, N, D]``, times ``scaling``; of query heads that share a list the best. With ``low`` as well the product is the
    most that a key between both, channel by channel, could have. Entries of unfinished blocks may be missing."""

    query: Tensor
    high: Tensor
    scaling: float
    low: Tensor | None = None


class Estimator(ABC):
    """Scores of blocks. What is kept of old keys goes into ``call.source.state`` through `pooled`, never into the
    estimator, which serves all sequences at once."""

    @property
    def label(self) -> str:
        """What it is called where its time was measured."""
        return type(self).__name__

    @abstractmethod
    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        """Float32 ``[B, M, query blocks, key blocks]`` for the call's mask heads: the logarithm of a block's share of
        attention, up to a number for each row. ``inf``: keep the block whatever is chosen. Blocks out of reach may have
        any score."""

    def products(self, call: Call, block_k: int) -> Products | None:
        """What `scores` would multiply for a call with one query to each row; None where scores are more than that. So
        a kernel can score and choose at once."""
        return None

    def observe(self, call: Call, block_k: int) -> None:  # noqa: B027
        """Take note of new keys in a pass that stays dense. By default nothing: what `pooled` misses it makes later, as
        long as it can be made of the keys in the source."""


def query_blocks(x: Tensor, block_q: int) -> tuple[Tensor, Tensor | None]:
    """``x [B, H, Q, D]`` in blocks ``[B, H, N, block_q, D]``, the last one filled with zeros, and which tokens are
    real, bool ``[1, 1, N, block_q, 1]`` (None: all)."""
    count = x.shape[2]
    rows = -(-count // block_q)
    if count % block_q == 0:
        return x.unflatten(2, (rows, block_q)), None
    padded = torch.nn.functional.pad(x, (0, 0, 0, rows * block_q - count))
    real = torch.arange(rows * block_q, device=x.device) < count
    return padded.unflatten(2, (rows, block_q)), real.view(1, 1, rows, block_q, 1)


def of_query_blocks(make: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, block_q: int) -> tuple[Tensor, ...]:
    """What ``make`` finds of blocks of queries ``[B, H, N, n, D]``, each ``[B, H, N, ...]``, for all blocks of ``x [B,
    H, Q, D]``; the last one may be short, and is then a call of its own."""
    whole = x.shape[2] // block_q * block_q
    parts = [make(x[:, :, :whole].unflatten(2, (-1, block_q)))] if whole else []
    if whole < x.shape[2]:
        parts.append(make(x[:, :, None, whole:]))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(both, 2) for both in zip(*parts, strict=True))


def grouped(query: Tensor, heads: int) -> Tensor:
    """``query [B, H, ...]`` with a dimension for the KV heads: ``[B, Hkv, H / Hkv, ...]``."""
    return query.unflatten(1, (heads, -1))
