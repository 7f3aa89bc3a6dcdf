"""One query over chosen blocks of a store in code: the coded ones by the decode kernel, the newest tokens and sinks as
they are."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.attention.block_map import BlockMap, PaddedMap
from rarefy.attention.source import Stored
from rarefy.kv.fused import blocks_kernel, fused_blocks
from rarefy.kv.store import LayerStore


def unreadable(query: Tensor, source: Stored, block_map: BlockMap) -> str | None:
    """Why the decode kernel cannot read what is in code here, as part of a sentence; None where it can."""
    reach = block_map.reach
    plain = reach.window is None and reach.segment is None and reach.mask is None and reach.stop is None
    if query.shape[2] != 1 or not plain or block_map.count.shape[1] != source.heads:
        return "the past is in code, of which it reads blocks by KV head for one query without a window or packing"
    if blocks_kernel(source.store, query, block_map.block_k) is None:
        return f"the past is in a code whose blocks of {block_map.block_k} its kernel does not read"
    return None


def attend_coded(query: Tensor, source: Stored, block_map: BlockMap, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of ``query [B, H, 1, D]`` over the blocks of a map with one list for each KV head, which `unreadable`
    has nothing against: the result in its dtype and its log-sum-exp float32 ``[B, H, 1]``. Of what is in code nothing
    is decoded but tokens after the last whole page."""
    store, size, first = source.store, block_map.block_k, block_map.reach.first
    lists = block_map.newest()
    done = fused_blocks(store, query, scaling, (lists.index, lists.count), size, first)
    assert done is not None
    output, lse, coded = done
    place = torch.arange(coded, source.length, device=query.device).expand(query.shape[0], -1)
    keys, values = source.keys(coded), source.values(coded)
    if store.sink is not None:
        # The kernel leaves sinks out, whose place among its tokens is a negative number here.
        index = _sinks_on(store, query.device)
        place = torch.cat([torch.where((index >= 0) & (index < coded), index, -1), place], 1)
        keys, values = (
            torch.cat([own.to(rest.dtype), rest], 2)
            for own, rest in ((store.sink.keys, keys), (store.sink.values, values))
        )
    seen = place >= (0 if first is None else first[:, None])
    seen = seen & (place >= 0)
    if block_map.reach.causal:
        seen = seen & (place <= block_map.reach.offset)
    kept = _kept(lists, block_map.key_blocks)
    own = kept.gather(2, (place.clamp(min=0) // size)[:, None].expand(-1, source.heads, -1)) & seen[:, None]
    asked = query.float().unflatten(1, (source.heads, -1)).flatten(2, 3)
    scores = (asked @ keys.float().mT * scaling).masked_fill(~own[:, :, None], -torch.inf)
    sums = scores.logsumexp(-1)
    shares = (scores - torch.where(sums == -torch.inf, 0.0, sums)[..., None]).exp()
    rest, sums = (shares @ values.float()).reshape(output.shape), sums.reshape(lse.shape)
    total = torch.logaddexp(lse, sums)
    safe = torch.where(total == -torch.inf, 0.0, total)
    output = output * (lse - safe).exp()[..., None] + rest * (sums - safe).exp()[..., None]
    return output.to(query.dtype), total


def _sinks_on(store: LayerStore, device: torch.device) -> Tensor:
    """Where the sinks of a store are, int64 ``[B, S]``, on ``device``; copied once, which a CUDA graph could not do."""
    assert store.sink is not None
    known = store.plans.get("sinks")
    if known is None or known[0] is not store.sink.index:
        known = store.plans["sinks"] = (store.sink.index, store.sink.index.to(device))
    return known[1]


def _kept(lists: PaddedMap, blocks: int) -> Tensor:
    """Which blocks the lists name, bool ``[B, Hkv, blocks]``."""
    real = torch.arange(lists.index.shape[2], device=lists.index.device) < lists.count[..., None]
    kept = torch.zeros(*lists.count.shape, blocks + 1, dtype=torch.bool, device=real.device)
    return kept.scatter_(2, torch.where(real, lists.index.long(), blocks), True)[..., :-1]
