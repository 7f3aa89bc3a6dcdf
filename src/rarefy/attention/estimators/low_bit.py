"""Every query against every key in a few bits, held against what sinks and neighbours already give.

A score alone does not say whether its key matters, since that depends on all others of its row. But the first keys and
the nearest ones hold most of what attention looks at and are few: their exact log-sum-exp is an anchor, and a key
whose score is far below it can be left out without having seen the rest of the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.attention.call import Call, by_mask_head
from rarefy.attention.estimators.base import Estimator
from rarefy.attention.estimators.rows import by_blocks, kernel_serves, looked_at, pieces, seen
from rarefy.attention.reach import Blocks, Reach

TINY = 1e-12
ENOUGH = 4096  # tokens that tell where the middle of all is


class LowBitProducts(Estimator):
    """All products of queries and keys in ``num_bits`` (None: exact); a block of keys gets the largest share that any
    query of a block seems to give to any of its keys, relative to what that query's anchor adds up to. So scores are
    comparable between rows, heads and lengths. See `anchored_scores` for the options."""

    def __init__(
        self, *, num_bits: int | None = 4, sink: int = 32, local: int = 128, smooth: bool = True, every: int = 1
    ):
        self.options: dict[str, Any] = {
            "num_bits": num_bits, "sink": sink, "local": local, "smooth": smooth, "every": every,
        }  # fmt: skip

    @property
    def label(self) -> str:
        return f"{super().label}, every {self.options['every']}"

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        found = anchored_scores(
            call.query, call.source.keys(), call.reach, scaling=call.scaling, block_q=blocks.block_q,
            block_k=blocks.block_k, **self.options,
        )  # fmt: skip
        return by_mask_head(found, call, "max")


def coarse_codes(x: Tensor, num_bits: int, block: int = 1) -> tuple[Tensor, Tensor]:
    """``x [..., n, D]`` as whole numbers of at most ``2 ** (num_bits - 1) - 1`` either way, int8, with a scale for each
    ``block`` vectors in a row, float32 ``[..., n, 1]``."""
    most = 2 ** (num_bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True)
    if block > 1:
        grouped = functional.pad(scale, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))
        scale = grouped.amax(-2, keepdim=True).expand(grouped.shape).flatten(-3, -2)[..., : x.shape[-2], :]
    scale = scale.clamp(min=TINY) / most
    return torch.round(x / scale).to(torch.int8), scale


@torch.no_grad()
def anchored_scores(
    query: Tensor,
    key: Tensor,
    reach: Reach,
    *,
    scaling: float,
    block_q: int,
    block_k: int,
    sink: int,
    local: int,
    num_bits: int | None = 4,
    smooth: bool = True,
    every: int = 1,
) -> Tensor:
    """For each pair of blocks the logarithm of the largest share that a query of one seems to give a key of the other,
    relative to what its anchor alone adds up to: float32 ``[B, H, query blocks, key blocks]``, -inf out of reach.

    The anchor of a query is the first ``sink`` keys and the blocks from ``local`` keys before its own block on.
    ``num_bits`` of queries and keys (None: exact), with a scale for each query and each block of keys. ``smooth``: the
    middle of tokens is taken out before rounding; that of keys adds one number to each row, and what that of queries
    adds is exact. ``every``: of each block of queries the last and each so many-th before it are looked at. ``query [B,
    H, Q, D]``, ``key [B, Hkv, T, D]``.
    """
    asked = _middle(query) if smooth else None
    kept = _middle(key) * float(smooth)
    if num_bits is not None and _fits(query, reach, -(-block_q // every), block_k):
        from rarefy.kernels.triton import anchored_scores as kernel

        return kernel.anchored_scores(
            query, key, asked, kept, most=2 ** (num_bits - 1) - 1, block_q=block_q, block_k=block_k, sink=sink,
            local=local, scaling=scaling, offset=reach.offset, every=every, first=reach.first,
        )  # fmt: skip
    every = 1 if reach.uneven else every  # the others would not speak for those that are left out
    kv_heads, blocks, rest = key.shape[1], -(-reach.keys // block_k), -reach.keys % block_k
    keys = key.float() - kept[:, :, None]
    mean = torch.zeros_like(query[:, :, :1], dtype=torch.float32) if asked is None else asked[:, :, None]
    turned = keys.mT.unsqueeze(2)
    bias = torch.matmul(mean.unflatten(1, (kv_heads, -1)), turned).flatten(1, 2)
    if num_bits is not None:
        codes, scale = coarse_codes(keys, num_bits, block_k)
        turned_codes, scale = codes.float().mT.unsqueeze(2), scale.mT.unsqueeze(2)
    place = torch.arange(reach.keys, device=key.device)
    found = []
    for low, high in pieces(query, reach.keys, block_q):
        rows = looked_at(low, high, query.shape[2], block_q, every, key.device)
        may = seen(reach, rows, place)
        part = query[:, :, rows].float()
        begin = (rows // block_q * block_q + reach.offset - local).clamp(min=0) // block_k * block_k
        near = place[(place < sink) | (place >= begin[0])]
        exact = torch.matmul(part.unflatten(1, (kv_heads, -1)), turned[..., near]).flatten(1, 2).mul_(scaling)
        own = may[..., near] & ((near < sink) | (near >= begin[:, None]))
        anchor = exact.masked_fill_(~own, -torch.inf).logsumexp(-1, keepdim=True)
        moved = (part - mean).unflatten(1, (kv_heads, -1))
        if num_bits is None:
            scores = torch.matmul(moved, turned).flatten(1, 2)
        else:
            left, left_scale = coarse_codes(moved, num_bits)
            scores = torch.matmul(left.float(), turned_codes).mul_(left_scale).mul_(scale).flatten(1, 2)
        scores = scores.add_(bias).mul_(scaling).sub_(anchor).masked_fill_(~may, -torch.inf)
        best = functional.pad(scores, (0, rest), value=-torch.inf).unflatten(-1, (blocks, block_k)).amax(-1)
        found.append(by_blocks(best, -(-block_q // every), -torch.inf).amax(3))
    return torch.cat(found, 2)


def _middle(x: Tensor) -> Tensor:
    """About the mean of tokens ``x [B, H, n, D]``, float32 ``[B, H, D]``, of not much more than `ENOUGH` of them: what
    is taken out is put back exactly, whatever it is."""
    return x[:, :, :: max(1, x.shape[2] // ENOUGH)].mean(2, dtype=torch.float32)


def _fits(query: Tensor, reach: Reach, *sizes: int) -> bool:
    """Whether the kernel serves: tiles of ``sizes`` are of those that it has."""
    return kernel_serves(query, reach) and all(16 <= size <= 128 and size & (size - 1) == 0 for size in sizes)
