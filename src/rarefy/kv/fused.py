"""The coded tokens of a store through the decode kernel, for one new token on a GPU; the rest is the reference's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.formats.grids import FloatGrid
from rarefy.kernels import coded
from rarefy.kernels.coded import Tiles, Turns
from rarefy.kv.codec import Codec, Payload, part_of
from rarefy.kv.codecs import (
    ChannelTable,
    Exact,
    Gridded,
    JoinedHeads,
    LowRank,
    NormTable,
    Permuted,
    ProductTable,
    RangeTable,
    Residual,
    Rotated,
    Sparse,
    Trimmed,
)
from rarefy.kv.codecs.plain import is_float8
from rarefy.kv.side import SEGMENT, Run, Side
from rarefy.kv.store import LayerStore

PIECE = 128  # tokens after the last whole segment that the kernel reads at once

if TYPE_CHECKING:
    from rarefy.kernels.triton.decode_attention import DecodeAttention


@dataclass
class Plan:
    """A kernel over the runs whose identities are ``key``; it holds their tensors, so identities are not reused."""

    key: tuple[int, ...]
    attention: DecodeAttention


@dataclass
class BlocksPlan:
    """A kernel over all runs of a store, with their payloads; None: there is none that can read them."""

    key: tuple[int, ...]
    payloads: list[Payload]
    attention: DecodeAttention | None


@dataclass(frozen=True)
class Piece:
    """Tokens of one run that a kernel reads as a run of its own: ``skip`` of its tokens come before them."""

    run: Run
    skip: int = 0


def available(query: Tensor) -> bool:
    """Whether the kernel runs where ``query`` is."""
    return query.is_cuda and find_spec("triton") is not None


def fused_segments(store: LayerStore, query: Tensor, scaling: float) -> tuple[Tensor, Tensor, int] | None:
    """Attention of ``query [B, Hq, 1, D]`` over the first coded tokens without their sinks: float32 ``[B, Hq, 1, D]``,
    its log-sum-exp ``[B, Hq, 1]``, and how many tokens that are: whole segments, and after them whole pieces. None
    where a codec has no tile loader or no piece is full."""
    assert store.keys is not None and store.values is not None
    if store.keys.tail.shape[3] != store.values.tail.shape[3]:
        return None
    sides = store.keys, store.values
    whole = [_pieces(side, 0, SEGMENT) for side in sides]
    begin = min(map(len, whole)) * SEGMENT
    size = max(PIECE, *(side.codec.tokens for side in sides))
    rest = [_pieces(side, begin, size) if begin % size == 0 else [] for side in sides]
    turn, back = store.codecs.keys, store.codecs.values
    one = (turn.turn(query.float()) if isinstance(turn, Rotated) else query)[:, :, 0]
    found, count = [], 0
    for name, pieces, tokens in (("segments", whole, SEGMENT), ("pieces", rest, size)):
        runs = min(map(len, pieces))
        if not runs:
            continue
        attention = _plan(store, name, pieces[0][:runs], pieces[1][:runs], tokens, count, query)
        if attention is None:
            return None
        out, lse = attention(one, scaling)
        found.append((out.clone(), lse.clone()))
        count += runs * tokens
    if not found:
        return None
    out, lse = found[0] if len(found) == 1 else _joined(*found)
    out = back.back(out) if isinstance(back, Rotated) else out
    return out.unsqueeze(2), lse.unsqueeze(2), count


def fused_blocks(
    store: LayerStore, query: Tensor, scaling: float, lists: tuple[Tensor, Tensor], block: int,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor, int] | None:  # fmt: skip
    """`fused_segments` over chosen blocks of ``block`` tokens alone. ``lists``: which ones each KV head reads, int32
    ``[B, Hkv, capacity]``, and how many of those, int32 ``[B, Hkv]``; ``first`` int64 ``[B]``: tokens before it are
    padding. Blocks that do not lie in the tokens that are told are left out. Nothing here waits for the device."""
    attention = blocks_kernel(store, query, block)
    if attention is None:
        return None
    turn, back = store.codecs.keys, store.codecs.values
    one = (turn.turn(query.float()) if isinstance(turn, Rotated) else query)[:, :, 0]
    out, lse = attention(one, scaling, lists, first)
    out = back.back(out) if isinstance(back, Rotated) else out.clone()
    return out.unsqueeze(2), lse.clone().unsqueeze(2), attention.tokens


def blocks_kernel(store: LayerStore, query: Tensor, block: int) -> DecodeAttention | None:
    """The kernel that reads listed blocks of a store's coded tokens, which is kept until those are others; None where a
    codec has no tile loader, or tiles do not fit blocks."""
    assert store.keys is not None and store.values is not None
    sides = store.keys, store.values
    if sides[0].tail.shape[3] != sides[1].tail.shape[3]:
        return None
    runs = [run for side in sides for run in side.runs]
    key = (block, query.shape[1], *(id(run.payload) for run in runs))
    plan = store.plans.get("blocks")
    if plan is None or plan.key != key:
        payloads = [run.payload for run in runs]
        plan = store.plans["blocks"] = BlocksPlan(key, payloads, _build_blocks(store, query, block))
    found: DecodeAttention | None = plan.attention
    return found


def _build_blocks(store: LayerStore, query: Tensor, block: int) -> DecodeAttention | None:
    from rarefy.kernels.triton.decode_attention import page_counts

    assert store.keys is not None and store.values is not None
    sides = store.keys, store.values
    page = max(block, *(side.codec.tokens for side in sides))
    lengths = [run.stop - run.start for run in sides[0].runs], [run.stop - run.start for run in sides[1].runs]
    if page % block or not lengths[0] or not lengths[1] or not sum(page_counts(lengths, page)[0]):
        return None
    both = [tiles_of(side.codec, [run.payload for run in side.runs], side.tail.shape[1]) for side in sides]
    return _kernel(store, query, both, page, block=block, lengths=lengths)


def _joined(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted sums ``[B, Hq, D]`` of different tokens, with their log-sum-exp, as one."""
    lse = torch.logaddexp(left[1], right[1])
    safe = torch.where(lse == -torch.inf, 0.0, lse)
    return sum((out * (own - safe).exp().unsqueeze(-1) for out, own in (left, right)), torch.zeros_like(left[0])), lse


