"""Attention over a coded store, segment by segment: the reference that every faster executor is held to.

Of the past at most one segment's codes are decoded at any time. Each segment gives its own weighted sum of values, and
sums meet by their log-sum-exp, in float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rarefy.kv import native, whole
from rarefy.kv.codec import Codec, Payload, cut
from rarefy.kv.codecs import Exact
from rarefy.kv.fused import available, fused_segments
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.side import SEGMENT, Side
from rarefy.kv.store import LayerStore

# Scores of one pass over queries: 64 MB in float32.
SCORES_AT_ONCE = 1 << 24


def attend(
    store: LayerStore,
    query: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    fused: bool | None = None,
) -> Tensor:
    """Attention of ``query [B, Hq, Q, D]`` over all tokens of ``store``; result ``[B, Hq, Q, D]`` in the query's dtype.

    ``mask``: bool (true where a query may look) or additive float, ``[B or 1, Hq or 1, Q, tokens]``. Without one, the
    queries are the last tokens of the store, and each sees itself and all before it (all tokens if not ``causal``).
    A query that may look nowhere gives zero. ``softcap`` bends scores to ``softcap * tanh(score / softcap)``.
    ``fused``: what is in code goes through a decode kernel where one can serve it (None: the one of the query's device,
    if it is there).
    """
    assert store.keys is not None
    if query.shape[2] == 1 and mask is None and softcap is None and fused is not False:
        done = None
        if whole.available(query) and (found := whole.attended(store, query, scaling)) is not None:
            return found
        if fused or available(query):
            done = fused_segments(store, query, scaling)
        elif native.usable(query):
            done = native.attended(store, query, scaling)
        if done is not None:
            return _attend(store, query, scaling, None, None, store.length - 1, done)
    per_query = query.shape[0] * query.shape[1] * min(SEGMENT, store.length)
    at_once = max(1, SCORES_AT_ONCE // per_query)
    parts = []
    for low in range(0, query.shape[2], at_once):
        part = query[:, :, low : low + at_once]
        rows = None if mask is None else mask[:, :, low : low + at_once]
        last = store.length - query.shape[2] + low if causal else store.length
        parts.append(_attend(store, part, scaling, rows, softcap, last))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend(
    store: LayerStore,
    query: Tensor,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
    first: int,
    done: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """``first``: the last token that the first query may see. ``done``: sums of values ``[B, Hq, Q, D]`` over so many
    first tokens without sinks, with their log-sum-exp."""
    assert store.keys is not None and store.values is not None
    batch, query_heads, count, _ = query.shape
    heads = store.keys.tail.shape[1]
    rows = query_heads // heads * count
    packed = query.reshape(batch, heads, rows, -1)
    output = torch.zeros(batch, heads, rows, store.values.tail.shape[-1], device=query.device)
    top = torch.full((batch, heads, rows, 1), -torch.inf, device=query.device)
    total = torch.zeros_like(top)
    begin = 0
    if done is not None:
        output, top = done[0].reshape(output.shape), done[1].reshape(top.shape)
        total, begin = torch.where(top == -torch.inf, 0.0, 1.0), done[2]
        output, top, total = _with_sinks(store, packed, scaling, begin, output, top, total)
    while begin < store.length:
        start, stop = begin, min((begin // SEGMENT + 1) * SEGMENT, store.length)
        begin = stop
        scores = _scores(store, store.keys, packed, start, stop) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.reshape(batch, query_heads, count, -1)
        if mask is not None:
            own = mask[..., start:stop]
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
        elif first + 1 < stop:
            place = torch.arange(start, stop, device=query.device)
            limit = torch.arange(first, first + count, device=query.device)[:, None]
            scores = scores.masked_fill(place > limit, -torch.inf)
        scores = scores.reshape(batch, heads, rows, -1)
        peak = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe = torch.where(peak == -torch.inf, 0.0, peak)
        shares = (scores - safe).exp()
        fade = (top - safe).exp()
        output = output * fade + _mixed(store, store.values, shares, start, stop)
        total = total * fade + shares.sum(-1, keepdim=True)
        top = peak
    output = output / torch.where(total == 0, 1.0, total)
    return output.reshape(batch, query_heads, count, -1).to(query.dtype)


def _with_sinks(
    store: LayerStore, query: Tensor, scaling: float, stop: int, output: Tensor, top: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums after sinks before token ``stop`` have joined them."""
    if store.sink is None:
        return output, top, total
    absent = (store.sink.index < 0) | (store.sink.index >= stop)
    scores = _product(query, store.sink.keys.transpose(-1, -2)) * scaling
    scores = scores.masked_fill(absent[:, None, None].to(scores.device), -torch.inf)
    peak = torch.maximum(top, scores.amax(-1, keepdim=True))
    safe = torch.where(peak == -torch.inf, 0.0, peak)
    shares, fade = (scores - safe).exp(), (top - safe).exp()
    output = output * fade + _product(shares, store.sink.values)
    return output, peak, total * fade + shares.sum(-1, keepdim=True)


