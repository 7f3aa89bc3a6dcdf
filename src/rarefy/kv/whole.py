"""Attention of one new token over a whole store by one launch on a GPU: codes, the newest tokens and sinks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.kernels import cuda
from rarefy.kernels.coded import Turns
from rarefy.kv.codecs import Rotated
from rarefy.kv.fused import tiles_of
from rarefy.kv.side import Side
from rarefy.kv.store import LayerStore

if TYPE_CHECKING:
    from rarefy.kernels.cuda.attend import CodedAttention

PLAN, SAME_TABLE = "whole", "same table"


@dataclass
class Plan:
    """A kernel over runs and sinks whose identities are ``key``; it holds them, so that identities are not reused."""

    key: tuple[int, ...]
    held: tuple[Any, ...]
    attention: CodedAttention


def available(query: Tensor) -> bool:
    """Whether the kernel runs where ``query`` is."""
    return query.is_cuda and cuda.status() == "cuda"


def attended(store: LayerStore, query: Tensor, scaling: float) -> Tensor | None:
    """Attention of ``query [B, Hq, 1, D]`` over all tokens of ``store``, ``[B, Hq, 1, D]`` in the query's dtype; None
    where the kernel cannot read them."""
    from rarefy.kernels.cuda.attend import TYPES, Exact

    assert store.keys is not None and store.values is not None
    keys, values, sink = store.keys, store.values, store.sink
    if keys.tail.dtype not in TYPES or query.dtype not in TYPES:
        return None
    if values.tail.dtype != keys.tail.dtype:
        return None
    attention = _plan(store, keys, values, query)
    if attention is None:
        return None
    sinks = (None, None) if sink is None else (sink.keys.contiguous(), sink.values.contiguous())
    exact = Exact(keys.tail.contiguous(), values.tail.contiguous(), *sinks)
    return attention(query[:, :, 0].contiguous(), scaling, exact)[0].unsqueeze(2)


def _plan(store: LayerStore, keys: Side, values: Side, query: Tensor) -> CodedAttention | None:
    """The kernel over the store's runs, which is kept until they are others."""
    index = None if store.sink is None else store.sink.index
    held = (*(run.payload for side in (keys, values) for run in side.runs), index)
    key = (query.shape[1], *map(id, held))
    plan = store.plans.get(PLAN)
    if plan is None or plan.key != key:
        attention = _build(store, keys, values, query)
        if attention is None:
            return None
        plan = store.plans[PLAN] = Plan(key, held, attention)
    return plan.attention


def _build(store: LayerStore, keys: Side, values: Side, query: Tensor) -> CodedAttention | None:
    from rarefy.kernels.cuda.attend import PIECE, CodedAttention, fits

    batch, heads, _, channels = keys.tail.shape
    sides = keys, values
    found = [tiles_of(side.codec, [run.payload for run in side.runs], heads) for side in sides]
    k_tiles, v_tiles = found
    if k_tiles is None or v_tiles is None or values.tail.shape[3] != channels:
        return None
    if not fits(k_tiles, v_tiles, channels, query.shape[1] // heads) or any(
        side.codec.tokens % PIECE for side in sides
    ):
        return None
    if k_tiles.kind == v_tiles.kind == "table" and k_tiles.lut is not None and v_tiles.lut is not None:
        if SAME_TABLE not in store.plans:  # to compare makes a GPU wait
            store.plans[SAME_TABLE] = torch.equal(k_tiles.lut.to(query.device), v_tiles.lut.to(query.device))
        v_tiles = replace(v_tiles, lut=k_tiles.lut) if store.plans[SAME_TABLE] else v_tiles
    if k_tiles.affine is not None:
        center, spread = (part.to(query.device) for part in k_tiles.affine)
        k_tiles = replace(k_tiles, affine=(center, spread))
    tokens = [[run.stop - run.start for run in side.runs] for side in sides]
    sinks = None if store.sink is None else store.sink.index.to(query.device)
    turns = None
    if store.codecs.pre_rope:
        assert store.rotary is not None and store.shift is not None
        if 2 * len(store.rotary.inv_freq) != channels or k_tiles.affine is None:
            return None  # the kernel turns whole heads of keys that have centers
        turns = Turns(store.rotary.inv_freq.to(query.device), store.rotary.factor, store.shift)
    signs = [side.codec.beside("signs", query) if isinstance(side.codec, Rotated) else None for side in sides]
    try:
        return CodedAttention(
            k_tiles, v_tiles, (tokens[0], tokens[1]), batch, heads, query.shape[1], device=query.device, sinks=sinks,
            signs=(signs[0], signs[1]), turns=turns,
        )  # fmt: skip
    except UnsupportedError:  # sizes that the kernel does not fit
        return None
