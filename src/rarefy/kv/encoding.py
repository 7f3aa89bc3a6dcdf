"""Blocks put into code by one launch on a GPU, with the bits that the codec itself would give, and without waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.core.errors import FormatError, UnsupportedError
from rarefy.formats.grids import FloatGrid
from rarefy.formats.grids.float import nearest
from rarefy.kernels import cuda
from rarefy.kv.codec import Codec, Payload, prefixed
from rarefy.kv.codecs import (
    ChannelTable,
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

if TYPE_CHECKING:
    from rarefy.kernels.cuda.encode import Code
    from rarefy.kernels.cuda.encode_blocks import BlockCode, EncodedBlocks

NOT_FINITE, OVERFLOWS, GAPS = 1, 2, 4  # bits of `Faults`
GAPS_SAID = (
    "Positions of {} do not follow each other, and its keys are to be stored without them; use a codec of rotated keys."
)


class Faults:
    """What kernels on ``device`` found wrong, which is looked at when it costs no waiting."""

    def __init__(self, device: torch.device):
        self.bits = torch.zeros(1, dtype=torch.int32, device=device)
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None
        self._asked = False

    def ask(self) -> None:
        """Bring here what kernels on the current stream will have found."""
        self._seen.copy_(self.bits, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._asked = True

    def note(self, gaps: Tensor) -> None:
        """Positions have ``gaps`` (bool, one number), which is not looked at now."""
        self.bits |= GAPS * gaps.int()

    def look(self, name: str, wait: bool = False) -> None:
        """Raise FormatError, or UnsupportedError for gaps, if something was wrong with ``name``; without ``wait``, if
        that is known."""
        if not self._asked:
            return
        if self._event is not None:
            # Nothing may be asked of an event while a graph is captured.
            if torch.cuda.is_current_stream_capturing() or not (wait or self._event.query()):
                return
            self._event.synchronize()
        self._asked = False
        found = int(self._seen)
        if found & GAPS:
            raise UnsupportedError(GAPS_SAID.format(name))
        if found:
            what = "were not finite" if found & NOT_FINITE else "have a scale that overflows float16"
            raise FormatError(f"Keys or values of {name} {what}; load the model in bfloat16 or float32.")


@dataclass(frozen=True)
class Fast:
    """A codec as the kernel knows it, and the tensors that the kernel reads beside the numbers."""

    code: Code | BlockCode
    tables: dict[str, Tensor]


def fast_form(codec: Codec, x: Tensor) -> Fast | None:
    """How the kernel puts ``x [B, H, tokens, D]`` into code; None where it knows no such codec or is not there."""
    from rarefy.kernels.cuda.encode import TYPES

    if not (x.is_cuda and cuda.status() == "cuda") or x.dtype not in TYPES:
        return None
    return form_of(codec, x.shape[3], x.device)


def form_of(codec: Codec, channels: int, device: torch.device) -> Fast | None:
    """The kernel's form of ``codec``, which stays with it."""
    known: dict[Any, Fast | None] = codec.__dict__.setdefault("_fast", {})
    key = channels, device
    if key not in known:
        known[key] = _form(codec, channels, device)
    return known[key]


def _form(codec: Codec, channels: int, device: torch.device) -> Fast | None:
    from rarefy.kernels.cuda.encode import Code, entries

    code: Code | BlockCode | None = None
    tables: dict[str, Tensor] = {}
    match codec:
        case Gridded(uniform=(num_bits, group)):
            code = Code(codec.axis, num_bits, channels, group, codec.tokens)
        case Residual(parts=(Trimmed() as trimmed, *corrections)):
            code, tables = _corrected(trimmed, corrections, channels)
        case Gridded(grid=FloatGrid() as floats, axis="token") if is_float8(floats, channels):
            boundaries, codes = nearest("fp8_e4m3", torch.device("cpu"))
            tables, code = {"middles": boundaries, "lut": codes}, Code("float8", 8, channels)
        case NormTable() | RangeTable():
            tables = _table(codec)
            code = Code("norm" if isinstance(codec, NormTable) else "range", codec.num_bits, channels)
        case Rotated(inner=NormTable() as inner):
            found = _form(inner, channels, device)
            if found is None:
                return None
            code = Code("norm", inner.num_bits, channels, rotated=True)
            tables = {**found.tables, "signs": codec.signs}
        case ProductTable(width=2, count=256):
            tables, code = {"lut": entries(*codec.nearness(codec.codebook))}, Code("product", 8, channels)
        case Permuted(inner=ProductTable() as products):
            found = _form(products, channels, device)
            if found is None:
                return None
            code, tables = found.code, {**found.tables, "order": codec.order}
        case JoinedHeads(inner=Residual(parts=(ChannelTable() as base, Sparse(axis="token") as sparse)), heads=heads):
            counts = torch.ones(sparse.channels) if sparse.counts is None else sparse.counts
            tables = {
                **_table(base), "center": base.center.reshape(-1), "spread": base.scale.reshape(-1), "counts": counts
            }  # fmt: skip
            code = Code("row spread", base.num_bits, channels, heads=heads, entries=sparse.count)
        case JoinedHeads(inner=Residual(parts=(Trimmed() as trimmed, Sparse(axis="token") as sparse)), heads=heads):
            if isinstance(trimmed.inner, RangeTable) and trimmed.axis == "token" and sparse.count == 2 * trimmed.count:
                tables = _table(trimmed.inner)
                code = Code("row range", trimmed.inner.num_bits, channels, heads=heads, entries=sparse.count)
    if code is not None and "decoded" in tables and len(tables["decoded"]) != 1 << code.num_bits:
        return None
    if code is None or not code.fits:
        return None
    types = {"order": torch.int16}
    return Fast(code, {name: t.to(device, types.get(name, torch.float32)).contiguous() for name, t in tables.items()})