def _scores(store: LayerStore, side: Side, query: Tensor, start: int, stop: int) -> Tensor:
    """``query [B, H, R, D]`` times keys ``[start, stop)``, float32."""
    found = []
    for low, high, piece in side.pieces(start, stop):
        if isinstance(piece, Tensor):
            found.append(_product(query, piece.transpose(-1, -2)))
        elif store.codecs.pre_rope:
            assert store.rotary is not None
            keys = side.codec.decode(piece).flatten(2, 3)
            keys = store.rotary.rotate(keys, store.positions(low, high))
            found.append(torch.matmul(query.float(), keys.transpose(-1, -2)))
        else:
            found.append(side.codec.score(query, piece))
    scores = found[0] if len(found) == 1 else torch.cat(found, -1)
    return _overlay_scores(store, query, scores, start, min(stop, side.coded))


def _overlay_scores(store: LayerStore, query: Tensor, scores: Tensor, start: int, stop: int) -> Tensor:
    """Exact scores of sinks in the place of coded ones."""
    here = _sinks_in(store, start, stop)
    if here is None or store.sink is None:
        return scores
    row, sink, place = here
    exact = _product(query, store.sink.keys.transpose(-1, -2))
    scores = scores.clone()
    scores[row, :, :, place] = exact[row, :, :, sink]
    return scores


def _mixed(store: LayerStore, side: Side, shares: Tensor, start: int, stop: int) -> Tensor:
    """``shares [B, H, R, stop - start]`` times values ``[start, stop)``, float32."""
    here = _sinks_in(store, start, min(stop, side.coded))
    exact: Tensor | None = None
    if here is not None and store.sink is not None:
        row, sink, place = here
        weights = shares.new_zeros(*shares.shape[:-1], store.sink.index.shape[1])
        weights[row, :, :, sink] = shares[row, :, :, place]
        shares = shares.clone()
        shares[row, :, :, place] = 0.0
        exact = torch.matmul(weights, store.sink.values.float())
    mixed: Tensor | None = exact
    for low, high, piece in side.pieces(start, stop):
        own = shares[..., low - start : high - start]
        part = _product(own, piece) if isinstance(piece, Tensor) else side.codec.mix(own, piece)
        mixed = part if mixed is None else mixed + part
    assert mixed is not None
    return mixed


def _sinks_in(store: LayerStore, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Row, sink and place within the segment of every sink among tokens ``[start, stop)``; None where there is none."""
    if store.sink is None or stop <= start:
        return None
    row, sink = ((store.sink.index >= start) & (store.sink.index < stop)).nonzero(as_tuple=True)
    return (row, sink, store.sink.index[row, sink] - start) if len(row) else None


def _product(left: Tensor, right: Tensor) -> Tensor:
    return torch.matmul(left.float(), right.float())


def plain_store(key: Tensor, value: Tensor) -> LayerStore:
    """A store of ``key`` and ``value [B, H, tokens, D]`` as they are, so that `attend` reads them."""
    exact = Exact(key.dtype)
    sides = [Side(exact, 0, tensor) for tensor in (key, value)]
    return LayerStore(LayerCodecs(exact, exact), keys=sides[0], values=sides[1])


def decoded(store: LayerStore) -> tuple[Tensor, Tensor]:
    """All keys (as attention reads them) and values, float32 ``[B, H, tokens, D]``: for tests and for attention that
    needs tensors. This is the copy that `attend` never makes."""
    return read(store, "keys", 0, store.length, torch.float32), read(store, "values", 0, store.length, torch.float32)


def read(
    store: LayerStore, label: Literal["keys", "values"], start: int, stop: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Keys (as attention reads them) or values ``[start, stop)`` as a tensor ``[B, H, n, D]``, by default in the dtype
    in which they came. What is in code is decoded, block by block."""
    assert store.keys is not None and store.values is not None
    side = store.keys if label == "keys" else store.values
    dtype = side.tail.dtype if dtype is None else dtype
    parts = []
    for run in side.runs:
        if run.start < stop and run.stop > start:
            size = side.codec.tokens
            low, high = max(start - run.start, 0) // size, -(-(min(stop, run.stop) - run.start) // size)
            payload = cut(run.payload, low, high)
            first = run.start + low * size
            found = _decoded(store, label, side.codec, payload, first, run.start + high * size, dtype)
            parts.append(found[:, :, max(start - first, 0) : stop - first])
    low, high = max(start, side.coded), min(stop, side.length)
    if low < high or not parts:
        parts.append(side.tail[:, :, low - side.coded : max(high - side.coded, 0)].to(dtype))
    tokens = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    here = _sinks_in(store, start, min(stop, side.coded))
    if here is not None and store.sink is not None:
        row, sink, place = here
        exact = store.sink.keys if label == "keys" else store.sink.values
        tokens = tokens.clone() if len(parts) == 1 else tokens
        tokens[row, :, place] = exact[row, :, sink].to(dtype)
    return tokens


def _decoded(
    store: LayerStore, label: str, codec: Codec, payload: Payload, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    if isinstance(codec, Exact):
        values = payload["exact"].flatten(2, 3)
    else:
        values = codec.decode(payload).flatten(2, 3)
    if label == "keys" and store.codecs.pre_rope:
        assert store.rotary is not None
        values = store.rotary.rotate(values, store.positions(start, stop))
    return values.to(dtype)
