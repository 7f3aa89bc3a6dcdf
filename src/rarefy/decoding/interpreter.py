"""The oracle: a program executed operation by operation with Torch, in the dtype of the model's activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.decoding.cache import KeyValues
from rarefy.decoding.program import Activation, Add, Attend, Cap, Embed, Gate, Norm, Operation, Program, Project, Rotate

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@torch.inference_mode()
def run(program: Program, tokens: Tensor, cache: KeyValues, *, every: bool = False) -> Tensor:
    """Logits of the last token ``[1, vocabulary]``, or of ``every`` one ``[M, vocabulary]``, of ``tokens`` [M].

    ``tokens`` (int64) follow those in ``cache``, which then holds them too. Raises OptionError when they do not fit.
    """
    start = cache.length
    cache.reserve(start + len(tokens))
    buffers: dict[str, Tensor] = {"tokens": tokens}
    for operation in program.step:
        _execute(operation, program, buffers, cache, start)
    cache.length = start + len(tokens)
    if not every:
        buffers = {name: buffer[-1:] for name, buffer in buffers.items()}
    for operation in program.head:
        _execute(operation, program, buffers, cache, start)
    return buffers["logits"]


def _execute(operation: Operation, program: Program, at: dict[str, Tensor], cache: KeyValues, start: int) -> None:
    match operation:
        case Embed(out, table, scale):
            rows = F.embedding(at["tokens"], table.weight)
            at[out] = rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype)
        case Norm():
            at[operation.out] = normalize(operation, at[operation.x])
        case Project(x, out, linear, _):
            at[out] = linear(at[x])
        case Rotate():
            at[operation.x] = rotate(operation, at[operation.x], start)
        case Attend():
            at[operation.out] = _attend(operation, program, at, cache, start)
        case Gate(gate, up, out, activation):
            at[out] = ACTIVATIONS[activation](at[gate]) * at[up]
        case Add(x, y):
            at[x] = at[x] + at[y]
        case Cap(x, cap):
            at[x] = cap * torch.tanh(at[x] / cap)


def normalize(operation: Norm, x: Tensor) -> Tensor:
    """What ``operation`` makes of ``x`` [M, width]."""
    parts = x.unflatten(-1, (operation.heads, -1)).float()
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + operation.eps)
    if operation.centred:
        parts = (parts * (1.0 + operation.weight.float())).to(x.dtype)
    else:
        parts = operation.weight * parts.to(x.dtype)
    return parts.flatten(-2)


def turns(operation: Rotate, start: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[end - start, head_dim / 2]`` of positions ``start`` to ``end``."""
    angles = torch.arange(start, end, device=operation.inv_freq.device)[:, None].float() * operation.inv_freq.float()
    cos, sin = ((turn * operation.scaling).to(dtype) for turn in (angles.cos(), angles.sin()))
    return cos, sin


def rotate(operation: Rotate, x: Tensor, start: int) -> Tensor:
    """What ``operation`` makes of ``x`` [M, heads * head_dim], whose first row is at position ``start``."""
    cos, sin = (turn[:, None] for turn in turns(operation, start, start + len(x), x.dtype))
    low, high = x.unflatten(-1, (operation.heads, -1)).chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).flatten(-2)


def _attend(operation: Attend, program: Program, at: dict[str, Tensor], cache: KeyValues, start: int) -> Tensor:
    q, k, v = (
        at[name].unflatten(-1, (heads, program.head_dim)).transpose(0, 1)
        for name, heads in (
            (operation.q, program.heads), (operation.k, program.kv_heads), (operation.v, program.kv_heads)
        )
    )  # fmt: skip
    end = start + q.shape[1]
    cache.store(operation.layer, start, k, v)
    keys, values = cache.kept[operation.layer].load(end, q.dtype)
    return mix(operation, q, keys, values).transpose(0, 1).flatten(-2)


def mix(operation: Attend, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last M of T tokens, ``q [heads, M, head_dim]``, over ``keys`` and ``values [kv_heads, T,
    head_dim]``; like ``q``."""
    end = keys.shape[1]
    start = end - q.shape[1]
    seen = torch.ones(q.shape[1], end, dtype=torch.bool, device=q.device).tril(start)
    if operation.window is not None:
        seen &= seen.new_ones(seen.shape).triu(start - operation.window + 1)
    if operation.softcap is None:
        return F.scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=seen, scale=operation.scale, enable_gqa=True
        )[0]
    # Torch's attention has no soft cap.
    groups = q.shape[0] // keys.shape[0]
    keys, values = (kept.repeat_interleave(groups, 0) for kept in (keys, values))
    scores = q @ keys.transpose(1, 2) * operation.scale
    scores = (operation.softcap * torch.tanh(scores / operation.softcap)).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values
