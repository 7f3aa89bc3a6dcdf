"""Scores from a part of the products of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.attention.call import Call, by_mask_head
from rarefy.attention.estimators.base import Estimator, grouped
from rarefy.attention.estimators.simple import SCORES_AT_ONCE
from rarefy.attention.reach import Blocks, Reach
from rarefy.core.errors import UnsupportedError
from rarefy.kernels.triton import usable


class Antidiagonals(Estimator):
    """Of each tile of ``stride`` by ``stride`` tokens the sum along its antidiagonal, which every line and every
    diagonal of attention crosses; softmax over a row of tiles, summed within blocks."""

    def __init__(self, stride: int = 8):
        self.stride = stride

    @property
    def label(self) -> str:
        return f"{super().label} of {self.stride}"

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        stride, heads = self.stride, call.source.heads
        if blocks.block_q % stride or blocks.block_k % stride:
            raise UnsupportedError(
                f"A stride of {stride} does not divide blocks of {blocks.block_q} by {blocks.block_k}; change one."
            )
        query, key = (
            _folded(call.query, blocks.block_q, stride, True),
            _folded(call.source.keys(), blocks.block_k, stride),
        )
        tiles, per_row = key.shape[2], blocks.block_q // stride
        if self._fits(call, blocks):
            return by_mask_head(self.fused(call, blocks, query, key).log(), call)
        place = torch.arange(tiles, device=key.device)
        batch = call.query.shape[0]
        at_once = max(1, SCORES_AT_ONCE // (batch * call.heads * per_row * tiles))
        parts = []
        for first in range(0, blocks.rows, at_once):
            part = query[:, :, first * per_row : (first + at_once) * per_row]
            logits = torch.matmul(grouped(part, heads), key[:, :, None].mT).flatten(1, 2).float()
            logits = logits * (call.scaling / stride)
            begin = (torch.arange(part.shape[2], device=key.device) + first * per_row) * stride + call.reach.offset
            hidden = ~self._seen(call, begin, place)
            shares = torch.nan_to_num(logits.masked_fill(hidden, -torch.inf).softmax(-1))
            shares = shares.unflatten(3, (blocks.columns, -1)).unflatten(2, (-1, per_row)).sum((3, 5))
            parts.append(by_mask_head(shares.log(), call))
        return torch.cat(parts, 2)

    def _fits(self, call: Call, blocks: Blocks) -> bool:
        """Whether the kernel serves: sizes are powers of two, and only causality and left padding hide keys."""
        sizes = (self.stride, blocks.block_q, blocks.block_k, call.query.shape[3])
        powers = all(size.bit_count() == 1 for size in sizes)
        return call.reach.padded_causal and powers and usable(call.query.device)

    def fused(self, call: Call, blocks: Blocks, query: Tensor, key: Tensor) -> Tensor:
        """Shares of blocks, float32 ``[B, H, query blocks, key blocks]``, of folded queries and keys by the kernel."""
        from rarefy.kernels.triton.folded_mass import folded_mass

        stride, reach = self.stride, call.reach
        return folded_mass(
            query, key, stride=stride, per_row=blocks.block_q // stride, per_column=blocks.block_k // stride,
            scaling=call.scaling / stride, offset=reach.offset, count=reach.queries, first=reach.first,
            blocks=(blocks.rows, blocks.columns),
        )  # fmt: skip

    def _seen(self, call: Call, begin: Tensor, tile: Tensor) -> Tensor:
        """Which tiles of keys each tile of queries sees, by their first tokens, bool ``[B or 1, 1, rows, tiles]``."""
        reach, stride = call.reach, self.stride
        row = torch.arange(reach.batch, device=tile.device)[:, None, None, None]
        # Of a tile that begins with padding the last token is asked.
        key = (tile * stride + (stride - 1 if reach.first is not None else 0)).clamp(max=reach.keys - 1)
        query = (begin - reach.offset).clamp(max=reach.queries - 1)[:, None]
        if reach.mask is not None:
            return reach.mask[:, :1, query, key]
        query = torch.minimum(query + (stride - 1), torch.full_like(query, reach.queries - 1))
        seen = reach.allowed(row, query, key) | reach.allowed(row, query, (tile * stride).clamp(max=reach.keys - 1))
        return seen & (tile * stride < reach.keys)


class Lines(Estimator):
    """Columns and diagonals of attention that the last ``probe`` queries show, as blocks that hold any of the best
    ``columns`` keys or of the best ``diagonals`` distances; the first ``sink`` keys and the nearest ``near`` distances
    are among them."""

    def __init__(self, columns: int, diagonals: int, *, probe: int = 64, sink: int = 30, near: int = 100):
        self.columns, self.diagonals, self.probe, self.sink, self.near = columns, diagonals, probe, sink, near

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        reach, count = call.reach, min(self.probe, call.reach.queries)
        query = grouped(call.query[:, :, -count:], call.source.heads)
        logits = torch.matmul(query, call.source.keys()[:, :, None].mT).flatten(1, 2).float() * call.scaling
        place = torch.arange(reach.keys, device=logits.device)
        low = reach.queries - count
        seen = reach.between(low, reach.queries, place.expand(1, 1, -1))
        shares = torch.nan_to_num(logits.masked_fill(~seen, -torch.inf).softmax(-1))
        own = torch.arange(low, reach.queries, device=logits.device) + reach.offset
        distance = (own[:, None] - place).clamp(min=0)
        slash = torch.zeros_like(shares[:, :, 0])
        slash.scatter_add_(2, distance.flatten().expand(*shares.shape[:2], -1), shares.flatten(2))
        upright = shares.sum(2)
        upright[..., : self.sink], slash[..., : self.near] = torch.inf, torch.inf
        upright, slash = by_mask_head(upright, call, "max"), by_mask_head(slash, call, "max")
        column = _best(upright, self.columns)
        room = blocks.columns * blocks.block_k - reach.keys
        hit = torch.nn.functional.pad(column, (0, room)).unflatten(2, (-1, blocks.block_k)).any(3)
        crossed = _crossed(_best(slash, self.diagonals), blocks, reach)
        return torch.where(crossed | hit[:, :, None], torch.inf, -torch.inf)


def _crossed(chosen: Tensor, blocks: Blocks, reach: Reach) -> Tensor:
    """Which pairs of blocks a query and a key share whose distance is ``chosen`` bool ``[B, M, keys]``: bool ``[B, M,
    query blocks, key blocks]``."""
    # How many chosen distances lie below each: a block of queries and one of keys meet at a range of them.
    below = torch.nn.functional.pad(chosen.cumsum(2), (1, 0))
    q0 = torch.arange(blocks.rows, device=chosen.device)[:, None] * blocks.block_q + reach.offset
    k0 = torch.arange(blocks.columns, device=chosen.device) * blocks.block_k
    least = (q0 - k0 - blocks.block_k + 1).clamp(0, reach.keys)
    most = (q0 + blocks.block_q - k0).clamp(0, reach.keys)
    return below[:, :, most] > below[:, :, least]


def _best(x: Tensor, count: int) -> Tensor:
    """Where the ``count`` greatest numbers of a row are, bool."""
    chosen = x.topk(min(count, x.shape[-1]), -1).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, chosen, True)


def _folded(x: Tensor, block: int, stride: int, turned: bool = False) -> Tensor:
    """``x [B, H, n, D]``, filled with zeros to whole blocks, with ``stride`` tokens in one row, last first if
    ``turned``: ``[B, H, n / stride, stride * D]``."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, stride))
    return (x.flip(3) if turned else x).flatten(3, 4)
