"""Attention over selected blocks with a backward pass that reads and writes those blocks only, so that a model can be
trained sparse: gradients reach the keys and values of chosen blocks, and nothing remembers a map of probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.source import Source
from rarefy.core.errors import UnsupportedError

# Numbers of gathered keys of one piece: 32 MB in float32.
GATHERED_AT_ONCE = 1 << 23


@executors.register("trainable")
class Trainable(Executor):
    """What attends while a model is trained; `trainable_attention` behind the interface of executors."""

    name = "trainable"

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        if softcap is not None:
            return "it does not bend scores (softcap)"
        if block_map.reach.mask is not None and block_map.reach.mask.shape[1] > 1:
            return "its mask differs between heads"
        return None if block_map.level is None else "it knows no levels"

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        reason = self.refusal(query, source, block_map, softcap)
        if reason is not None:
            raise UnsupportedError(f"This model cannot be trained with sparse attention, since {reason}.")
        return trainable_attention(query, source.keys(), source.values(), block_map, scaling)


def trainable_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: BlockMap, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``query [B, H, Q, D]`` over the blocks of ``key`` and ``value [B, Hkv, T, D]`` that ``chosen``
    names: the result ``[B, H, Q, D]`` in the query's dtype, and its log-sum-exp, float32 ``[B, H, Q]`` (no gradient).

    Differentiable once. Sums in float32 or the query's dtype, whichever is wider; on a GPU gradients of keys and values
    are added in no fixed order. Levels, and masks that differ between heads, are not served.
    """
    output, total = _Trainable.apply(query, key, value, chosen, scaling)
    return output, total


@dataclass(frozen=True)
class _Piece:
    """Some query blocks with what they read. ``rows``: where their queries lie, int64 ``[blocks, block_q]``, and
    ``real`` which exist; ``flat``: rows of ``[B * Hkv * T, D]`` that are read, int64 ``[B, M, blocks, keys]``;
    ``seen``: which query may see which key, bool ``[B, M, blocks, block_q, keys]``."""

    rows: Tensor
    real: Tensor
    flat: Tensor
    seen: Tensor


