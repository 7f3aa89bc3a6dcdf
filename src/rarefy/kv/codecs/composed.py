"""Words that combine codecs: sums, partitions, turned vectors, trimmed ranges, and all heads as one vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from rarefy.formats.inputs import hadamard
from rarefy.kv.codec import Codec, Payload, part_of, prefixed
from rarefy.kv.codecs.plain import Axis


class Residual(Codec):
    """A sum of codecs, each of which codes what those before it left over."""

    def __init__(self, *parts: Codec):
        self.parts, self.tokens = parts, parts[0].tokens

    def encode(self, x: Tensor) -> Payload:
        payload: Payload = {}
        for number, part in enumerate(self.parts):
            own = part.encode(x)
            payload.update(prefixed(str(number), own))
            if number + 1 < len(self.parts):
                x = x - part.decode(own)
        return payload

    def decode(self, payload: Payload) -> Tensor:
        return reduce(torch.add, (part.decode(own) for part, own in self._each(payload)))

    def score(self, query: Tensor, payload: Payload) -> Tensor:
        return reduce(torch.add, (part.score(query, own) for part, own in self._each(payload)))

    def mix(self, weights: Tensor, payload: Payload) -> Tensor:
        return reduce(torch.add, (part.mix(weights, own) for part, own in self._each(payload)))

    def shared(self) -> dict[str, Tensor]:
        return {k: v for number, part in enumerate(self.parts) for k, v in prefixed(str(number), part.shared()).items()}

    def _each(self, payload: Payload) -> list[tuple[Codec, Payload]]:
        return [(part, part_of(payload, str(number))) for number, part in enumerate(self.parts)]


class Partition(Codec):
    """Runs of channels with a codec each. ``widths``: channels of every run, in order."""

    def __init__(self, parts: Sequence[Codec], widths: Sequence[int]):
        self.parts, self.widths, self.tokens = tuple(parts), list(widths), parts[0].tokens

    def encode(self, x: Tensor) -> Payload:
        pieces = x.split(self.widths, -1)
        payload: Payload = {}
        for number, (part, piece) in enumerate(zip(self.parts, pieces, strict=True)):
            payload.update(prefixed(str(number), part.encode(piece.contiguous())))
        return payload

    def decode(self, payload: Payload) -> Tensor:
        return torch.cat([part.decode(part_of(payload, str(n))) for n, part in enumerate(self.parts)], -1)

    def score(self, query: Tensor, payload: Payload) -> Tensor:
        pieces = query.split(self.widths, -1)
        scores = [part.score(pieces[n], part_of(payload, str(n))) for n, part in enumerate(self.parts)]
        return reduce(torch.add, scores)

    def mix(self, weights: Tensor, payload: Payload) -> Tensor:
        return torch.cat([part.mix(weights, part_of(payload, str(n))) for n, part in enumerate(self.parts)], -1)

    def shared(self) -> dict[str, Tensor]:
        return {k: v for number, part in enumerate(self.parts) for k, v in prefixed(str(number), part.shared()).items()}


class Turned(Codec, ABC):
    """A codec of vectors that an orthogonal map of channels has turned; queries are turned once, and what values are
    mixed to is turned back."""

    def __init__(self, inner: Codec):
        self.inner, self.tokens = inner, inner.tokens

    @abstractmethod
    def turn(self, x: Tensor) -> Tensor:
        """``x [B, heads, ..., D]`` as the inner codec sees it; ``heads`` are those of keys or of queries."""

    @abstractmethod
    def back(self, x: Tensor) -> Tensor:
        """Inverse of `turn`."""

    def encode(self, x: Tensor) -> Payload:
        return self.inner.encode(self.turn(x))

    def decode(self, payload: Payload) -> Tensor:
        return self.back(self.inner.decode(payload))

    def score(self, query: Tensor, payload: Payload) -> Tensor:
        return self.inner.score(self.turn(query.float()), payload)

    def mix(self, weights: Tensor, payload: Payload) -> Tensor:
        return self.back(self.inner.mix(weights, payload))


class Rotated(Turned):
    """Turned to ``hadamard(signs * x)``."""

    def __init__(self, inner: Codec, channels: int, seed: int = 0):
        super().__init__(inner)
        flips = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(seed))
        self.signs = 1.0 - 2.0 * flips

    def turn(self, x: Tensor) -> Tensor:
        return hadamard(x * self.beside("signs", x))

    def back(self, x: Tensor) -> Tensor:
        return hadamard(x) * self.beside("signs", x)

    def shared(self) -> dict[str, Tensor]:
        return {**self.inner.shared(), "signs": self.signs}


class Permuted(Turned):
    """Channels in another order: ``order`` int16 ``[H, D]`` says which one of a head comes in the place of each."""

    def __init__(self, inner: Codec, order: Tensor):
        super().__init__(inner)
        self.order = order

    def turn(self, x: Tensor) -> Tensor:
        return x.take_along_dim(self._order(x), -1)

    def back(self, x: Tensor) -> Tensor:
        return x.take_along_dim(self._order(x).argsort(-1), -1)

    def shared(self) -> dict[str, Tensor]:
        return {**self.inner.shared(), "order": self.order}

    def _order(self, x: Tensor) -> Tensor:
        """int64 ``[1, heads, 1, ..., D]`` for the heads of ``x``."""
        order = self.beside("order", x).long()
        order = order.repeat_interleave(x.shape[1] // len(order), 0)
        return order.reshape(1, len(order), *[1] * (x.dim() - 3), -1)


class Trimmed(Codec):
    """A codec that sees each vector without its ``count`` largest and ``count`` smallest numbers: they are moved to the
    next ones, so that they do not stretch its range. A `Residual` then stores what that cost."""

    def __init__(self, inner: Codec, count: int, axis: Axis):
        self.inner, self.count, self.axis, self.tokens = inner, count, axis, inner.tokens

    def encode(self, x: Tensor) -> Payload:
        dim = -2 if self.axis == "channel" else -1
        keep = min(self.count, (x.shape[dim] - 1) // 2)
        if keep:
            order = x.sort(dim=dim).values
            low, high = order.narrow(dim, keep, 1), order.narrow(dim, x.shape[dim] - 1 - keep, 1)
            x = torch.minimum(torch.maximum(x, low), high)
        return self.inner.encode(x)

    def decode(self, payload: Payload) -> Tensor:
        return self.inner.decode(payload)

    def score(self, query: Tensor, payload: Payload) -> Tensor:
        return self.inner.score(query, payload)

    def mix(self, weights: Tensor, payload: Payload) -> Tensor:
        return self.inner.mix(weights, payload)

    def shared(self) -> dict[str, Tensor]:
        return self.inner.shared()


class JoinedHeads(Codec):
    """A codec that sees the vectors of all ``heads`` of a token as one."""

    def __init__(self, inner: Codec, heads: int):
        self.inner, self.heads, self.tokens = inner, heads, inner.tokens

    def encode(self, x: Tensor) -> Payload:
        return self.inner.encode(x.permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1))

    def decode(self, payload: Payload) -> Tensor:
        return self.inner.decode(payload)[:, 0].unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)

    def shared(self) -> dict[str, Tensor]:
        return self.inner.shared()