def _pieces(side: Side, start: int, size: int) -> list[Piece]:
    """Pieces of ``size`` tokens from ``start`` on, as many as lie within a run each."""
    found: list[Piece] = []
    for run in side.runs:
        while run.start <= start and start + size <= run.stop:
            found.append(Piece(run, start - run.start))
            start += size
    return found


def _plan(
    store: LayerStore, name: str, keys: list[Piece], values: list[Piece], tokens: int, origin: int, query: Tensor
) -> DecodeAttention | None:
    """The kernel over these pieces, which is kept until they are others."""
    key = tuple(number for piece in (*keys, *values) for number in (id(piece.run.payload), piece.skip))
    plan = store.plans.get(name)
    if plan is None or plan.key != key:
        attention = _build(store, keys, values, tokens, origin, query)
        if attention is None:
            return None
        plan = store.plans[name] = Plan(key, attention)
    return plan.attention


def _build(
    store: LayerStore, keys: list[Piece], values: list[Piece], tokens: int, origin: int, query: Tensor
) -> DecodeAttention | None:
    assert store.keys is not None
    both: list[Tiles | None] = []
    for codec, pieces in ((store.codecs.keys, keys), (store.codecs.values, values)):
        tiles = tiles_of(codec, [piece.run.payload for piece in pieces], store.keys.tail.shape[1])
        spans = tuple((piece.skip, piece.run.stop - piece.run.start) for piece in pieces)
        both.append(None if tiles is None else replace(tiles, spans=spans))
    return _kernel(store, query, both, tokens, origin=origin)