def _corrected(trimmed: Trimmed, corrections: list[Codec], channels: int) -> tuple[BlockCode | None, dict[str, Tensor]]:
    """Uniform codes of trimmed vectors whose errors are stored next, then those errors' leading directions."""
    from rarefy.kernels.cuda.encode_blocks import BlockCode

    inner, entries, low_rank = trimmed.inner, 0, None
    match corrections:
        case [Sparse() as sparse, *others] if sparse.axis == trimmed.axis:
            entries, corrections = sparse.count, others
    match corrections:
        case [LowRank() as found]:
            low_rank, corrections = found, []
    if corrections or entries != 2 * trimmed.count or not isinstance(inner, Gridded) or inner.axis != trimmed.axis:
        return None, {}
    if inner.uniform is None:
        return None, {}
    rank, iterations = (low_rank.rank, low_rank.iterations) if low_rank else (0, 1)
    code = BlockCode(inner.axis, *inner.uniform, inner.tokens, channels, entries, rank, iterations)
    return code, {"start": low_rank.start} if low_rank else {}


def _table(codec: NormTable | RangeTable | ChannelTable) -> dict[str, Tensor]:
    return {"middles": (codec.lut[1:] + codec.lut[:-1]) / 2, "lut": codec.lut, "decoded": codec.decoded}


def fast_payload(codec: Codec, fast: Fast, x: Tensor, source: Tensor | None, faults: Tensor) -> Payload:
    """What ``codec.encode`` gives for whole blocks ``x [B, H, n, D]``, where ``source`` int32 ``[B, n]`` says which
    token stands for each (-1: zeros)."""
    from rarefy.kernels.cuda import encode, encode_blocks

    if isinstance(fast.code, encode_blocks.BlockCode):
        return _blocks(encode_blocks.encode(fast.code, x, faults, source=source, **fast.tables))
    found = encode.encode(fast.code, x, faults, source=source, **fast.tables)
    blocks = x.shape[2] // codec.tokens
    parts = {
        "channel": {"scale": found.scale, "zero_point": found.zero},
        "token": {"scale": found.scale, "zero_point": found.zero},
        "range": {"scale": found.scale, "offset": found.zero},
        "norm": {"scale": found.scale},
        "float8": {"scale": found.scale},
        "row range": {"0.scale": found.scale, "0.offset": found.zero},
    }.get(fast.code.kind, {})
    parts["0.codes" if fast.code.rows else "codes"] = found.codes
    if fast.code.rows:
        parts |= {"1.values": found.values, "1.indices": found.indices}
    # All but the scales of channels are by token so far.
    by_block = ("scale", "zero_point") if fast.code.kind == "channel" else ()
    return {name: part if name in by_block else part.unflatten(2, (blocks, -1)) for name, part in parts.items()}


def _blocks(found: EncodedBlocks) -> Payload:
    """The payload of codes and of what corrects them, if anything does."""
    payload = {"0.codes": found.codes, "0.scale": found.scale, "0.zero_point": found.zero}
    corrections = [{"values": found.values, "indices": found.indices}] if found.values.shape[-1] else []
    if found.left.shape[-1]:
        corrections.append({"lowrank_a": found.left, "lowrank_b": found.right})
    for number, part in enumerate(corrections, 1):
        payload |= prefixed(str(number), part)
    return payload
