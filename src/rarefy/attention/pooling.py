"""What estimators keep of blocks of keys: made once when a block is whole, and each time for the one that is not
yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rarefy.attention.source import Source
from rarefy.kernels.triton import usable
from rarefy.kv.store import SideState

# Of tokens `[B, H, N, span, D]`, which of them count `[B or 1, 1, N, span, 1]` (None: all) and where each block begins:
# tensors `[B, H, N, ...]` by name.
Summary = Callable[[Tensor, Tensor | None, range], dict[str, Tensor]]


def pooled(
    source: Source,
    name: str,
    tokens: int,
    make: Summary,
    *,
    span: int | None = None,
    valid: Tensor | None = None,
    unfinished: bool = True,
    read: Callable[[int, int], Tensor] | None = None,
) -> dict[str, Tensor]:
    """``make`` of every block of keys, kept in the state ``name`` of ``source``.

    Block ``i`` begins at token ``i * tokens`` and has ``span`` tokens (None: ``tokens``, without overlap). With
    ``unfinished`` there are entries for blocks that begin but are not whole yet, made of the tokens they have.
    ``valid`` bool ``[B, length]``: tokens that count (None: all). ``read(start, stop)`` gives other tensors than the
    keys, such as keys before rotary embedding; it is asked for tokens that no kept entry covers.
    """
    span = span or tokens
    read = read or source.keys
    state = source.state.setdefault(name, SideState({}, tokens, span))
    done = min((tensor.shape[2] for tensor in state.tensors.values()), default=0)
    whole = state.entries(source.length)
    if whole > done:
        fresh = _blocks(make, read, valid, done, whole, tokens, span, source.length)
        state.tensors = {
            label: torch.cat([state.tensors[label], part], 2) if label in state.tensors else part
            for label, part in fresh.items()
        }
    begun = -(-source.length // tokens)
    if not unfinished or begun <= whole:
        return {label: tensor[:, :, :whole] for label, tensor in state.tensors.items()}
    rest = _blocks(make, read, valid, whole, begun, tokens, span, source.length)
    return {
        label: torch.cat([state.tensors[label], part], 2) if label in state.tensors else part
        for label, part in rest.items()
    }


def _blocks(
    make: Summary,
    read: Callable[[int, int], Tensor],
    valid: Tensor | None,
    low: int,
    high: int,
    tokens: int,
    span: int,
    length: int,
) -> dict[str, Tensor]:
    """``make`` of blocks ``[low, high)``."""
    start, stop = low * tokens, (high - 1) * tokens + span
    x = read(start, min(stop, length))
    missing = stop - start - x.shape[2]
    counts = None
    if missing or valid is not None:
        counts = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device) if valid is None else valid[:, start:stop]
        counts = torch.nn.functional.pad(counts, (0, missing))
        counts = counts.unfold(1, span, tokens)[:, None, :, :, None]
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    x = x.unfold(2, span, tokens).transpose(-1, -2) if span != tokens else x.unflatten(2, (-1, tokens))
    return make(x, counts, range(low * tokens, high * tokens, tokens))


def mean(x: Tensor, counts: Tensor | None) -> Tensor:
    """Mean of the tokens that count, in the dtype of ``x [B, H, N, span, D]``; zero where none does."""
    if counts is None:
        if in_one_read(x):
            from rarefy.kernels.triton.block_means import block_means

            return block_means(x)[0]
        return x.mean(3, dtype=torch.float32).to(x.dtype)
    total = counts.sum(3).clamp(min=1)
    return (x.float().masked_fill(~counts, 0.0).sum(3) / total).to(x.dtype)


def mean_and_similarity(x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """`mean` and `similarity`, with one read of each token where a kernel serves."""
    if counts is None and in_one_read(x):
        from rarefy.kernels.triton.block_means import block_means

        return block_means(x, likeness=True)
    return mean(x, counts), similarity(x, counts)


def in_one_read(x: Tensor) -> bool:
    """Whether a kernel sums up blocks ``x [B, H, N, span, D]``, which may overlap."""
    fits = x.shape[3] * x.shape[4] <= 1 << 15 and x.stride(4) == 1 and 0 < x.shape[2] <= 65535
    return usable(x.device) and fits and x.numel() > 0 and not x.requires_grad


def lowest(x: Tensor, counts: Tensor | None) -> Tensor:
    """Least number of each channel among tokens that count; zero where none does."""
    if counts is None:
        return x.amin(3)
    found = x.masked_fill(~counts, torch.inf).amin(3)
    return torch.where(counts.any(3), found, 0.0).to(x.dtype)


def highest(x: Tensor, counts: Tensor | None) -> Tensor:
    """Greatest number of each channel among tokens that count; zero where none does."""
    if counts is None:
        return x.amax(3)
    found = x.masked_fill(~counts, -torch.inf).amax(3)
    return torch.where(counts.any(3), found, 0.0).to(x.dtype)


def similarity(x: Tensor, counts: Tensor | None) -> Tensor:
    """Mean cosine between all pairs of tokens that count, float32 ``[B, H, N, 1]``; a token of zeros is like no
    other."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    if counts is not None:
        unit = unit.masked_fill(~counts, 0.0)
    total = x.shape[3] if counts is None else counts.sum(3).clamp(min=1)
    return unit.sum(3).square().sum(-1, keepdim=True) / total**2
