"""The whole segments of a store through the decode kernel, for one new token on a GPU; the rest is the reference's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.formats.scales import SingleScale
from rarefy.kv.codec import Codec, Payload, part_of
from rarefy.kv.codecs import (
    ChannelTable,
    Exact,
    Gridded,
    JoinedHeads,
    LowRank,
    NormTable,
    ProductTable,
    RangeTable,
    Residual,
    Rotated,
    Sparse,
    Trimmed,
)
from rarefy.kv.side import SEGMENT, Run, Side
from rarefy.kv.store import LayerStore

if TYPE_CHECKING:
    from rarefy.kernels.triton.decode_attention import DecodeAttention
    from rarefy.kernels.triton.tiles import Tiles


@dataclass
class Plan:
    """A kernel over the runs whose identities are ``key``; it holds their tensors, so identities are not reused."""

    key: tuple[int, ...]
    attention: DecodeAttention


def available(query: Tensor) -> bool:
    """Whether the kernel runs where ``query`` is."""
    return query.is_cuda and find_spec("triton") is not None


def fused_segments(store: LayerStore, query: Tensor, scaling: float) -> tuple[Tensor, Tensor, int] | None:
    """Attention of ``query [B, Hq, 1, D]`` over whole coded segments without their sinks: float32 ``[B, Hq, 1, D]``,
    its log-sum-exp ``[B, Hq, 1]``, and how many tokens that are. None where a codec has no tile loader or no segment is
    full."""
    assert store.keys is not None and store.values is not None
    if store.keys.tail.shape[3] != store.values.tail.shape[3]:
        return None
    runs = [_whole(side) for side in (store.keys, store.values)]
    count = min(map(len, runs))
    if not count:
        return None
    keys, values = (own[:count] for own in runs)
    key = tuple(id(run.payload) for run in (*keys, *values))
    plan = store.plans.get("decode")
    if plan is None or plan.key != key:
        attention = _build(store, keys, values, query)
        if attention is None:
            return None
        plan = store.plans["decode"] = Plan(key, attention)
    turn, back = store.codecs.keys, store.codecs.values
    one = turn.turn(query.float()) if isinstance(turn, Rotated) else query
    out, lse = plan.attention(one[:, :, 0], scaling)
    out = back.back(out) if isinstance(back, Rotated) else out.clone()
    return out.unsqueeze(2), lse.clone().unsqueeze(2), count * SEGMENT


def _whole(side: Side) -> list[Run]:
    """The runs of a side's full segments, one for each."""
    found: list[Run] = []
    for run in side.runs:
        if run.start != len(found) * SEGMENT or run.stop - run.start != SEGMENT:
            break
        found.append(run)
    return found


def _build(store: LayerStore, keys: list[Run], values: list[Run], query: Tensor) -> DecodeAttention | None:
    from rarefy.kernels.triton.decode_attention import DecodeAttention, Turns, fits

    assert store.keys is not None
    batch, heads, _, channels = store.keys.tail.shape
    sides = ((store.codecs.keys, keys), (store.codecs.values, values))
    tiles = [tiles_of(codec, [run.payload for run in runs], heads) for codec, runs in sides]
    turns = None
    if store.codecs.pre_rope:
        assert store.rotary is not None and store.shift is not None
        turns = Turns(store.rotary.inv_freq.to(query.device), store.rotary.factor, store.shift)
    if tiles[0] is None or tiles[1] is None or not fits(tiles[0], tiles[1], channels, SEGMENT, turns=turns):
        return None
    sinks = None if store.sink is None else store.sink.index.to(query.device)
    return DecodeAttention(
        tiles[0], tiles[1], batch, heads, query.shape[1], channels, SEGMENT, device=query.device, sinks=sinks,
        turns=turns,
    )  # fmt: skip


def tiles_of(codec: Codec, runs: list[Payload], heads: int) -> Tiles | None:
    """What the kernel reads of a codec's runs; None where it has no loader for it."""
    from rarefy.kernels.triton.tiles import Tiles

    def tensors(*names: str) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tuple(run[name].contiguous() for name in names) for run in runs)

    options: dict[str, Any]
    match codec:
        case Rotated() | Trimmed():
            return tiles_of(codec.inner, runs, heads)
        case JoinedHeads():
            found = tiles_of(codec.inner, runs, heads)
            return None if found is None else replace(found, joined=True)
        case Residual():
            return _corrected(codec, runs, heads)
        case Exact():
            return Tiles("dense", tensors("exact"))
        case Gridded(grid=IntegerGrid(zero="float", scales=SingleScale(dtype="float16")) as grid):
            length = codec.tokens if codec.axis == "channel" else codec.channels
            group = min(grid.group_size or length, length)
            if length % group:
                return None
            options = {"num_bits": grid.num_bits, "block": codec.tokens, "group": group}
            return Tiles(codec.axis, tensors("codes", "scale", "zero_point"), **options)
        case NormTable() | RangeTable() | ChannelTable():
            names = {NormTable: ("scale",), RangeTable: ("scale", "offset")}.get(type(codec), ())
            device = runs[0]["codes"].device
            lut = codec.decoded.to(device, torch.float32)
            affine = None
            if isinstance(codec, ChannelTable):
                both = (part.reshape(-1).to(device).contiguous() for part in (codec.center, codec.scale))
                center, spread = both
                affine = center, spread
            return Tiles("table", tensors("codes", *names), codec.num_bits, codec.tokens, 1, lut, affine=affine)
        case ProductTable():
            lut = codec.codebook.to(runs[0]["codes"].device)
            return Tiles("product", tensors("codes"), codec.num_bits, codec.tokens, 1, lut)
    return None


def _corrected(codec: Residual, runs: list[Payload], heads: int) -> Tiles | None:
    """Codes of which an outlier list and a low-rank product tell what they leave over."""
    from rarefy.kernels.triton import tiles as kernel

    def pairs(number: int, *names: str) -> tuple[tuple[Tensor, Tensor], ...]:
        parts = [part_of(run, str(number)) for run in runs]
        return tuple((part[names[0]].contiguous(), part[names[1]].contiguous()) for part in parts)

    base = tiles_of(codec.parts[0], [part_of(run, "0") for run in runs], heads)
    for number, part in enumerate(codec.parts[1:], 1):
        if base is None:
            return None
        if isinstance(part, Sparse) and base.outliers is None:
            base = replace(base, outliers=kernel.Outliers(pairs(number, "values", "indices"), part.axis))
        elif isinstance(part, LowRank) and base.low_rank is None:
            base = replace(base, low_rank=kernel.LowRank(pairs(number, "lowrank_a", "lowrank_b")))
        else:
            return None
    return base