def _pieces(chosen: BlockMap, kv_heads: int, channels: int) -> Iterator[_Piece]:
    """The query blocks of a map, as many at a time as fit."""
    lists = chosen.lists()
    batch, maps, blocks, width = lists.shape
    reach, device = chosen.reach, lists.device
    at_once = max(1, GATHERED_AT_ONCE // max(1, batch * maps * width * chosen.block_k * channels))
    row = torch.arange(batch, device=device)[:, None, None, None]
    owner = torch.arange(maps, device=device) // (maps // kv_heads)
    base = ((row * kv_heads) + owner[None, :, None, None]) * reach.keys
    for low in range(0, blocks, at_once):
        part = lists[:, :, low : low + at_once].long()
        part = part[..., : max(1, int((part >= 0).sum(-1).max()))]
        inside = torch.arange(chosen.block_k, device=device)
        keys = part[..., None] * chosen.block_k + inside
        keys = torch.where((part[..., None] >= 0) & (keys < reach.keys), keys, -1).flatten(3)
        first = torch.arange(low, low + part.shape[2], device=device)[:, None] * chosen.block_q
        rows = first + torch.arange(chosen.block_q, device=device)
        real = rows < reach.queries
        rows = rows.clamp(max=reach.queries - 1)
        seen = reach.allowed(row[..., None], rows[:, :, None], keys.clamp(min=0)[:, :, :, None])
        seen = seen & (keys >= 0)[:, :, :, None] & real[:, :, None]
        yield _Piece(rows, real, keys.clamp(min=0) + base, seen)


class _Trainable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, chosen: BlockMap, scaling: float) -> Any:
        wide = torch.promote_types(query.dtype, torch.float32)
        kv_heads = key.shape[1]
        maps = max(chosen.count.shape[1], kv_heads)
        chosen = chosen.per_head(maps)
        flat_key, flat_value = (x.reshape(-1, x.shape[-1]) for x in (key, value))
        asked = query.unflatten(1, (maps, -1))
        output = torch.zeros(*asked.shape[:-1], value.shape[-1], dtype=wide, device=query.device)
        total = torch.full(asked.shape[:-1], -torch.inf, dtype=wide, device=query.device)
        for piece in _pieces(chosen, kv_heads, key.shape[-1]):
            scores = _scores(asked, flat_key, piece, scaling, wide)
            sums = scores.logsumexp(-1, keepdim=True)
            shares = (scores - torch.where(sums == -torch.inf, 0.0, sums)).exp()
            mixed = torch.einsum("bmnrqk,bmnkd->bmrnqd", shares, flat_value[piece.flat].to(wide))
            rows = piece.rows[piece.real]
            output[:, :, :, rows] = mixed[:, :, :, piece.real]
            total[:, :, :, rows] = sums.squeeze(-1).transpose(2, 3)[:, :, :, piece.real]
        output, total = output.flatten(1, 2), total.flatten(1, 2)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.chosen, ctx.scaling, ctx.maps = chosen, scaling, maps
        ctx.mark_non_differentiable(total)
        return output.to(query.dtype), total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor, unused: Any) -> Any:
        query, key, value, output, total = ctx.saved_tensors
        wide, kv_heads, scaling = output.dtype, key.shape[1], ctx.scaling
        flat_key, flat_value = (x.reshape(-1, x.shape[-1]) for x in (key, value))
        asked, given, sums = (x.unflatten(1, (ctx.maps, -1)) for x in (query, given.to(wide), total))
        # What each query's own result takes off the gradient of all its scores.
        common = (given * output.unflatten(1, (ctx.maps, -1))).sum(-1)
        grad_query = torch.zeros(asked.shape, dtype=wide, device=query.device)
        grad_key, grad_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (flat_key, flat_value))
        for piece in _pieces(ctx.chosen, kv_heads, key.shape[-1]):
            scores = _scores(asked, flat_key, piece, scaling, wide)
            mass = sums[:, :, :, piece.rows].transpose(2, 3)[..., None]
            shares = (scores - torch.where(mass == -torch.inf, 0.0, mass)).exp()
            back = given[:, :, :, piece.rows].transpose(2, 3)
            read = flat_value[piece.flat].to(wide)
            slope = torch.einsum("bmnrqd,bmnkd->bmnrqk", back, read)
            slope = shares * (slope - common[:, :, :, piece.rows].transpose(2, 3)[..., None]) * scaling
            index = piece.flat.flatten()
            by_value = torch.einsum("bmnrqk,bmnrqd->bmnkd", shares, back)
            grad_value.index_add_(0, index, by_value.flatten(0, 3))
            by_key = torch.einsum("bmnrqk,bmrnqd->bmnkd", slope, asked[:, :, :, piece.rows].to(wide))
            grad_key.index_add_(0, index, by_key.flatten(0, 3))
            by_query = torch.einsum("bmnrqk,bmnkd->bmrnqd", slope, flat_key[piece.flat].to(wide))
            grad_query[:, :, :, piece.rows[piece.real]] = by_query[:, :, :, piece.real]
        grads = grad_query.flatten(1, 2), grad_key.reshape(key.shape), grad_value.reshape(value.shape)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True)), None, None


def _scores(asked: Tensor, flat_key: Tensor, piece: _Piece, scaling: float, wide: torch.dtype) -> Tensor:
    """``[B, M, blocks, heads of a map, block_q, keys]``, -inf where a query may not look."""
    part = asked[:, :, :, piece.rows].to(wide)
    scores = torch.einsum("bmrnqd,bmnkd->bmnrqk", part, flat_key[piece.flat].to(wide)) * scaling
    return scores.masked_fill(~piece.seen[:, :, :, None], -torch.inf)
