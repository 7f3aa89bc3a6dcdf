"""Leaves that store the part of an error worth storing: its largest entries, or its leading directions."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kv.codec import Codec, Payload
from rarefy.kv.codecs.plain import Axis
from rarefy.kv.codecs.sums import norm, tree_sum


class Sparse(Codec):
    """The ``count`` largest magnitudes of each token's vector, or of each channel over the tokens of a block.
    ``counts`` float32 ``[channels]``: what magnitudes of a token are multiplied by before they are compared.

    A fixed number of entries per vector keeps blocks of one size: ``values`` float16 and ``indices`` (uint8 for vectors
    of up to 256, else int16), both ``[vectors, count]`` per block.
    """

    def __init__(self, count: int, axis: Axis, tokens: int, channels: int, counts: Tensor | None = None):
        self.axis, self.tokens, self.channels, self.counts = axis, tokens, channels, counts
        self.length = tokens if axis == "channel" else channels
        self.count = min(count, self.length)

    def encode(self, x: Tensor) -> Payload:
        vectors = x.transpose(-1, -2) if self.axis == "channel" else x
        sizes = vectors.abs() if self.counts is None else vectors.abs() * self.beside("counts", x)
        # A stable order: which of equals stays must not depend on the neighbours in the batch.
        order = sizes.sort(dim=-1, descending=True, stable=True).indices[..., : self.count]
        limit = torch.finfo(torch.float16).max
        values = vectors.gather(-1, order).clamp(-limit, limit)
        dtype = torch.uint8 if self.length <= 256 else torch.int16
        return {"values": values.to(torch.float16), "indices": order.to(dtype)}

    def decode(self, payload: Payload) -> Tensor:
        values, places = payload["values"].float(), payload["indices"].to(torch.int64)
        vectors = values.new_zeros(*values.shape[:-1], self.length).scatter_(-1, places, values)
        return vectors.transpose(-1, -2) if self.axis == "channel" else vectors

    def shared(self) -> dict[str, Tensor]:
        return {} if self.counts is None else {"counts": self.counts}


class LowRank(Codec):
    """``lowrank_a [G, rank] @ lowrank_b [rank, D]`` per block and head, float16, by ``iterations`` of subspace
    iteration from a fixed start, so that equal blocks have equal codes."""

    def __init__(self, rank: int, tokens: int, channels: int, iterations: int = 3):
        self.rank, self.iterations = min(rank, tokens, channels), iterations
        self.tokens, self.channels = tokens, channels
        self.start = torch.randn(channels, self.rank, generator=torch.Generator().manual_seed(0))

    def encode(self, x: Tensor) -> Payload:
        right = self.beside("start", x).expand(*x.shape[:3], -1, -1)
        for _ in range(self.iterations):
            left = _orthonormal(_product(x, right))
            right = _product(x.transpose(-1, -2), left)
        return {"lowrank_a": left.to(torch.float16), "lowrank_b": right.transpose(-1, -2).to(torch.float16)}

    def decode(self, payload: Payload) -> Tensor:
        return payload["lowrank_a"].float() @ payload["lowrank_b"].float()

    def score(self, query: Tensor, payload: Payload) -> Tensor:
        # [B, H, 1, R, D] @ [B, H, N, D, rank] -> [B, H, N, R, rank] @ [B, H, N, rank, G]
        inner = query.float().unsqueeze(2) @ payload["lowrank_b"].float().transpose(-1, -2)
        return (inner @ payload["lowrank_a"].float().transpose(-1, -2)).transpose(2, 3).flatten(3)

    def mix(self, weights: Tensor, payload: Payload) -> Tensor:
        shares = weights.float().unflatten(-1, (-1, self.tokens)).transpose(2, 3)
        return ((shares @ payload["lowrank_a"].float()) @ payload["lowrank_b"].float()).sum(2)


def _product(x: Tensor, columns: Tensor) -> Tensor:
    """``x [..., n, m] @ columns [..., m, rank]``, column by column."""
    return torch.cat([tree_sum(x * column.unsqueeze(-2)) for column in columns.unbind(-1)], -1)


def _orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``x [..., G, rank]``, with zeros in the place of those that others give.

    Gram-Schmidt, twice for each column: a library's decomposition takes the blocks one after the other on GPUs.
    """
    found: list[Tensor] = []
    for column in x.unbind(-1):
        size = norm(column)
        for other in found * 2:
            column = column - other * tree_sum(other * column)
        rest = norm(column)
        found.append(torch.where(rest > 1e-6 * size, column / rest, 0.0))
    return torch.stack(found, -1)
