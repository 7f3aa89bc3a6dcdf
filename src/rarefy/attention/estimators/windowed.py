"""Queries against means of overlapping windows of keys: nothing is learned, and state is a few rows per block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.attention.call import Call
from rarefy.attention.estimators.base import Estimator
from rarefy.attention.estimators.rows import by_blocks, kernel_serves, looked_at, pieces, seen
from rarefy.attention.pooling import in_one_read, mean, pooled
from rarefy.attention.reach import Blocks, Reach
from rarefy.core.errors import OptionError
from rarefy.kernels.triton import usable


class WindowMeans(Estimator):
    """Each query looks at means of windows of ``size`` keys, ``stride`` apart; what heads that share keys look at is
    added up, and so is what the queries of a block do; a block of keys gets the most of any window that touches it.

    With ``coarse``, the size and stride of longer windows, the softmax's sum is taken from those, so that the fine ones
    are read once instead of twice. ``every``: of each block of queries the last and each so many-th before it are
    looked at. Keys at the end that fill no window have no score: keep ``size`` of them anyway. Raises OptionError where
    ``stride`` does not divide the others, or ``size`` that of longer windows.
    """

    def __init__(self, size: int, stride: int, coarse: tuple[int, int] | None = None, *, every: int = 1):
        if size % stride or (coarse is not None and (coarse[1] % stride or coarse[0] % coarse[1] or coarse[0] % size)):
            raise OptionError(f"Windows of {size} keys, {stride} apart, do not fit together; use whole multiples.")
        self.size, self.stride, self.coarse, self.every = size, stride, coarse, every

    @property
    def label(self) -> str:
        return f"{super().label}, every {self.every}"

    def scores(self, call: Call, blocks: Blocks) -> Tensor:
        if blocks.block_k % self.stride:
            raise OptionError(f"Blocks of {blocks.block_k} keys are no multiple of the stride {self.stride}.")
        windows = self._means(call)
        rough = None if self.coarse is None else (self._longer(windows, *self.coarse), *self.coarse)
        shares = window_shares(
            call.query, windows, call.reach, scaling=call.scaling, block_q=blocks.block_q, size=self.size,
            stride=self.stride, coarse=rough, every=self.every,
        )  # fmt: skip
        if shares.shape[3] and usable(shares.device):
            from rarefy.kernels.triton.window_shares import block_scores

            found = block_scores(shares, blocks.columns, size=self.size, stride=self.stride, block_k=blocks.block_k)
        else:
            found = windows_to_blocks(shares, blocks.columns, blocks.block_k, self.size, self.stride)
            found = found.clamp(min=0).log()
        return found.repeat_interleave(call.mask_heads // found.shape[1], 1)

    def _means(self, call: Call) -> Tensor:
        def make(x: Tensor, counts: Tensor | None, begins: range) -> dict[str, Tensor]:
            return {"mean": mean(x, counts) if counts is not None else _overlapping_means(x, self.stride)}

        kept = pooled(
            call.source, f"windows {self.size} by {self.stride}", self.stride, make, span=self.size, valid=call.valid,
            unfinished=False,
        )  # fmt: skip
        return kept.get("mean", call.query.new_zeros(call.query.shape[0], call.source.heads, 0, call.query.shape[3]))

    def _longer(self, windows: Tensor, size: int, stride: int) -> Tensor:
        """Means of longer windows, of the short ones that fill them side by side."""
        parts, apart = size // self.size, self.size // self.stride
        span = (parts - 1) * apart + 1
        if windows.shape[2] < span:
            return windows[:, :, :0]
        found = windows.unfold(2, span, stride // self.stride)[..., ::apart]
        return found.mean(-1, dtype=torch.float32).to(windows.dtype)


@torch.no_grad()
def window_shares(
    query: Tensor,
    windows: Tensor,
    reach: Reach,
    *,
    scaling: float,
    block_q: int,
    size: int,
    stride: int,
    coarse: tuple[Tensor, int, int] | None = None,
    every: int = 1,
) -> Tensor:
    """How much queries ``[B, H, Q, D]`` look at ``windows [B, Hkv, n, D]``, means of keys ``[stride * i, stride * i +
    size)``: float32 ``[B, Hkv, query blocks, n]``, -inf where no query of a block sees a window whole.

    Each query has a softmax over the windows it sees whole; shares are added up over the heads that share keys and over
    the queries of a block that are looked at: the last one and each ``every``-th before it. ``coarse``: means of longer
    windows, with their size and stride.
    """
    if kernel_serves(query, reach) and windows.shape[2]:
        return _by_kernel(
            query, windows, reach, coarse, scaling=scaling, block_q=block_q, size=size, stride=stride, every=every
        )
    kv_heads, number = windows.shape[1], windows.shape[2]
    every = 1 if reach.uneven else every  # the others would not speak for those that are left out
    keys = windows.float().mT.unsqueeze(2)
    found = []
    for low, high in pieces(query, max(1, number), block_q):
        rows = looked_at(low, high, query.shape[2], block_q, every, query.device)
        part = query[:, :, rows].float().unflatten(1, (kv_heads, -1))
        whole = _whole(reach, rows, number, size, stride)
        scores = torch.matmul(part, keys).mul_(scaling).masked_fill(~whole[:, :, None], -torch.inf)
        total = scores.logsumexp(-1, keepdim=True)
        if coarse is not None and coarse[0].shape[2]:
            means, long, step = coarse
            rough = torch.matmul(part, means.float().mT.unsqueeze(2)).mul_(scaling)
            far = _whole(reach, rows, means.shape[2], long, step)
            rough = rough.masked_fill(~far[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
            # A coarse window stands for as many fine ones as fit into its stride. The first queries see none yet.
            total = torch.where(rough == -torch.inf, total, rough + math.log(step / stride))
        shares = (scores - torch.where(total == -torch.inf, 0.0, total)).exp().sum(2)
        size_q = -(-block_q // every)
        reached = by_blocks(whole.float(), size_q, 0.0).amax(3) > 0
        found.append(torch.where(reached, by_blocks(shares, size_q, 0.0).sum(3), -torch.inf))
    return torch.cat(found, 2)


def _by_kernel(
    query: Tensor, windows: Tensor, reach: Reach, coarse: tuple[Tensor, int, int] | None = None, **given: Any
) -> Tensor:
    """`window_shares` by two kernels, with its other options as they are."""
    from rarefy.kernels.triton import window_shares as kernel

    given |= {"offset": reach.offset, "first": reach.first}
    longer, long, step = (None, 0, 0) if coarse is None or not coarse[0].shape[2] else coarse
    totals = kernel.window_totals(query, windows, longer, coarse_size=long, coarse_stride=step, **given)
    return kernel.window_shares(query, windows, totals, **given)


def _overlapping_means(x: Tensor, stride: int) -> Tensor:
    """Means of windows ``x [B, H, N, size, D]``, ``stride`` apart, in its dtype, with one read of each token."""
    if not x.shape[2] or x.shape[3] == stride or in_one_read(x):
        return mean(x, None)
    last = x[:, :, -1, stride:].unflatten(2, (-1, stride))
    steps = torch.cat([part.mean(3, dtype=torch.float32) for part in (x[:, :, :, :stride], last)], 2)
    return steps.unfold(2, x.shape[3] // stride, 1).mean(-1).to(x.dtype)


def _whole(reach: Reach, rows: Tensor, number: int, size: int, stride: int) -> Tensor:
    """Which windows queries ``rows`` see from end to end, bool ``[B or 1, 1, n, number]``."""
    begin = stride * torch.arange(number, device=rows.device)
    return seen(reach, rows, begin) & seen(reach, rows, begin + size - 1)


def windows_to_blocks(shares: Tensor, blocks: int, block: int, size: int, stride: int) -> Tensor:
    """The largest share of the windows that touch each block: ``[..., n]`` to ``[..., blocks]``, -inf where none does.
    ``stride`` divides ``size`` and ``block``."""
    before, per_block = size // stride - 1, block // stride
    width = per_block + before
    missing = (blocks - 1) * per_block + width - before - shares.shape[-1]
    padded = functional.pad(shares, (before, max(0, missing)), value=-torch.inf)
    return padded.unfold(-1, width, per_block)[..., :blocks, :].amax(-1)
