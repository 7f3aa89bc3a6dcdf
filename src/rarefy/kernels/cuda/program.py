"""One compiled form of ``linear.cu``, ``gemm.cu`` or ``prompt.cu``: its macros, its arguments and its launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rarefy.kernels.cuda import driver
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.layout import TILE, step_of

SOURCE, GEMM, PROMPT = (Path(__file__).with_name(name) for name in ("linear.cu", "gemm.cu", "prompt.cu"))
SOURCES = {"gemm": GEMM, "arrange": GEMM, "prompt": PROMPT}  # of kernels that are not in SOURCE
TYPES: dict[Any, int] = {
    None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4,
    "pairs": 5, "bilevel": 6, "level": 7,
}  # fmt: skip
PLANES = 24  # bits of an activation that is multiplied by single bits
MULTIPLIERS = 2  # fours of warps that multiply what others unpack
HALF = 0.65  # of a tile's time, which half a tile takes, since as much is unpacked


@dataclass(frozen=True)
class Tuning:
    """How the work is cut up. A warp computes ``16 * tiles`` rows for ``8 * tokens`` tokens; a block has ``across``
    warps over rows times ``along`` warps over columns; ``split`` blocks share a row's columns. ``depth`` steps are
    loaded ahead into registers, or ``stages`` steps go through shared memory (0: none). ``stored``: all weights of a
    block go there at once, by bulk copies (of one token). ``overlap``: the kernel starts
    while its forerunner still runs; from 9.0 on. ``late``: it lets its successor do so only when it has read all.
    ``spread``: blocks of one token take the places of eight tokens. ``held``: an even number of tokens, at least as
    many as there are, whose activations wait in shared memory, where the product and outliers find them (0: none).
    ``room``: blocks that a multiprocessor is to have room for (0: as many as registers happen to leave).

    ``wide``: four warps multiply together (``gemm.cu``; compute capability 9.0), which takes stages, ``across`` a
    multiple of 4 and ``along`` 1. ``cluster`` neighbouring blocks then share what they read of the tokens; two fours of
    warps multiply ``in_turns``; ``rescaled``: sums are kept in units of the last scale (see ``Code.can_rescale``).

    ``unpackers``: fours of warps that unpack for two other fours, which multiply from shared memory (``prompt.cu``;
    ``wide`` too). ``stages`` are of 64 columns then, ``depth`` steps of codes come ahead, and ``tiles`` are those of a
    warp that unpacks."""

    tiles: int = 1
    tokens: int = 1
    across: int = 1
    along: int = 8
    depth: int = 2
    stages: int = 0
    split: int = 1
    wide: bool = False
    overlap: bool = False
    cluster: int = 1
    rescaled: bool = False
    spread: bool = False
    in_turns: bool = False
    late: bool = False
    stored: bool = False
    held: int = 0
    room: int = 0
    unpackers: int = 0

    MOST_SHARED: ClassVar[int] = 200 * 1024  # bytes of a block's shared memory

    def with_halves(self) -> Tuning:
        """With warps for each half of the rows, see ``Ending.kind``."""
        return self if self.across % 2 == 0 else replace(self, across=2 * self.across, along=max(1, self.along // 2))

    def holding(self, code: Code, tokens: int) -> Tuning:
        """With so many tokens held where a block has room for them."""
        more = replace(self, held=tokens + tokens % 2)
        plain = self.spread or self.wide or self.stages > 0 or not code.held
        return replace(self, held=0) if plain or more.shared_memory(code) > self.MOST_SHARED else more

    def beside(self, code: Code) -> int:
        """Blocks of columns that share the places of eight tokens, where each would want its own scale."""
        all_held = 0 < code.held < code.MOST_HELD and self.held in (2, 4)
        return 8 // self.held if all_held and code.shares_scales else 1

    @property
    def strip(self) -> int:
        """Tokens of a tile, or of half a tile where it may be halved (``unpackers``)."""
        return 4 * self.tokens if self.split == 1 and self.tokens % 16 == 0 else 8 * self.tokens

    @property
    def kernels(self) -> tuple[str, ...]:
        """What is launched, in this order."""
        if self.unpackers:
            return ("prompt",)
        return ("arrange", "gemm") if self.wide else ("linear",)

    @property
    def threads(self) -> int:
        if self.unpackers:
            return 128 * (MULTIPLIERS + self.unpackers)
        beside = 0 if not self.wide else 32 if self.across == 4 else 128  # that bring what the others multiply
        return 32 * self.across * self.along + beside

    def suits(self, code: Code) -> bool:
        """Whether four warps together multiply such a code so: sums in units of a scale want one, and outliers want
        warps that have nothing else to do and whole words of tokens."""
        if not self.wide or self.unpackers:
            return True
        outliers = code.outliers is None or (self.across > 4 and self.tokens in (2, 4, 8, 16))
        return outliers and (code.can_rescale or not self.rescaled)

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 64 * MULTIPLIERS if self.unpackers else TILE * self.tiles * self.across

    def shared_memory(self, code: Code) -> int:
        """Bytes of a block."""
        width = 8 * self.tokens
        table = code.table_bytes
        if self.unpackers:
            stages, meeting = self.stages * 128 * (self.rows + width), 4 * width * (self.rows + 4)
            staged = max(stages, meeting) if self.split > 1 else stages + MULTIPLIERS * min(32, width) * (2 * 64 + 16)
            coming = self.depth * self.rows // TILE * code.bytes_of_step
            return -(-table // 1024) * 1024 + staged + coming + 16 * self.stages
        if self.wide:
            sums = code.parts * width * 4 if code.sums else 0
            staged = self.stages * (2 * code.step * width + sums) + 16 * self.stages
            return table + max(staged, 4 * width * (self.rows + 4))
        tokens = width * (2 * code.step * self.along + (16 if code.span == 16 else 64))
        staged = self.stages * (tokens + self.rows * self.along * code.step * code.bits // 8)
        meeting = 4 * self.along * (1 if self.spread else width) * (self.rows + 4)
        if self.spread:
            planes = 2 * self.depth * self.along * (8 + 128 * PLANES // 8)
            places = planes if code.fits_planes else 2048 * self.across * self.along
            return table + -(-meeting // 16) * 16 + 16 + places + 2 * code.held
        alone = self.beside(code) == 4 and code.group == TILE  # lanes want what they form
        shares = 128 * code.parts * self.tiles * self.across * self.along if code.shares_scales and not alone else 0
        held = self.held * (2 * code.held + (32 if code.span == 4 else 64)) if code.held else 0
        return table + -(-max(staged, meeting) // 16) * 16 + shares + held


@dataclass(frozen=True)
class Ending:
    """What becomes of a product of up to 16 tokens, see ``ending.cuh``. ``normed``: tokens are still to be divided by
    their root mean squares. ``kind``: the second half of the rows is ``gated`` by the ``activation`` of the first; or
    the result is ``added`` to the residual stream, and what comes out is that times the gain of a norm, ``1 + gain`` if
    ``centred``."""

    normed: bool = False
    kind: Literal["", "gated", "added"] = ""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    centred: bool = False

    def definitions(self) -> dict[str, int]:
        """The macros of the source."""
        activation = ("silu", "gelu", "gelu_tanh", "relu").index(self.activation)
        kind = ("", "gated", "added").index(self.kind)
        return {"NORMED": int(self.normed), "ENDING": kind, "ACTIVATION": activation, "CENTRED": int(self.centred)}

    def shared_memory(self, tuning: Tuning) -> int:
        """Bytes of a block beside those of the product."""
        return 4 * 8 * tuning.tokens if self.normed else 0


PLAIN = Ending()
_NUMBERS = "rows columns steps groups tokens stride second_rows pitch parts quads".split()
_POINTERS = (
    "codes scale zero second table x arranged ones turned extra y partial arrived entries rest rest_ptr squares "
    "squared hidden gain"
).split()


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in _NUMBERS),
        ("multiplier", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


class Prompt(ctypes.Structure):
    """``Prompt`` of ``prompt.cu``: a tensor map lies at a multiple of 128 bytes."""

    _fields_ = [
        ("a", Arguments),
        ("whole", ctypes.c_int),
        ("between", ctypes.c_byte * (-(ctypes.sizeof(Arguments) + 4) % 128)),
        ("tokens", ctypes.c_byte * 128),
    ]


def definitions(code: Code, tuning: Tuning, half: bool, ending: Ending = PLAIN) -> dict[str, int]:
    """The macros of the source."""
    names = (field.name for field in fields(tuning) if field.name != "overlap")
    found = {name.upper(): int(getattr(tuning, name)) for name in names}
    found.update(
        BITS=code.bits, GROUP=code.group, SPAN=code.span, STEP=code.step, CENTER=code.center,
        TABLE=("", "shared", "rows").index(code.table),
        SCALE=TYPES[code.scale], ZERO=TYPES[code.zero], OUTLIERS=TYPES[code.outliers],
        HALF=int(half),
        STAGED=int(tuning.stages > 0), FLOAT8=int(code.float8), SECOND_GROUPS=code.second_groups,
        HELD=tuning.held if code.held else 0, BESIDE=tuning.beside(code), HELD_COLUMNS=code.held, QUADS=code.quads,
        RAGGED=int(code.ragged), PLANES=PLANES, IN_PLANES=int(tuning.spread and code.fits_planes),
        **ending.definitions(),
    )  # fmt: skip
    return found


def arguments(
    tensors: Mapping[str, Tensor | None], *, rows: int, columns: int, tokens: int = 0, stride: int = 0,
    second_rows: int = 1, multiplier: float = 1.0, eps: float = 0.0,
) -> Arguments:  # fmt: skip
    """``tensors``: ``codes [tiles, steps, loads, 32, 4]`` or bytes ``[rows, pitch]``, ``scale`` and ``zero [tiles,
    groups, 8, 2]`` of layout.py, ``x [tokens, columns]`` with rows ``stride`` apart, ``y [tokens, rows]`` and so on
    (see ``codes.cuh``); what is absent is a null pointer. ``second_rows``: how many tiles share second-order
    numbers."""
    codes = tensors["codes"]
    assert codes is not None
    grouped = (tensors.get(name) for name in ("scale", "table"))
    groups = next((each.shape[1] for each in grouped if each is not None and each.dim() > 1), 1)
    pointers = [0 if (own := tensors.get(name)) is None else own.data_ptr() for name in _POINTERS]
    steps, pitch = codes.shape[1], 0
    if codes.dim() == 2:  # bytes as they are stored
        steps, pitch = -(-columns // step_of(8)), codes.shape[1]
    squares = tensors.get("squares")
    parts = 0 if squares is None else squares.shape[1]
    entries = tensors.get("entries")
    quads = 0 if entries is None else entries.shape[1]
    sizes = (rows, columns, steps, groups, tokens, stride, second_rows, pitch, parts, quads)
    return Arguments(*pointers, *sizes, multiplier, eps)


def grid(tuning: Tuning, rows: int, tokens: int) -> tuple[int, int, int]:
    """Blocks over rows, columns and tokens."""
    across = -(-rows // (tuning.rows * tuning.cluster)) * tuning.cluster
    return across, tuning.split, -(-tokens // (8 * tuning.tokens))


def tiles(tuning: Tuning, rows: int, tokens: int, processors: int) -> tuple[int, int, float]:
    """Of ``prompt.cu`` on so many ``processors``: blocks, tiles that are not taken in halves, and how many whole tiles
    take as long as the block that has most to do."""
    across = -(-rows // tuning.rows)
    strips, halves = -(-tokens // tuning.strip), 8 * tuning.tokens // tuning.strip
    full, more = across * (strips // halves), across * (strips % halves)
    if tuning.split > 1:
        return full, full, -(-full * tuning.split // processors)

    def longest(whole: int) -> float:  # the first block's
        units = range(0, whole + halves * (full - whole) + more, processors)
        return sum(1 if unit < whole or halves == 1 else HALF for unit in units)

    whole = min(full, full // processors * processors, key=longest) if halves > 1 else full
    return min(processors, whole + halves * (full - whole) + more), whole, longest(whole)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


MOST_STORED = 225 * 1024  # bytes of a block's shared memory where all of its weights go there


def stored_memory(code: Code, tuning: Tuning, columns: int, quads: int) -> int:
    """Bytes of a block's shared memory for its weights."""
    return 160 + tuning.tiles * tuning.across * code.tile_bytes(columns, tuning.split, quads) if tuning.stored else 0


