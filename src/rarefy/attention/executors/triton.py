"""The portable executor on a GPU: Triton kernels over compressed rows, for prefill and for decoding."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors.base import Executor, executors
from rarefy.attention.executors.coded import attend_coded, unreadable
from rarefy.attention.policy import FEW
from rarefy.attention.source import Source, Stored
from rarefy.kernels.triton import usable
from rarefy.kv.codecs import Exact
from rarefy.kv.side import Side

if TYPE_CHECKING:
    from rarefy.kernels.triton.block_decode import BlockDecode, Paged

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@executors.register("triton")
class Triton(Executor):
    """Blocks of 16 or more tokens, powers of two, any batch, padding, window and packing, lists by query or KV head.
    One query with lists by KV head is split over its list, and reads a store's blocks where they lie, in 16 bits or in
    code."""

    name = "triton"

    def missing(self, device: torch.device) -> str | None:
        return None if usable(device) else "it needs a GPU and Triton"

    def tiles(self, block_q: int, block_k: int) -> bool:
        return block_k >= 16 and block_k.bit_count() == 1 and block_q <= 128

    def refusal(self, query: Tensor, source: Source, block_map: BlockMap, softcap: float | None = None) -> str | None:
        if (reason := self.missing(query.device)) is not None:
            return reason
        if query.requires_grad and torch.is_grad_enabled():
            return "it keeps no gradients"
        reason = unfit(query, block_map, softcap)
        if reason is None and query.shape[2] <= FEW and isinstance(source, Stored) and _coded(source):
            return unreadable(query, source, block_map)
        return reason

    def run(
        self, query: Tensor, source: Source, block_map: BlockMap, scaling: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        from rarefy.kernels.triton.block_attention import block_attention

        reach = block_map.reach
        if query.shape[2] <= FEW and isinstance(source, Stored) and _coded(source):
            return attend_coded(query, source, block_map, scaling)
        if _decodes(query, source, block_map):
            return _decode(query, source, block_map, scaling)
        return block_attention(
            _rows(query), _rows(source.keys()), _rows(source.values()), block_map.start, block_map.whole,
            block_map.count, block_map.columns, block_q=block_map.block_q, block_k=block_map.block_k, scaling=scaling,
            offset=reach.offset, causal=reach.causal, window=reach.window, first=reach.first, stop=reach.stop,
            segment=reach.segment,
        )  # fmt: skip


def _coded(source: Stored) -> bool:
    sides = (source.store.keys, source.store.values)
    return any(side is not None and side.coded and not isinstance(side.codec, Exact) for side in sides)


def unfit(query: Tensor, block_map: BlockMap, softcap: float | None) -> str | None:
    """Why the kernel's sizes or masks do not fit; None where they do."""
    if softcap is not None:
        return "it does not bend scores (softcap)"
    if block_map.level is not None:
        return "it knows no levels"
    if block_map.reach.mask is not None:
        return "the mask is none of padding, causality, a window and packed sequences"
    if not Triton().tiles(block_map.block_q, block_map.block_k):
        return f"blocks of {block_map.block_q} queries by {block_map.block_k} keys do not fit its tiles"
    if query.dtype not in DTYPES or query.shape[3] > 256:
        return f"{query.shape[3]} channels of {query.dtype} do not fit its tiles"
    return None


def _decodes(query: Tensor, source: Source, block_map: BlockMap) -> bool:
    """Whether the kernel for one query serves: it masks the ends of a row, and no window or packing."""
    reach, channels = block_map.reach, query.shape[3]
    plain = reach.window is None and reach.segment is None
    by_group = block_map.count.shape[1] == source.heads
    return query.shape[2] == 1 and plain and by_group and channels >= 16 and channels.bit_count() == 1


def _decode(query: Tensor, source: Source, block_map: BlockMap, scaling: float) -> tuple[Tensor, Tensor]:
    batch, heads, _, channels = query.shape
    first, length = block_map.reach.first, block_map.reach.ends(batch, query.device)
    pages = _pages(source, query.dtype) if isinstance(source, Stored) else None
    run = _workspace(batch, source.heads, heads, channels, block_map.block_k, query.device)
    lists = block_map.newest()
    one = query[:, :, 0]
    if pages is not None:
        out, lse = run.paged(one, *pages, lists.index, lists.count, length, scaling, first)
    else:
        keys, values = _rows(source.keys()), _rows(source.values())
        out, lse = run(one, keys, values, lists.index, lists.count, length, scaling, first)
    return out.unsqueeze(2), lse.unsqueeze(2)


@functools.lru_cache(maxsize=8)
def _workspace(
    batch: int, heads: int, query_heads: int, channels: int, block_k: int, device: torch.device
) -> BlockDecode:
    from rarefy.kernels.triton.block_decode import BlockDecode

    return BlockDecode(batch, heads, query_heads, channels, block_k, device=device)


def _pages(source: Stored, dtype: torch.dtype) -> tuple[Paged, Paged] | None:
    """A store's keys and values where they lie; None where they are in code."""
    from rarefy.kernels.triton.block_decode import Paged

    store = source.store
    assert store.keys is not None and store.values is not None
    sides = (store.keys, store.values)
    exact = all(isinstance(side.codec, Exact) and side.codec.tokens % 64 == 0 for side in sides)
    if not exact or store.codecs.pre_rope or store.sink is not None or store.keys.tail.dtype != dtype:
        return None
    if store.keys.codec.tokens != store.values.codec.tokens:
        return None
    payloads = [run.payload for side in sides for run in side.runs]
    key = tuple(id(payload) for payload in payloads)
    known = store.plans.get("pages")
    if known is None or known[0] != key:
        parts = [payload["exact"] for payload in payloads]
        rows = all(part.stride(-2) == part.shape[-1] and part.stride(-1) == 1 for part in parts)
        # With the payloads, so that their identities are not reused.
        known = store.plans["pages"] = key, [_table(side) for side in sides] if rows else None, payloads
    if known[1] is None:
        return None
    tails = [side.tail for side in sides]
    if any(tail.shape[2] > 1 and tail.stride(-2) != tail.shape[-1] for tail in tails):
        tails = [tail.contiguous() for tail in tails]
    tokens = store.keys.codec.tokens
    return Paged(known[1][0], tails[0], tokens), Paged(known[1][1], tails[1], tokens)


def _table(side: Side) -> Tensor:
    """Addresses of the pages that are put away, and the distances of rows and heads in them, int64 ``[3, pages]``."""
    columns = [torch.empty(3, 0, dtype=torch.int64)]
    for part in (run.payload["exact"] for run in side.runs):
        begins = part.data_ptr() + torch.arange(part.shape[2]) * part.stride(2) * part.element_size()
        columns.append(torch.stack([begins, *(torch.full_like(begins, part.stride(place)) for place in (0, 1))]))
    return torch.cat(columns, 1).to(side.tail.device)


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous channels, which Transformers' views already have."""
    return x if x.stride(-1) == 1 else x.contiguous()
