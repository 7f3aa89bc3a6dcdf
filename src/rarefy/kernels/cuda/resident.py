"""One token's way through a whole model as one launch of ``step.cu``: what it is told, and the launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.cuda import driver
from rarefy.kernels.cuda.layout import TILE
from rarefy.kernels.cuda.linear import pointed, status, terms_of
from rarefy.kernels.cuda.prepared import CODES, ENTRIES, Prepared, code_of
from rarefy.kernels.cuda.program import TYPES, Code
from rarefy.kernels.prepared import flat

SOURCE = Path(__file__).with_name("step.cu")
PLACES = (
    "codes", "scale", "zero", "table", "second", "entries", "row_ptr", "x", "gain", "k_gain", "bias", "y", "keys",
    "values", "turns",
)  # fmt: skip
NUMBERS = (
    "kind", "code", "rows", "columns", "steps", "groups", "units", "pair", "norm", "k_norm", "add", "activation",
    "window", "second_rows", "second_shift",
)  # fmt: skip
FACTORS = ("eps", "k_eps", "multiplier", "input_scale", "score_scale", "softcap")
PRODUCT, ATTENTION = range(2)
PLAIN, CENTRED = 1, 2  # norms
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
SHARED = 227 * 1024  # bytes of a block that stays alone
BATCH = 16  # tiles whose sums meet together
LEAST = 256  # positions of the cache that are worth a block
FLYING = 72 * 1024  # bytes that a block has on their way at most
BARRIER = 8  # bytes


class Phase(ctypes.Structure):
    """``Phase`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in PLACES),
        ("head_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in NUMBERS),
        *((name, ctypes.c_float) for name in FACTORS),
        ("filler", ctypes.c_int * 3),
    ]


PHASE = ctypes.sizeof(Phase)


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("phases", "position", "met", "heads_met", "part", "part_log", "times")),
        ("count", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Weights:
    """What a product multiplies by: the codes, their kind, and outliers where there are some. Tensors are kept."""

    code: Code
    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    multiplier: float
    entries: int  # most outliers that go with a piece

    @property
    def rows(self) -> int:
        return self.numbers["rows"]

    @property
    def steps(self) -> int:
        """Steps of columns of a tile."""
        return self.tensors["codes"].shape[1]

    def phase(self) -> dict[str, Any]:
        """What a phase says of them."""
        codes = self.tensors["codes"]
        grouped = (self.tensors.get(name) for name in ("scale", "table"))
        groups = next((each.shape[1] for each in grouped if each is not None), 1)
        found = {name: each.data_ptr() for name, each in self.tensors.items()}
        return {
            **found, "rows": self.rows, "columns": self.numbers["columns"], "steps": self.steps, "groups": groups,
            "units": codes.shape[0], "second_rows": self.numbers["second_rows"],
            "second_shift": self.numbers["second_groups"].bit_length() - 1, "multiplier": self.multiplier,
        }  # fmt: skip


def weights(parts: Sequence[Prepared], piece: int) -> Weights:
    """``parts``: a term of codes, with or without one of outliers; ``piece``: steps of a stage. Raises UnsupportedError
    for others."""
    terms = terms_of(*flat(parts)[:3])
    by_kind = {term[1]["kind"]: term for term in terms}
    if len(by_kind) < len(terms) or CODES not in by_kind or not set(by_kind) <= {CODES, ENTRIES}:
        raise UnsupportedError("A step in one launch takes weights of one term of codes, and outliers.")
    term = by_kind[CODES]
    code = replace(code_of(term[0], term[1]), ragged=True)  # what follows the last column is zeros here
    if code.bits not in (1, 2, 3, 4, 8) or code.span == 16 or code.table == "shared" or term[1]["columns"] % 8:
        raise UnsupportedError(f"A step in one launch does not read codes of {code.bits} bits that lie so.")
    if term[1]["second_groups"].bit_count() != 1:
        raise UnsupportedError("A step in one launch takes second-order scales of a power of two of groups.")
    own = {name: tensor for name, tensor in pointed(term, True).items() if tensor is not None}
    steps, entries = own["codes"].shape[1], 0
    if ENTRIES in by_kind:
        tensors, numbers, _ = by_kind[ENTRIES]
        code = replace(code, outliers=torch.float16 if numbers["half"] else torch.bfloat16)
        pointers = tensors["row_ptr"].flatten()
        tiles = own["codes"].shape[0]
        filled = pointers[-1:].expand(tiles * TILE + 4 - len(pointers))
        own["row_ptr"] = torch.cat([pointers, filled]).to(torch.int32).contiguous()
        own["entries"] = tensors["entries"]
        most = int(own["row_ptr"][: tiles * TILE + 1 : TILE].diff().max())
        entries = (-(-most // -(-steps // piece)) + 15) // 4 * 4
    return Weights(code, own, term[1], term[2], entries)


@dataclass(frozen=True)
class Form:
    """One compiled form of ``step.cu``. ``codes``: kinds of codes, and the most outliers that go with a piece of each;
    ``input``: bytes of the longest input."""

    codes: tuple[tuple[Code, int], ...]
    half: bool
    heads: int
    kv_heads: int
    channels: int
    blocks: int
    input: int
    warps: int
    each: int
    least: int = LEAST

    @property
    def splits(self) -> int:
        """Blocks that share the positions of a head of the cache at most."""
        return max(1, self.blocks // self.kv_heads)

    @property
    def threads(self) -> int:
        return 32 * (self.warps + 1)

    @property
    def stage(self) -> int:
        """Bytes of a piece of the ring."""
        cache = 4 * self.channels * (256 // self.channels)  # a warp's tokens at once
        return max(cache, *(_stage(code, entries, self.warps * self.each) for code, entries in self.codes))

    @property
    def work(self) -> int:
        """Bytes of all that is no ring."""
        members = self.heads // self.kv_heads
        attention = 4 * self.warps * members * (self.channels + 2) + 16
        return max(self.input + self.input_sums + BATCH * self.warps * TILE * 4, -(-attention // 128) * 128)

    @property
    def input_sums(self) -> int:
        """Bytes of the sums of the longest input over groups."""
        groups = [min(code.group or code.step, code.step) for code, _ in self.codes if not code.table]
        return -(-2 * self.input // min(groups) // 128) * 128 if groups else 0

    @property
    def stages(self) -> int:
        return (SHARED - self.work - 2 * PHASE) // (self.stage + 2 * BARRIER)

    @property
    def shared_memory(self) -> int:
        return self.work + 2 * PHASE + self.stages * (self.stage + 2 * BARRIER)

    def definitions(self) -> dict[str, Any]:
        """The macros of the source."""
        kinds = ",".join(
            f"Code<{code.bits},{code.group},{code.span},{('', 'shared', 'rows').index(code.table)},{TYPES[code.scale]},"
            f"{TYPES[code.zero]},{code.center},{TYPES[code.outliers]},{entries}>"
            for code, entries in self.codes
        )
        return {
            "CODES": kinds, "HALF": int(self.half), "WARPS": self.warps, "EACH": self.each, "STAGES": self.stages,
            "STAGE": self.stage, "INPUT": self.input, "INPUT_SUMS": self.input_sums, "WORK": self.work, "BATCH": BATCH,
            "HEADS": self.heads, "KV_HEADS": self.kv_heads, "CHANNELS": self.channels, "SPLITS": self.splits,
            "ONE_SPLITS": self.blocks // self.heads, "LEAST": self.least,
            "FLYING": min(FLYING // self.stage, self.stages - 1),
        }  # fmt: skip

    def check(self) -> None:
        """Raise UnsupportedError for what the source does not take."""
        if self.channels not in (16, 32, 64, 128, 256) or self.heads % self.kv_heads or self.heads // self.kv_heads > 8:
            raise UnsupportedError(f"A step in one launch takes no {self.heads} heads of {self.channels} channels.")
        if self.stages < 3:
            raise UnsupportedError("Weights of a step in one launch do not fit a multiprocessor's memory.")


_BYTES = {0: 0, 1: 64, 2: 32, 3: 32, 4: 16, 5: 64, 6: 16, 7: 16}  # of 16 numbers, by their type


def _stage(code: Code, entries: int, piece: int) -> int:
    parts = 1 if code.group == 0 or code.group > code.step else code.step // code.group
    groups = 1 if code.group == 0 else piece * parts
    if code.group > code.step:
        groups = (piece - 1) // (code.group // code.step) + 2
    table = 32 << code.bits if code.table == "rows" else 0
    each = _BYTES[TYPES[code.scale]] + _BYTES[TYPES[code.zero]] + table
    seconds = (groups // 2 + 2) * 16 if code.scale in ("bilevel", "level") else 0
    outliers = 80 + 4 * entries if code.outliers is not None else 0
    return -(-(piece * code.step * code.bits * 2 + groups * each + seconds + outliers) // 128) * 128


class Resident:
    """Phases of a step on one GPU, and all that they point to. Steps of one object follow each other."""

    def __init__(self, form: Form, phases: Sequence[dict[str, Any]], position: Tensor, kept: object = None):
        form.check()
        self.form, self.kept, self.position = form, kept, position
        device = position.device
        data = b"".join(bytes(Phase(**phase)) for phase in phases)
        self.phases = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        self.met = torch.zeros(2 + form.heads, dtype=torch.int32, device=device)
        parts = max(form.kv_heads * form.splits, form.blocks), form.heads // form.kv_heads
        self.part = torch.zeros(*parts, form.channels, device=device)
        self.part_log = torch.zeros(*parts, device=device)
        self.given = _Step(
            self.phases.data_ptr(), position.data_ptr(), self.met.data_ptr(), self.met.data_ptr() + 8,
            self.part.data_ptr(), self.part_log.data_ptr(), None, len(phases),
        )  # fmt: skip

    def __call__(self) -> None:
        """The step, on the current stream."""
        device = self.position.device
        program = _kernel(device.index or 0, self.form)
        stream = torch.cuda.current_stream(device).cuda_stream
        program((blocks_of(device), 1, 1), self.form.threads, self.given, stream, True)

    def timed(self) -> Tensor:
        """Where launches from now on leave cycles, int64 ``[phases, blocks, 3]``: when a block began a phase, had the
        input of a product, and was done."""
        blocks = blocks_of(self.position.device)
        self.times = torch.zeros(self.given.count, blocks, 3, dtype=torch.int64, device=self.position.device)
        self.given.times = self.times.data_ptr()
        return self.times


def blocks_of(device: torch.device) -> int:
    """All of a GPU's multiprocessors, a block on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(device: int, form: Form) -> driver.Kernel:
    macros = [f"-D{macro}={value}" for macro, value in form.definitions().items()]
    with torch.cuda.device(device):
        return driver.Kernel(SOURCE, "rarefy_step", macros, form.shared_memory)


def fits(device: torch.device) -> bool:
    """Whether a step can stay on this GPU: bulk copies and barriers that count bytes came with compute capability 9."""
    return status() == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
