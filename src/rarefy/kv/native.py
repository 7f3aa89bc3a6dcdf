"""The coded tokens of a store through the native library, for a new token on the CPU; the rest is the reference's."""

from __future__ import annotations

from torch import Tensor

from rarefy.formats.grids import IntegerGrid
from rarefy.formats.scales import SingleScale
from rarefy.kernels.cpu.attend import WIDTH, Half, Stretch, attend, available, fits
from rarefy.kv.codec import Codec, Payload
from rarefy.kv.codecs import Exact, Gridded, NormTable, RangeTable, Trimmed, Turned
from rarefy.kv.side import SEGMENT, Side
from rarefy.kv.store import LayerStore


def usable(query: Tensor) -> bool:
    """Whether the library runs where ``query`` is."""
    return query.device.type == "cpu" and available()


def attended(store: LayerStore, query: Tensor, scaling: float) -> tuple[Tensor, Tensor, int] | None:
    """Attention of ``query [B, Hq, 1, D]`` over the first tokens of a store without its sinks: float32
    ``[B, Hq, 1, D]``, its log-sum-exp ``[B, Hq, 1]``, and how many tokens that are: all, or where codes are rotated
    those that both keys and values have in whole blocks. None where the library cannot read them."""
    assert store.keys is not None and store.values is not None
    channels, turn, back = store.keys.tail.shape[3], store.codecs.keys, store.codecs.values
    if store.codecs.pre_rope or channels != store.values.tail.shape[3] or channels > WIDTH or channels % 16:
        return None
    count = store.length
    if isinstance(turn, Turned) or isinstance(back, Turned):
        count = min(store.keys.coded, store.values.coded)
        count -= count % max(turn.tokens, back.tokens)
    found = []
    for start in range(0, count, SEGMENT):
        stop = min(start + SEGMENT, count)
        keys, values = (_halves(side, start, stop) for side in (store.keys, store.values))
        if keys is None or values is None:
            return None
        found.append(Stretch(start, stop - start, keys, values))
    if not found:
        return None
    batch, heads = store.keys.tail.shape[:2]
    one = turn.turn(query.float()) if isinstance(turn, Turned) else query.float()
    hidden = None if store.sink is None else store.sink.index
    out, lse = attend(found, one.reshape(batch, heads, -1, channels), scaling, hidden)
    out = out.reshape(batch, -1, 1, channels)
    return back.back(out) if isinstance(back, Turned) else out, lse.reshape(batch, -1, 1), count


def _halves(side: Side, start: int, stop: int) -> tuple[Half, ...] | None:
    """What holds tokens ``[start, stop)`` of one segment: runs, and tokens of the tail."""
    found = []
    for run in side.runs:
        if run.start < stop and run.stop > start:
            half = half_of(side.codec, run.payload, run.start - start, run.stop - run.start)
            if half is None or not fits(half, side.tail.shape[3]):
                return None
            found.append(half)
    low = max(start, side.coded)
    if low < stop:
        tail = side.tail.contiguous()
        found.append(Half("dense", low - start, stop - low, (tail,), skip=low - side.coded))
    return tuple(found)


def half_of(codec: Codec, payload: Payload, first: int, tokens: int) -> Half | None:
    """What the library reads of a run; None where it knows no such codec."""

    def numbers(*names: str) -> tuple[Tensor, ...]:
        return tuple(payload[name].contiguous() for name in names)

    match codec:
        case Turned() | Trimmed():
            return half_of(codec.inner, payload, first, tokens)
        case Exact():
            return Half("dense", first, tokens, numbers("exact"))
        case Gridded(grid=IntegerGrid(zero="float", scales=SingleScale(dtype="float16")) as grid):
            length = codec.tokens if codec.axis == "channel" else codec.channels
            group = min(grid.group_size or length, length)
            stored = numbers("codes", "scale", "zero_point")
            return Half(codec.axis, first, tokens, stored, grid.num_bits, codec.tokens, group)
        case NormTable() | RangeTable():
            names = ("codes", "scale") if isinstance(codec, NormTable) else ("codes", "scale", "offset")
            stored, table = numbers(*names), codec.decoded
            return Half("token", first, tokens, stored, codec.num_bits, 1, codec.channels, table, added=True)
    return None