def shared_memory(name: str, code: Code, tuning: Tuning, ending: Ending = PLAIN) -> int:
    """Bytes of a block of ``rarefy_<name>``, beside those of ``stored_memory``."""
    if name == "arrange":
        return 0
    if name.startswith("dequantize"):
        return code.table_bytes + tuning.threads // 32 * TILE * (2 * code.step + 64)
    return tuning.shared_memory(code) + ending.shared_memory(tuning)


@functools.cache
def kernel(
    device: int, name: str, code: Code, tuning: Tuning, half: bool, ending: Ending = PLAIN
) -> driver.Kernel:
    """``rarefy_<name>`` of the source for ``device``, compiled once in a process. Raises UnsupportedError where that
    fails."""
    macros = [f"-D{macro}={value}" for macro, value in definitions(code, tuning, half, ending).items()]
    shared = shared_memory(name, code, tuning, ending)
    with torch.cuda.device(device):
        return driver.Kernel(SOURCES.get(name, SOURCE), f"rarefy_{name}", macros, shared, MOST_STORED * tuning.stored)


def linear(
    code: Code, tuning: Tuning, given: Arguments, half: bool, device: torch.device, ending: Ending = PLAIN
) -> None:
    """The product, on the current stream of ``device``."""
    stream = torch.cuda.current_stream(device).cuda_stream
    for name, program in compiled(code, tuning, half, device, ending).items():
        if name == "arrange":
            program(arranging(code, tuning, given), ARRANGING, given, stream, tuning.overlap)
        elif name == "prompt":
            blocks, whole, _ = tiles(tuning, given.rows, given.tokens, processors(device))
            own = Prompt(a=given, whole=whole)
            own.tokens[:] = driver.tensor_map(given.x, given.tokens, given.columns, given.stride, tuning.strip)
            program((blocks, tuning.split, 1), tuning.threads, own, stream, tuning.overlap)
        else:
            stored = stored_memory(code, tuning, given.columns, given.quads)
            program(grid(tuning, given.rows, given.tokens), tuning.threads, given, stream, tuning.overlap, stored)


