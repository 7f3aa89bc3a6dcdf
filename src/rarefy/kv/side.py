"""One half of a layer's store, its keys or its values: blocks in code, and the newest tokens as they are.

Blocks lie in *runs*, payloads of neighbouring blocks that never change; short runs are joined as they become as long as
their neighbour or complete a segment, so that a token is copied a few times at most. No run crosses a multiple of
``SEGMENT``, the number of tokens that attention decodes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from rarefy.core.errors import OptionError
from rarefy.kv.codec import Codec, Payload, apply, blocks_of, cut, join
from rarefy.kv.encoding import Fast, Faults, fast_form, fast_payload
from rarefy.kv.later import Encoder, Pending

SEGMENT = 2048


@dataclass(frozen=True)
class Run:
    """Coded blocks of tokens ``[start, stop)``."""

    start: int
    stop: int
    payload: Payload


@dataclass
class Side:
    """Tokens ``[0, coded)`` in ``runs`` and those after them in ``tail [B, H, t, D]``, together with which of them are
    ``valid [B, t]`` (padding is not; None: all are). The last ``recent`` tokens always stay in the tail, and so do
    those that are being encoded until `settle` finds that they are."""

    codec: Codec
    recent: int
    tail: Tensor
    valid: Tensor | None = None
    runs: list[Run] = field(default_factory=list)
    pending: Pending | None = None
    faults: Faults | None = None  # what a kernel found that encodes without being waited for

    def __post_init__(self) -> None:
        if SEGMENT % self.codec.tokens:
            raise OptionError(
                f"A block of {self.codec.tokens} tokens does not divide {SEGMENT}; use a power of two up to that."
            )

    @property
    def coded(self) -> int:
        return self.runs[-1].stop if self.runs else 0

    @property
    def length(self) -> int:
        return self.coded + self.tail.shape[2]

    def append(self, x: Tensor, valid: Tensor | None = None) -> None:
        """New tokens ``x [B, H, n, D]`` as they are; `seal` puts them into code."""
        if self.valid is not None or valid is not None:
            old = self.counted() if self.valid is None else self.valid
            new = x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool) if valid is None else valid
            self.valid = torch.cat([old, new], 1)
        self.tail = torch.cat([self.tail, x], 2) if self.tail.shape[2] else x.contiguous()

    def counted(self) -> Tensor:
        """Which tokens of the tail are valid, bool ``[B, t]``."""
        if self.valid is not None:
            return self.valid
        return self.tail.new_ones(self.tail.shape[0], self.tail.shape[2], dtype=torch.bool)

    def sealable(self) -> int:
        """How many tokens of the tail fill whole blocks and are not recent."""
        return max(0, self.tail.shape[2] - self.recent) // self.codec.tokens * self.codec.tokens

    def fast(self, x: Tensor) -> Fast | None:
        """The kernel that encodes numbers such as ``x``, if there is one."""
        found = fast_form(self.codec, x)
        if found is not None and self.faults is None:
            self.faults = Faults(x.device)
        return found

    def seal(self, exempt: Tensor | None = None, x: Tensor | None = None, encoder: Encoder | None = None) -> None:
        """Encode all whole blocks of the tail that are not recent, each block once; with an ``encoder``, later.

        ``exempt`` bool ``[B, t]``: tokens of the tail that are kept elsewhere. They and padding take the place of their
        neighbour while a block's parameters are found, so that they do not change them. ``x``: what is encoded, if not
        the tail.
        """
        count = self.sealable()
        if not count:
            return
        counts = self.valid if exempt is None else self.counted() & ~exempt.to(self.tail.device)
        counts = None if counts is None else counts[:, :count]
        x = (self.tail if x is None else x)[:, :, :count]
        fast = self.fast(x)
        work = partial(_encoded, self.codec, fast, self.faults, counts, self.coded)
        if encoder is None:
            self._adopt(work(x), count)
        else:
            self.pending = encoder.submit(work, x, count)

    def settle(self, wait: bool = True) -> None:
        """Take over what has been encoded meanwhile; without ``wait``, if it has."""
        if self.pending is not None and (wait or self.pending.done()):
            pending, self.pending = self.pending, None
            self._adopt(pending.runs(), pending.count)

    def _adopt(self, runs: list[Run], count: int) -> None:
        for run in runs:
            self.runs.append(run)
            self._merge()
        # Copies, so that the memory of what is now in code is given back.
        self.tail = self.tail[:, :, count:].clone()
        self.valid = None if self.valid is None else self.valid[:, count:].clone()

    def _merge(self) -> None:
        while len(self.runs) > 1:
            left, right = self.runs[-2:]
            longer = left.stop - left.start > right.stop - right.start
            if left.start // SEGMENT != right.start // SEGMENT or (longer and right.stop % SEGMENT):
                return
            self.runs[-2:] = [Run(left.start, right.stop, join([left.payload, right.payload]))]

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens. Where they reach into coded blocks, the rest of those blocks is decoded
        into the tail."""
        keep = self.length - remove
        while self.runs and self.coded > keep:
            run = self.runs.pop()
            whole = max(0, keep - run.start) // self.codec.tokens
            size = self.codec.tokens
            if whole:
                kept = apply(torch.clone, cut(run.payload, 0, whole))
                self.runs.append(Run(run.start, run.start + whole * size, kept))
            lossy = self.codec.decode(cut(run.payload, whole)).flatten(2, 3).to(self.tail.dtype)
            self.tail = torch.cat([lossy, self.tail], 2)
            if self.valid is not None:
                self.valid = torch.cat([self.valid.new_ones(lossy.shape[0], lossy.shape[2]), self.valid], 1)
        count = keep - self.coded
        self.tail = self.tail[:, :, :count].clone()
        self.valid = None if self.valid is None else self.valid[:, :count].clone()

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put ``function`` of every tensor in its place, such as a choice of rows or another device."""
        self.runs = [Run(run.start, run.stop, apply(function, run.payload)) for run in self.runs]
        self.tail, self.valid = function(self.tail), None if self.valid is None else function(self.valid)

    def copy(self) -> Side:
        """Another side with the same runs, which are never changed, and the same tail."""
        return Side(self.codec, self.recent, self.tail, self.valid, list(self.runs), faults=self.faults)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Payload | Tensor]]:
        """What holds tokens ``[start, stop)`` (within one segment), in order: coded blocks, or tokens of the tail. Of
        coded tokens, ``start`` is the first of a block and ``stop`` the end of one."""
        size = self.codec.tokens
        for run in self.runs:
            if run.start >= stop or run.stop <= start:
                continue
            payload, low, high = run.payload, max(start, run.start), min(stop, run.stop)
            if high - low < run.stop - run.start:
                payload = cut(payload, (low - run.start) // size, (high - run.start) // size)
            yield low, high, payload
        low, high = max(start, self.coded), min(stop, self.length)
        if low < high:
            yield low, high, self.tail[:, :, low - self.coded : high - self.coded]

    def payload(self) -> Payload:
        """All coded blocks in one payload (a copy where there are several runs)."""
        return join([run.payload for run in self.runs]) if self.runs else {}

    def restore_(self, payload: Payload, tail: Tensor, valid: Tensor) -> None:
        """Hold these blocks and this tail, as `payload` gave them."""
        self.tail, self.valid, self.runs = tail, None if bool(valid.all()) else valid, []
        tokens = self.codec.tokens
        blocks, at_once = blocks_of(payload) if payload else 0, SEGMENT // tokens
        for low in range(0, blocks, at_once):
            part = apply(torch.clone, cut(payload, low, low + at_once))
            self.runs.append(Run(low * tokens, (low + blocks_of(part)) * tokens, part))


def _encoded(
    codec: Codec, fast: Fast | None, faults: Faults | None, counts: Tensor | None, start: int, x: Tensor
) -> list[Run]:
    """Whole blocks ``x [B, H, n, D]`` of tokens from ``start`` on, of which ``counts [B, n]`` (None: all), as runs that
    cross no segment."""
    runs, done = [], 0
    while done < x.shape[2]:
        size = min(x.shape[2] - done, SEGMENT - (start + done) % SEGMENT)
        piece = x[:, :, done : done + size]
        source = None if counts is None else _stand_ins(counts[:, done : done + size], codec.tokens)
        if fast is not None and faults is not None:
            payload = fast_payload(codec, fast, piece, None if source is None else source.int(), faults.bits)
        else:
            blocks = piece.float() if source is None else _gathered(piece.float(), source)
            payload = codec.encode(blocks.unflatten(2, (-1, codec.tokens)))
        runs.append(Run(start + done, start + done + size, payload))
        done += size
    if fast is not None and faults is not None:
        faults.ask()
    return runs


def _stand_ins(counts: Tensor, tokens: int) -> Tensor:
    """Which token is encoded in the place of each, int64 ``[B, n]``: itself if it counts, or the next one of its block
    that does, or else the last one before it, or else none (-1)."""
    blocks = counts.unflatten(1, (-1, tokens))
    place = torch.arange(tokens, device=counts.device).expand(blocks.shape)
    after = torch.where(blocks, place, tokens).flip(-1).cummin(-1).values.flip(-1)
    before = torch.where(blocks, place, -1).cummax(-1).values
    chosen = torch.where(after < tokens, after, before)
    offset = torch.arange(blocks.shape[1], device=counts.device)[:, None] * tokens
    return torch.where(chosen < 0, -1, chosen + offset).flatten(1)


def _gathered(x: Tensor, source: Tensor) -> Tensor:
    """``x [B, H, n, D]`` with tokens ``source [B, n]``, zeros where there is none."""
    index = source.clamp(min=0)[:, None, :, None].expand_as(x)
    return x.gather(2, index).masked_fill((source < 0)[:, None, :, None], 0.0)
