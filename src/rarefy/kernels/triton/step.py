"""The small operations of a decoding step: what lies between its products with weights, each in one launch.

A launch in a CUDA graph costs about a microsecond, as much as such an operation itself, so what can be one launch is:
a residual sum with the norm after it; head norms, rotary embedding, the cache's new row and attention. All of them read
positions from the GPU's memory, so a captured step can be replayed as the sequences grow. Arithmetic is in float32 and
rounded to the activations' dtype wherever the model rounds.

On GPUs that can (compute capability 9), a launch begins before the one before it has ended and waits for its results in
the kernel ("programmatic dependent launch").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # the fewest rows that a tensor core multiplies
TILE = 64  # tokens of the cache that are read together
LEAST = 4  # tiles that are worth a program of their own
FILL = 264  # programs that keep a large GPU busy
MERGED = 8192  # numbers that one program merges at once
WARPS, STAGES = 4, 2
PLAIN, CENTRED = 1, 2  # what a norm multiplies by: weight, 1 + weight
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next launch begin, and wait for what the one before has written."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _scaled(x, factor, gain, KIND: tl.constexpr):
    """A row times the norm's factor and gain, rounded as in ``interpreter.normalize``."""
    if KIND == 2:
        return (x.to(tl.float32) * factor * (1.0 + gain.to(tl.float32))).to(x.dtype)
    return (gain.to(tl.float32) * (x.to(tl.float32) * factor).to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def _normed(x, gain, width, eps, KIND: tl.constexpr):
    wide = x.to(tl.float32)
    return _scaled(x, tl.rsqrt(tl.sum(wide * wide, 0) / width + eps), gain, KIND)


@triton.jit
def _embed(tokens, table, out, width, scale, SCALED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = channel < width
    x = tl.load(table + tl.load(tokens + row) * width + channel, mask=here)
    if SCALED:
        x = (x.to(tl.float32) * scale).to(x.dtype)
    tl.store(out + row * width + channel, x, mask=here)


@triton.jit
def _add_norm(
    hidden, branch, branch_gain, gain, out, width, eps, branch_eps,
    ADD: tl.constexpr, BRANCH: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    here = channel < width
    weight = tl.load(gain + channel, mask=here, other=0.0)  # which no launch writes
    begin(EARLY)
    x = tl.load(hidden + row + channel, mask=here, other=0.0)
    if ADD:
        y = tl.load(branch + row + channel, mask=here, other=0.0)
        if BRANCH != 0:
            y = _normed(y, tl.load(branch_gain + channel, mask=here, other=0.0), width, branch_eps, BRANCH)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
        tl.store(hidden + row + channel, x, mask=here)
    tl.store(out + row + channel, _normed(x, weight, width, eps, KIND), mask=here)


@triton.jit
def _gate(
    gate, up, out, width, gate_stride, up_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = channel < width
    narrow = tl.load(gate + row * gate_stride + channel, mask=here, other=0.0)
    x = narrow.to(tl.float32)
    if KIND == 0:
        x = x * tl.sigmoid(x)
    elif KIND == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(y)) / 2 = sigmoid(2 y)
    else:
        x = tl.maximum(x, 0.0)
    y = tl.load(up + row * up_stride + channel, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * width + channel, (x.to(narrow.dtype).to(tl.float32) * y).to(narrow.dtype), mask=here)


@triton.jit
def _turned(turn, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Cosines and sines ``[WIDTH]`` of a position, by which channels and their partners are multiplied."""
    HALF: tl.constexpr = CHANNELS // 2
    channel = tl.arange(0, WIDTH)
    here = channel < CHANNELS
    cos = tl.load(turn + channel % HALF, mask=here, other=0.0).to(tl.float32)
    sin = tl.load(turn + HALF + channel % HALF, mask=here, other=0.0).to(tl.float32)
    return cos, tl.where(channel < HALF, -sin, sin)


@triton.jit
def _heads(
    x, real, gain, cos, sin, eps, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Heads ``[rows, WIDTH]`` that begin at the pointers ``x [rows]``, normed and turned by ``cos`` and ``sin
    [WIDTH]``; ``real [rows]``: which of them exist."""
    HALF: tl.constexpr = CHANNELS // 2
    channel = tl.arange(0, WIDTH)
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
    here = channel < CHANNELS
    mask = real[:, None] & here[None, :]
    own = tl.load(x[:, None] + channel[None, :], mask=mask, other=0.0)
    other = tl.load(x[:, None] + partner[None, :], mask=mask, other=0.0)
    if KIND != 0:
        wide = own.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / CHANNELS + eps)[:, None]
        own = _scaled(own, factor, tl.load(gain + channel, mask=here, other=0.0)[None, :], KIND)
        other = _scaled(other, factor, tl.load(gain + partner, mask=here, other=0.0)[None, :], KIND)
    return (own.to(tl.float32) * cos[None, :] + other.to(tl.float32) * sin[None, :]).to(own.dtype)


@triton.jit
def _capped(scores, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores


@triton.jit
def _cached(keys, values, tile, first, position, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Of a tile of tokens of one head: keys ``[WIDTH, N]``, values ``[N, WIDTH]``, and which are from ``first`` on and
    before ``position``."""
    token, channel = tile * N + tl.arange(0, N), tl.arange(0, WIDTH)
    seen, here = (token >= first) & (token < position), channel < CHANNELS
    place = token.to(tl.int64) * CHANNELS
    columns = tl.load(keys + place[None, :] + channel[:, None], mask=seen[None, :] & here[:, None], other=0.0)
    rows = tl.load(values + place[:, None] + channel[None, :], mask=seen[:, None] & here[None, :], other=0.0)
    return columns, rows, seen


@triton.jit
def _tile(
    query, keys, values, seen, top, total, mixed, scale, softcap, CAPPED: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Softmax so far, having seen ``keys [WIDTH, N]`` and ``values [N, WIDTH]`` of some more tokens."""
    scores = tl.dot(query.to(DOT), keys.to(DOT), input_precision="ieee") * scale
    scores = tl.where(seen[None, :], _capped(scores, softcap, CAPPED), float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.exp(scores - safe[:, None])
    fade = tl.exp(top - safe)
    total = total * fade + tl.sum(shares, 1)
    mixed = mixed * fade[:, None] + tl.dot(shares.to(DOT), values.to(DOT), input_precision="ieee")
    return peak, total, mixed


@triton.jit
def _attend(
    q, k, v, keys, values, positions, turns, q_gain, k_gain, out, part, part_lse, arrived,
    q_stride, k_stride, v_stride, sequence_stride, head_stride, heads, q_eps, k_eps, scale, softcap, window,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, MEMBERS: tl.constexpr, Q_KIND: tl.constexpr, K_KIND: tl.constexpr,
    CAPPED: tl.constexpr, WINDOW: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # What this step's launches do not write, positions and the cache of earlier tokens, is fetched before waiting.
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    pair, split = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // heads).to(tl.int64), pair % heads
    position = tl.load(positions + sequence)
    first = tl.maximum(position - window + 1, 0) if WINDOW else 0
    start = first // N
    tiles = tl.cdiv(position, N) - start  # of tokens before this one
    each = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)
    active = tl.maximum(tl.cdiv(tiles, each), 1)
    if split >= active:
        return
    member, channel = tl.arange(0, M), tl.arange(0, WIDTH)
    real, here = member < GROUP, channel < CHANNELS
    cos, sin = _turned(turns + position.to(tl.int64) * CHANNELS, CHANNELS, WIDTH)
    key_base = keys + sequence * sequence_stride + head.to(tl.int64) * head_stride
    value_base = values + sequence * sequence_stride + head.to(tl.int64) * head_stride
    begin_tile, end_tile = start + split * each, start + tl.minimum((split + 1) * each, tiles)
    columns, rows, seen = _cached(key_base, value_base, begin_tile, first, position, CHANNELS, WIDTH, N)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    queries = q + sequence * q_stride + (head * GROUP + member) * CHANNELS
    query = _heads(queries, real, q_gain, cos, sin, q_eps, CHANNELS, WIDTH, Q_KIND)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, WIDTH), tl.float32)
    if split == 0:  # the token's own key and value, which the cache gets too
        one = tl.arange(0, 1)
        key = _heads(
            k + sequence * k_stride + head * CHANNELS + one, one == 0, k_gain, cos, sin, k_eps, CHANNELS, WIDTH, K_KIND
        ).to(keys.dtype.element_ty)
        value = tl.load(v + sequence * v_stride + head * CHANNELS + channel, mask=here, other=0.0)
        value = value.to(values.dtype.element_ty)
        own = position.to(tl.int64) * CHANNELS + channel
        tl.store(key_base + own[None, :], key, mask=here[None, :])
        tl.store(value_base + own, value, mask=here)
        scores = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
        top = _capped(scores, softcap, CAPPED)
        total += 1.0
        mixed += value.to(tl.float32)[None, :]
    top, total, mixed = _tile(query, columns, rows, seen, top, total, mixed, scale, softcap, CAPPED, DOT)
    for tile in range(begin_tile + 1, end_tile):
        more, below, there = _cached(key_base, value_base, tile, first, position, CHANNELS, WIDTH, N)
        top, total, mixed = _tile(query, more, below, there, top, total, mixed, scale, softcap, CAPPED, DOT)
    mixed = mixed / total[:, None]
    target = (pair * GROUP + member).to(tl.int64)
    mask = real[:, None] & here[None, :]
    if active == 1:
        tl.store(out + target[:, None] * CHANNELS + channel[None, :], mixed.to(out.dtype.element_ty), mask=mask)
        return
    place = target * SPLITS + split
    tl.store(part + place[:, None] * WIDTH + channel[None, :], mixed, mask=mask)
    tl.store(part_lse + place, top + tl.log(total), mask=real)
    tl.debug_barrier()  # so that all of the program's numbers are written when it is counted
    if tl.atomic_add(arrived + pair, 1) < active - 1:
        return
    tl.store(arrived + pair, 0)  # the last one merges, and leaves the counter as it was
    tl.debug_barrier()
    which, number = tl.arange(0, MEMBERS), tl.arange(0, SPLITS)
    rows_of = (pair * GROUP + which).to(tl.int64)
    exists = which < GROUP
    counted = exists[:, None] & (number < active)[None, :]
    at = rows_of[:, None] * SPLITS + number[None, :]
    lse = tl.load(part_lse + at, mask=counted, other=float("-inf"), cache_modifier=".cg")
    parts = tl.load(
        part + at[:, :, None] * WIDTH + channel[None, None, :], mask=counted[:, :, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    highest = tl.where(exists, tl.max(lse, 1), 0.0)
    share = tl.exp(lse - highest[:, None])
    merged = tl.sum(parts * share[:, :, None], 1) / tl.where(exists, tl.sum(share, 1), 1.0)[:, None]
    tl.store(
        out + rows_of[:, None] * CHANNELS + channel[None, :], merged.to(out.dtype.element_ty),
        mask=exists[:, None] & here[None, :],
    )  # fmt: skip


@triton.jit
def _place(
    q, k, v, out, keys, values, turns, q_gain, k_gain, start, q_stride, k_stride, v_stride, head_stride, q_eps, k_eps,
    QUERY_HEADS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    Q_KIND: tl.constexpr, K_KIND: tl.constexpr,
):  # fmt: skip
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one, channel = tl.arange(0, 1), tl.arange(0, WIDTH)
    here = channel < CHANNELS
    cos, sin = _turned(turns + (start + row) * CHANNELS, CHANNELS, WIDTH)
    if number < QUERY_HEADS:
        x = q + row * q_stride + number * CHANNELS + one
        x = _heads(x, one == 0, q_gain, cos, sin, q_eps, CHANNELS, WIDTH, Q_KIND)
        target = (row * QUERY_HEADS + number) * CHANNELS + channel
        tl.store(out + target[None, :], x, mask=here[None, :])
        return
    head = number - QUERY_HEADS
    x = k + row * k_stride + head * CHANNELS + one
    x = _heads(x, one == 0, k_gain, cos, sin, k_eps, CHANNELS, WIDTH, K_KIND)
    place = head.to(tl.int64) * head_stride + (start + row) * CHANNELS + channel
    tl.store(keys + place[None, :], x.to(keys.dtype.element_ty), mask=here[None, :])
    value = tl.load(v + row * v_stride + head * CHANNELS + channel, mask=here)
    tl.store(values + place, value.to(values.dtype.element_ty), mask=here)


@cache
def _early(device: torch.device) -> bool:
    """Whether launches on ``device`` may begin before those before them have ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    early = _early(device)
    if early:
        options["launch_pdl"] = True
    kernel[grid](*arguments, EARLY=early, **options)


@dataclass(frozen=True)
class Gain:
    """The weight of an RMS norm ``[width]``, and how it multiplies: ``PLAIN`` or ``CENTRED``."""

    weight: Tensor
    eps: float
    kind: int


def embed(tokens: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Rows ``[M, width]`` of ``table`` for ``tokens`` int64 ``[M]``, times ``scale`` as the table's dtype holds it."""
    width, block = table.shape[1], 1024
    out = table.new_empty(len(tokens), width)
    rounded = float(torch.tensor(scale, dtype=table.dtype))
    launch(
        _embed, (len(tokens), triton.cdiv(width, block)), table.device, tokens, table, out, width, rounded,
        SCALED=scale != 1.0, BLOCK=block,
    )  # fmt: skip
    return out


def add_norm(hidden: Tensor, gain: Gain, branch: Tensor | None = None, branch_gain: Gain | None = None) -> Tensor:
    """The norm of ``hidden [M, width]``, to which ``branch``, normed by its own gain if it has one, is added before."""
    rows, width = hidden.shape
    out = torch.empty_like(hidden)
    own = branch_gain or gain
    launch(
        _add_norm, (rows,), hidden.device, hidden, hidden if branch is None else branch, own.weight, gain.weight, out,
        width, gain.eps, own.eps, ADD=branch is not None, BRANCH=branch_gain.kind if branch_gain else 0,
        KIND=gain.kind, BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu", "gelu_tanh", "relu"]) -> Tensor:
    """``activation(gate) * up`` for ``[M, width]`` whose rows may lie apart."""
    rows, width = gate.shape
    out, block = gate.new_empty(rows, width), 1024
    launch(
        _gate, (rows, triton.cdiv(width, block)), gate.device, gate, up, out, width, gate.stride(0), up.stride(0),
        KIND=ACTIVATIONS[activation], BLOCK=block,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Heads:
    """How one layer attends: ``scale`` of scores, their ``softcap``, a ``window`` of positions, norms of heads, and
    ``turns [positions, 2, channels / 2]``, cosines and sines of every position in the activations' dtype."""

    query_heads: int
    heads: int
    channels: int
    scale: float
    turns: Tensor
    window: int | None = None
    softcap: float | None = None
    q_gain: Gain | None = None
    k_gain: Gain | None = None

    def norms(self) -> tuple[Tensor, Tensor, float, float, int, int]:
        """Weights, epsilons and kinds for q and k; kind 0 is none."""
        found = [gain or Gain(self.turns, 0.0, 0) for gain in (self.q_gain, self.k_gain)]
        q, k = found
        return q.weight, k.weight, q.eps, k.eps, q.kind, k.kind


class Attention:
    """Attention of one new token of each of M sequences over what is cached of it: the workspace, and the launch.

    Layers run after each other, so they share one.
    """

    def __init__(self, sequences: int, query_heads: int, heads: int, channels: int, device: torch.device):
        self.width = max(ROWS, triton.next_power_of_2(channels))
        filling = triton.next_power_of_2(FILL // (sequences * heads) + 1)
        together = MERGED // (triton.next_power_of_2(query_heads // heads) * self.width)
        self.splits = max(1, min(64, filling, together))
        rows = sequences * query_heads
        self.part = torch.empty(rows, self.splits, self.width, dtype=torch.float32, device=device)
        self.part_lse = torch.empty(rows, self.splits, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(sequences * heads, dtype=torch.int32, device=device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, layer: Heads
    ) -> Tensor:
        """``q [M, query_heads * channels]``, ``k`` and ``v [M, heads * channels]`` before norms and rotation, whose
        rows may lie apart; ``keys`` and ``values [M, heads, capacity, channels]`` hold what came before ``positions``
        int32 ``[M]``, and the token's own afterwards. The result is like ``q``."""
        sequences = len(q)
        out = q.new_empty(sequences, layer.query_heads * layer.channels)
        q_weight, k_weight, q_eps, k_eps, q_kind, k_kind = layer.norms()
        group = layer.query_heads // layer.heads
        launch(
            _attend, (sequences * layer.heads, self.splits), q.device, q, k, v, keys, values, positions, layer.turns,
            q_weight, k_weight, out, self.part, self.part_lse, self.arrived, q.stride(0), k.stride(0), v.stride(0),
            keys.stride(0), keys.stride(1), layer.heads, q_eps, k_eps, layer.scale, layer.softcap or 0.0,
            layer.window or 0, GROUP=group, CHANNELS=layer.channels, WIDTH=self.width,
            M=max(ROWS, triton.next_power_of_2(group)), N=TILE, SPLITS=self.splits, LEAST=LEAST,
            MEMBERS=triton.next_power_of_2(group), Q_KIND=q_kind, K_KIND=k_kind, CAPPED=layer.softcap is not None,
            WINDOW=layer.window is not None,
            DOT=_TYPES[q.dtype] if q.is_cuda else tl.float32,  # the interpreter multiplies the bits of bfloat16
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        return out


def place(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, layer: Heads
) -> Tensor:  # fmt: skip
    """Put keys and values of M tokens from position ``start`` on into ``keys`` and ``values [heads, capacity,
    channels]``; the result is ``q``, normed and turned, ``[M, query_heads * channels]``."""
    out = q.new_empty(len(q), layer.query_heads * layer.channels)
    q_weight, k_weight, q_eps, k_eps, q_kind, k_kind = layer.norms()
    _place[(len(q), layer.query_heads + layer.heads)](
        q, k, v, out, keys, values, layer.turns, q_weight, k_weight, start, q.stride(0), k.stride(0), v.stride(0),
        keys.stride(0), q_eps, k_eps, QUERY_HEADS=layer.query_heads, HEADS=layer.heads, CHANNELS=layer.channels,
        WIDTH=triton.next_power_of_2(layer.channels), Q_KIND=q_kind, K_KIND=k_kind, num_warps=1,
    )  # fmt: skip
    return out
