"""The KV cache of one layer: keys and values in code, sinks as they are, and the state that others keep with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import FormatError, UnsupportedError
from rarefy.formats.bytes import ByteCount
from rarefy.kv.codec import Payload, nbytes, part_of, prefixed
from rarefy.kv.encoding import GAPS_SAID
from rarefy.kv.later import Encoder
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.rotary import Rotary, unrotate
from rarefy.kv.side import Side


@dataclass
class Arrival:
    """What is known of the tokens of the coming `LayerStore.append` besides keys and values."""

    valid: Tensor | None = None  # bool [B, n]; None: all are
    positions: Tensor | None = None  # int [B or 1, n]; None: as many as came before, and on
    cos: Tensor | None = None  # [B or 1, n, rotated channels]
    sin: Tensor | None = None
    rotary: Rotary | None = None


@dataclass
class SideState:
    """Tensors ``[B, H, entries, ...]`` that somebody keeps for each layer. Entry ``i`` is about ``span`` tokens (None:
    ``tokens``) from token ``i * tokens`` on, and there are none about tokens yet to come."""

    tensors: dict[str, Tensor]
    tokens: int = 1
    span: int | None = None

    def entries(self, length: int) -> int:
        """How many entries are about the first ``length`` tokens alone."""
        return max(0, (length - (self.span or self.tokens)) // self.tokens + 1)


@dataclass
class Sink:
    """Exact copies of the first tokens of each row: ``keys`` (as attention reads them) and ``values [B, H, S, D]``, at
    token ``index [B, S]``; -1 where there is none. The index lies on the host, so that a GPU is never waited for."""

    keys: Tensor
    values: Tensor
    index: Tensor

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values, self.index = function(self.keys), function(self.values), function(self.index).cpu()


@dataclass(frozen=True)
class Singles:
    """Where tokens were that arrived one by one: of each row one sum of their positions with weights, so that a step
    adds to it by one operation. If all were where they are told to be, ``total`` int64 ``[B]`` (or ``[1]``) is ``weight
    * shift + offset``, modulo 2^64."""

    total: Tensor
    weight: int
    offset: int

    @classmethod
    def after(cls, before: Singles | None, positions: Tensor, place: int) -> Singles:
        """Those ``before``, then token ``place`` of each row at ``positions [B or 1, 1]``."""
        weight = ((place + 1) * 0x9E3779B97F4A7C15 >> 16) % 2**31 | 1  # which no sum of a few others is by chance
        if before is None:
            return cls(positions.view(-1) * weight, weight, _wrapped(weight * place))
        total = torch.add(before.total, positions.view(-1), alpha=weight)
        return cls(total, before.weight + weight, _wrapped(before.offset + weight * place))

    def gaps(self, shift: Tensor) -> Tensor:
        """Whether one was not there, bool ``[]``."""
        return (self.total != shift * _wrapped(self.weight) + self.offset).any()


@dataclass
class LayerStore:
    """Keys and values of one layer. Nothing is kept until the first tokens say which shapes, dtype and device.

    ``exact_arrival``: tokens are attended to exactly in the pass that brings them; otherwise every whole block is read
    from its codes at once, which is what simulations of a codec in one pass measure. ``encoder``: blocks are encoded
    aside, and read exactly until they are; what is stored in the end is the same.
    """

    codecs: LayerCodecs
    name: str = "layer"
    exact_arrival: bool = True
    keys: Side | None = None
    values: Side | None = None
    sink: Sink | None = None
    rotary: Rotary | None = None
    shift: Tensor | None = None  # int64 [B]: the position of token t of a row is t + shift
    started: Tensor | None = None  # bool [B]: whether a row has had a token that tells its shift
    gaps: Tensor | None = None  # bool []: whether a token was not where it tells, but for those of ``singles``
    singles: Singles | None = None
    all_started: bool = False  # whether that is known of all rows, without asking a GPU
    state: dict[str, SideState] = field(default_factory=dict)
    encoder: Encoder | None = None
    plans: dict[str, Any] = field(default_factory=dict)  # what executors keep from step to step, also over `copy`

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.length

    def append(self, key: Tensor, value: Tensor, arrival: Arrival | None = None) -> LayerStore:
        """Take new ``key`` and ``value [B, H, n, D]``; the store as attention of these tokens should read it.

        When tokens are put into code, raises FormatError for numbers that are not finite, and UnsupportedError where
        positions have gaps and keys are stored without them; not before, since looking makes a GPU wait. Where a kernel
        puts them into code, what it found is told by a later call.
        """
        arrival = arrival or Arrival()
        for side in (self.keys, self.values):
            if side is not None:
                side.settle(wait=False)
        self._look(wait=False)
        valid = arrival.valid
        if self.keys is None or self.values is None:
            codecs = self.codecs
            self.keys = Side(codecs.keys, codecs.recent_keys, key[:, :, :0])
            self.values = Side(codecs.values, codecs.recent_values, value[:, :, :0])
        if self.codecs.pre_rope:
            self._learn_positions(key, valid, arrival)
        self._collect_sink(key, value, valid)
        first = self.length
        self.keys.append(key, valid)
        self.values.append(value, valid)
        if self.exact_arrival:
            seen = self.copy()
            self._seal(first, arrival)
        else:
            self._seal(first, arrival)
            seen = self.copy()
        seen.state = self.state  # what attention finds out about these tokens is kept
        return seen

    def _seal(self, first: int, arrival: Arrival) -> None:
        assert self.keys is not None and self.values is not None
        keys = self.keys
        for side, what in ((keys, "keys"), (self.values, "values")):
            if side.pending is None and (count := side.sealable()) and side.fast(side.tail) is None:
                _check_finite(side.tail[:, :, :count], side.counted()[:, :count], f"{what} of {self.name}", side.coded)
        if keys.pending is None and keys.sealable():
            plain = self._without_rope(keys, first, arrival) if self.codecs.pre_rope else None
            keys.seal(self._exempt(keys), plain, self.encoder)
        if self.values.pending is None:
            self.values.seal(self._exempt(self.values), None, self.encoder)

    def settle(self) -> None:
        """Wait for what is being encoded aside."""
        for side in (self.keys, self.values):
            if side is not None:
                side.settle()
        self._look(wait=True)

    def _look(self, wait: bool) -> None:
        for side in (self.keys, self.values):
            if side is not None and side.faults is not None:
                side.faults.look(self.name, wait)

    def _without_rope(self, keys: Side, first: int, arrival: Arrival) -> Tensor:
        """The tail of the keys with RoPE undone; it stays itself what attention reads."""
        self._compare_singles()
        if self.gaps is not None and keys.faults is not None:
            keys.faults.note(self.gaps)
        elif self.gaps is not None and bool(self.gaps):
            raise UnsupportedError(GAPS_SAID.format(self.name))
        rotated, cos, sin = keys.tail, arrival.cos, arrival.sin
        if cos is None or sin is None or rotated.shape[2] == first - keys.coded:
            cos, sin = self._angles(keys.coded, keys.length)
        elif first > keys.coded:
            old_cos, old_sin = self._angles(keys.coded, first)
            rows = rotated.shape[0]
            cos = torch.cat([old_cos, cos.float().expand(rows, -1, -1)], 1)
            sin = torch.cat([old_sin, sin.float().expand(rows, -1, -1)], 1)
        return unrotate(rotated, cos.unsqueeze(1), sin.unsqueeze(1))

    def _angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        return self.rotary.angles(self.positions(start, stop))

    def positions(self, start: int, stop: int) -> Tensor:
        """Positions of tokens ``[start, stop)``, int64 ``[B, n]``; those of padding mean nothing."""
        assert self.shift is not None
        return torch.arange(start, stop, device=self.shift.device) + self.shift[:, None]

    def _learn_positions(self, key: Tensor, valid: Tensor | None, arrival: Arrival) -> None:
        if arrival.rotary is not None:
            self.rotary = arrival.rotary
        if self.rotary is None:
            raise UnsupportedError(
                f"The positions of {self.name} are not known, and its keys are to be stored without them; use a codec "
                "of rotated keys."
            )
        if not key.shape[2]:
            return
        if valid is None and self.all_started:
            if arrival.positions is not None and self.gaps is not None and self.shift is not None:
                if key.shape[2] == 1:
                    self.singles = Singles.after(self.singles, arrival.positions, self.length)
                else:
                    differ = arrival.positions != self.positions(self.length, self.length + key.shape[2])
                    self.gaps = self.gaps | differ.any()
            return
        self.all_started = self.all_started or valid is None
        if valid is None:
            valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        index = torch.arange(self.length, self.length + key.shape[2], device=key.device)
        given = index if arrival.positions is None else arrival.positions
        shift = (given - index).expand(key.shape[0], -1)
        # The first valid token of a row says where it starts; a row of padding alone does not know yet.
        chosen = shift.gather(1, valid.int().argmax(1, keepdim=True)).squeeze(1)
        known = valid.any(1)
        if self.shift is None or self.started is None:
            self.shift, self.started = chosen.clone(), known.clone()
        else:
            self.shift = torch.where(self.started, self.shift, chosen)
            self.started = self.started | known
        gaps = ((shift != self.shift[:, None]) & valid).any()
        self.gaps = gaps if self.gaps is None else self.gaps | gaps

    def _compare_singles(self) -> None:
        if self.singles is not None and self.gaps is not None and self.shift is not None:
            self.gaps, self.singles = self.gaps | self.singles.gaps(self.shift), None

    def _collect_sink(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        wanted = self.codecs.sink
        if not wanted:
            return
        rows, heads, _, channels = key.shape
        if self.sink is None:
            empty = key.new_zeros(rows, heads, wanted, channels)
            index = torch.full((rows, wanted), -1, dtype=torch.int64)
            self.sink = Sink(empty, value.new_zeros(rows, heads, wanted, value.shape[-1]), index)
        have = (self.sink.index >= 0).sum(1)
        if bool((have == wanted).all()):
            return
        valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool) if valid is None else valid.cpu()
        rank = have[:, None] + valid.cumsum(1) - 1  # which sink a token would be
        row, token = (valid & (rank < wanted)).nonzero(as_tuple=True)
        place = rank[row, token]
        sink = Sink(self.sink.keys.clone(), self.sink.values.clone(), self.sink.index.clone())
        sink.keys[row, :, place], sink.values[row, :, place] = key[row, :, token], value[row, :, token]
        sink.index[row, place] = token + self.length
        self.sink = sink

    def _exempt(self, side: Side) -> Tensor | None:
        """Which tokens of a side's tail are sinks, bool ``[B, t]``; None: none of them."""
        if self.sink is None:
            return None
        place = self.sink.index - side.coded
        row, sink = ((place >= 0) & (place < side.tail.shape[2])).nonzero(as_tuple=True)
        if not len(row):
            return None
        exempt = torch.zeros(side.tail.shape[0], side.tail.shape[2], dtype=torch.bool)
        exempt[row, place[row, sink]] = True
        return exempt

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens."""
        if self.keys is None or self.values is None or remove <= 0:
            return
        self.settle()
        keep = max(0, self.length - remove)
        before = self.keys.coded
        self.keys.crop(self.length - keep)
        self.values.crop(self.values.length - keep)
        back = min(before, keep) - self.keys.coded
        if self.codecs.pre_rope and back > 0:
            # What comes back from code without positions has to get them again before it is a tail.
            start = self.keys.coded
            assert self.rotary is not None
            turned = self.rotary.rotate(self.keys.tail[:, :, :back], self.positions(start, start + back))
            self.keys.tail = torch.cat([turned.to(self.keys.tail.dtype), self.keys.tail[:, :, back:]], 2)
        if self.sink is not None:
            self._restore_sinks(self.keys, self.sink.keys)
            self._restore_sinks(self.values, self.sink.values)
            self.sink = Sink(self.sink.keys, self.sink.values, torch.where(self.sink.index < keep, self.sink.index, -1))
        for state in self.state.values():
            entries = state.entries(keep)
            state.tensors = {name: tensor[:, :, :entries] for name, tensor in state.tensors.items()}

    def _restore_sinks(self, side: Side, exact: Tensor) -> None:
        """Put exact sinks back where they were decoded into the tail."""
        assert self.sink is not None
        place = self.sink.index - side.coded
        row, sink = ((place >= 0) & (place < side.tail.shape[2])).nonzero(as_tuple=True)
        side.tail[row, :, place[row, sink]] = exact[row, :, sink]

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put ``function`` of every tensor that has a row for each sequence in its place."""
        self.plans = {}
        self.settle()
        for part in (self.keys, self.values, self.sink):
            if part is not None:
                part.map_(function)
        self._compare_singles()
        if self.shift is not None and self.started is not None:
            self.shift, self.started = function(self.shift), function(self.started)
        for state in self.state.values():
            state.tensors = {name: function(tensor) for name, tensor in state.tensors.items()}

    def copy(self) -> LayerStore:
        """Another store of the same tokens that goes its own way; blocks are shared, since they never change."""
        twin = LayerStore(self.codecs, self.name, self.exact_arrival, encoder=self.encoder)
        twin.keys = None if self.keys is None else self.keys.copy()
        twin.values = None if self.values is None else self.values.copy()
        twin.sink = None if self.sink is None else Sink(self.sink.keys, self.sink.values, self.sink.index)
        twin.rotary, twin.plans = self.rotary, self.plans
        twin.shift, twin.started, twin.gaps, twin.singles = self.shift, self.started, self.gaps, self.singles
        twin.all_started = self.all_started
        twin.state = {name: replace(state, tensors=dict(state.tensors)) for name, state in self.state.items()}
        return twin

    def nbytes(self) -> ByteCount:
        """Bytes of everything that is kept for these tokens; tables that codecs share are not among them."""
        self.settle()
        if self.keys is None or self.values is None:
            return ByteCount()
        parts = [nbytes(run.payload) for side in (self.keys, self.values) for run in side.runs]
        exact = [self.keys.tail, self.values.tail]
        if self.sink is not None:
            exact += [self.sink.keys, self.sink.values]
        indices = [self.shift] if self.shift is not None else []
        indices += [self.sink.index] if self.sink is not None else []
        parts.append(ByteCount(exact=_size(exact), indices=_size(indices)))
        return reduce(lambda left, right: left + right, parts)

    def numbers(self) -> int:
        """How many numbers of keys and values these bytes stand for."""
        if self.keys is None or self.values is None:
            return 0
        shapes = [(side.tail.shape, side.length) for side in (self.keys, self.values)]
        return sum(rows * heads * channels * length for (rows, heads, _, channels), length in shapes)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `restore_` needs, by name."""
        self.settle()
        if self.keys is None or self.values is None:
            return {}
        found: dict[str, Tensor] = {}
        for label, side in (("keys", self.keys), ("values", self.values)):
            found |= prefixed(f"{label}.blocks", side.payload())
            found |= {f"{label}.tail": side.tail, f"{label}.valid": side.counted()}
        if self.sink is not None:
            found |= {"sink.keys": self.sink.keys, "sink.values": self.sink.values, "sink.index": self.sink.index}
        if self.shift is not None and self.started is not None and self.rotary is not None:
            found |= {"rope.shift": self.shift, "rope.started": self.started, "rope.inv_freq": self.rotary.inv_freq}
            found["rope.factor"] = torch.tensor(self.rotary.factor, dtype=torch.float64)
        for name, state in self.state.items():
            about = torch.tensor([state.tokens, state.span or state.tokens])
            found |= prefixed(f"state.{name}", {**state.tensors, "about": about})
        return found

    def restore_(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` gave, on the device of those tensors."""
        if "keys.tail" not in tensors:
            return
        given: Payload = dict(tensors)
        for label, codec, recent in (
            ("keys", self.codecs.keys, self.codecs.recent_keys),
            ("values", self.codecs.values, self.codecs.recent_values),
        ):
            tail, valid = given[f"{label}.tail"], given[f"{label}.valid"]
            side = Side(codec, recent, tail, valid)
            side.restore_(part_of(given, f"{label}.blocks"), tail, valid)
            setattr(self, label, side)
        if "sink.keys" in given:
            self.sink = Sink(given["sink.keys"], given["sink.values"], given["sink.index"].cpu())
        if "rope.shift" in given:
            self.shift, self.started = given["rope.shift"], given["rope.started"]
            self.rotary = Rotary(given["rope.inv_freq"], float(given["rope.factor"]))
        for name in {full.split(".")[1] for full in given if full.startswith("state.")}:
            part = part_of(given, f"state.{name}")
            stride, span = part.pop("about").tolist()
            self.state[name] = SideState(part, stride, span)


def _wrapped(number: int) -> int:
    """As an int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_finite(x: Tensor, valid: Tensor, what: str, before: int) -> None:
    finite = torch.isfinite(x).flatten(3).all(3).all(1) | ~valid
    if not bool(finite.all()):
        row, token = (~finite).nonzero()[0].tolist()
        raise FormatError(
            f"The {what} are not finite at token {before + token} of row {row}; load the model in bfloat16 or float32."
        )