def _kernel(
    store: LayerStore, query: Tensor, sides: list[Tiles | None], tokens: int, **options: Any
) -> DecodeAttention | None:
    """The kernel over ``sides`` in runs or pages of ``tokens``; None where it cannot read them."""
    from rarefy.kernels.triton.decode_attention import DecodeAttention

    assert store.keys is not None
    batch, heads, _, channels = store.keys.tail.shape
    keys, values = sides
    if keys is None or values is None:
        return None
    turns = None
    if store.codecs.pre_rope:
        assert store.rotary is not None and store.shift is not None
        turns = Turns(store.rotary.inv_freq.to(query.device), store.rotary.factor, store.shift)
    sinks = None if store.sink is None else store.sink.index.to(query.device)
    try:
        return DecodeAttention(
            keys, values, batch, heads, query.shape[1], channels, tokens, device=query.device, sinks=sinks,
            turns=turns, **options,
        )  # fmt: skip
    except UnsupportedError:  # sizes that it does not fit
        return None


def tiles_of(codec: Codec, runs: list[Payload], heads: int) -> Tiles | None:
    """What the kernel reads of a codec's runs; None where it has no loader for it."""

    def tensors(*names: str) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tuple(run[name].contiguous() for name in names) for run in runs)

    options: dict[str, Any]
    match codec:
        case Rotated() | Trimmed():
            return tiles_of(codec.inner, runs, heads)
        case Permuted():
            found = tiles_of(codec.inner, runs, heads)
            return None if found is None else replace(found, order=codec.order)
        case JoinedHeads():
            found = tiles_of(codec.inner, runs, heads)
            return None if found is None else replace(found, joined=True)
        case Residual():
            return _corrected(codec, runs, heads)
        case Exact():
            return Tiles("dense", tensors("exact"))
        case Gridded(uniform=(num_bits, group)):
            options = {"num_bits": num_bits, "block": codec.tokens, "group": group}
            return Tiles(codec.axis, tensors("codes", "scale", "zero_point"), **options)
        case Gridded(grid=FloatGrid() as floats, axis="token") if is_float8(floats, codec.channels):
            return Tiles("float8", tensors("codes", "scale"), 8, codec.tokens, 1)
        case NormTable() | RangeTable() | ChannelTable():
            names = {NormTable: ("scale",), RangeTable: ("scale", "offset")}.get(type(codec), ())
            device = runs[0]["codes"].device if runs else codec.decoded.device
            lut = codec.decoded.to(device, torch.float32)
            affine = None
            if isinstance(codec, ChannelTable):
                both = (part.reshape(-1).to(device).contiguous() for part in (codec.center, codec.scale))
                center, spread = both
                affine = center, spread
            return Tiles("table", tensors("codes", *names), codec.num_bits, codec.tokens, 1, lut, affine=affine)
        case ProductTable():
            lut = codec.codebook.to(runs[0]["codes"].device) if runs else codec.codebook
            return Tiles("product", tensors("codes"), codec.num_bits, codec.tokens, 1, lut)
    return None


def _corrected(codec: Residual, runs: list[Payload], heads: int) -> Tiles | None:
    """Codes of which an outlier list and a low-rank product tell what they leave over."""

    def pairs(number: int, *names: str) -> tuple[tuple[Tensor, Tensor], ...]:
        parts = [part_of(run, str(number)) for run in runs]
        return tuple((part[names[0]].contiguous(), part[names[1]].contiguous()) for part in parts)

    base = tiles_of(codec.parts[0], [part_of(run, "0") for run in runs], heads)
    for number, part in enumerate(codec.parts[1:], 1):
        if base is None:
            return None
        if isinstance(part, Sparse) and base.outliers is None:
            base = replace(base, outliers=coded.Outliers(pairs(number, "values", "indices"), part.axis))
        elif isinstance(part, LowRank) and base.low_rank is None:
            base = replace(base, low_rank=coded.LowRank(pairs(number, "lowrank_a", "lowrank_b")))
        else:
            return None
    return base