def compiled(
    code: Code, tuning: Tuning, half: bool, device: torch.device, ending: Ending = PLAIN
) -> dict[str, driver.Kernel]:
    """The kernels of a product by their names. Raises UnsupportedError where one does not compile."""
    own = replace(tuning, overlap=False)
    return {name: kernel(index_of(device), name, code, own, half, ending) for name in tuning.kernels}


ARRANGING = 128  # threads of a block


def arranging(code: Code, tuning: Tuning, given: Arguments) -> tuple[int, int, int]:
    """Blocks that arrange tokens."""
    width = 8 * tuning.tokens
    threads = -(-given.tokens // width) * given.steps * (code.step // 32) * width
    return -(-threads // ARRANGING), 1, 1


def dequantize(code: Code, given: Arguments, half: bool, device: torch.device, to_bytes: bool = False) -> None:
    """The weight at ``y [rows, columns]``, on the current stream of ``device``; or in bytes of E4M3, with the steps of
    its rows at ``partial [rows]``, which takes codes that are ``plain_numbers``."""
    tuning, name = Tuning(), "dequantize_to_bytes" if to_bytes else "dequantize"
    program = kernel(index_of(device), name, code, tuning, half or to_bytes)
    units = -(-given.rows // TILE) * -(-given.steps // code.steps_of_warp)
    stream = torch.cuda.current_stream(device).cuda_stream
    program((-(-units * 32 // tuning.threads), 1, 1), tuning.threads, given, stream)


def quantize(x: Tensor, gain: Tensor | None, eps: float, codes: Tensor, step: Tensor) -> None:
    """``x [tokens, columns]`` as E4M3, on the current stream of its device; see ``kernels/activations.py``."""
    code, tuning = Code(8, span=16, float8=True), Tuning()
    given = arguments(
        {"codes": codes, "scale": gain, "x": x, "y": codes, "partial": step}, rows=0, columns=x.shape[1],
        tokens=x.shape[0], stride=x.stride(0), multiplier=eps,
    )  # fmt: skip
    program = kernel(index_of(x.device), "quantize", code, tuning, x.dtype == torch.float16)
    program((x.shape[0], 1, 1), tuning.threads, given, torch.cuda.current_stream(x.device).cuda_stream)


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def workspace(
    code: Code, tuning: Tuning, rows: int, columns: int, tokens: int, device: torch.device
) -> dict[str, Tensor]:
    """Memory beside the product's own tensors. For blocks that share columns: partial sums, and counters that are zero
    before and after; for four warps that multiply together: the tokens as they want them, and their sums by group."""
    found: dict[str, Tensor] = {}
    if tuning.unpackers:
        return found
    across, _, deep = grid(tuning, rows, tokens)
    if tuning.split > 1 and not tuning.wide:
        found["partial"] = torch.empty(tuning.split, tokens, rows, dtype=torch.float32, device=device)
        found["arrived"] = _counters(device, across * deep)
    if tuning.wide:
        steps, width = -(-columns // code.step), 8 * tuning.tokens
        found["arranged"] = torch.empty(deep, steps, code.step // 8, width, 8, dtype=torch.int16, device=device)
        if code.sums:
            found["ones"] = torch.empty(deep, steps, code.parts, width, dtype=torch.float32, device=device)
        if code.outliers is not None:
            found["turned"] = torch.empty(deep, steps * code.step, width, dtype=torch.int16, device=device)
            found["extra"] = torch.empty(deep, rows, width, dtype=torch.float32, device=device)
    return found


_arrived: dict[Any, list[Tensor]] = {}
_COUNTERS = 1 << 14


def _counters(device: torch.device, count: int) -> Tensor:
    """Counters of this device and stream: kernels of a stream follow each other, and each leaves them at zero.

    All graphs share counters that were made before they were captured, so two of them must not be replayed at the same
    time. A capture that no call came before makes its own, which every replay sets to zero. Those that have become too
    few are kept, since a graph may count in them.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        known = _arrived.get((device, "graphs"), [])
        if known and known[-1].numel() >= count:
            return known[-1]
        return torch.zeros(count, dtype=torch.int32, device=device)
    for key in ((device, "graphs"), (device, torch.cuda.current_stream(device).cuda_stream)):
        found = _arrived.setdefault(key, [])
        if not found or found[-1].numel() < count:
            found.append(torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=device))
    return found[-1]
