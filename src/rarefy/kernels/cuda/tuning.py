"""How work is cut up on a GPU: from the table that ``rarefy tune`` measured there, or by rule."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from rarefy.core.files import write_text
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.program import (
    MOST_STORED,
    PLAIN,
    Ending,
    Tuning,
    processors,
    shared_memory,
    stored_memory,
    tiles,
)
from rarefy.sources.cache import cache_root

FOLDER = Path(__file__).with_name("tables")
KEY = ("bits", "table", "outliers", "small", "group", "zero", "rows", "columns", "tokens")  # of a measurement
ALIKE = 2.0  # how many times larger or longer a measured size may be
MOST_SHARED = Tuning.MOST_SHARED
MOST_SHARED_WIDE = 226 * 1024  # where four warps can multiply together
MOST_STAGES = 8
NARROW = 8192  # rows that are too few blocks unless more warps share a row
BLOCKS = 132  # that keep a large GPU busy
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens that are told apart; more are prompts
PROMPTS = {32: 1, 24: 2}  # fours of warps that unpack, by 8 tokens of a tile
ENDS = 3000, 8000  # cycles to begin and end a tile of a prompt, alone and where blocks share columns
ONE_KERNEL = (2, 4, 8)  # of which the kernel is the same, so that what was measured for one of them serves the others


def choose(code: Code, rows: int, columns: int, tokens: int, device: torch.device) -> Tuning:
    """What to compile for ``tokens`` of ``columns`` against ``rows``."""
    many = tokens > BUCKETS[-1] and code.outliers is None and torch.cuda.get_device_capability(device) == (9, 0)
    if many and rows <= NARROW:
        return of_prompt(code, rows, columns, tokens, processors(device))
    bucket = next((each for each in BUCKETS if tokens <= each), BUCKETS[-1])
    found = _chosen(code, rows, columns, bucket, _name(device), torch.cuda.get_device_capability(device))
    return found if can_be_stored(code, found, columns) else replace(found, stored=False)


def choose_with(
    ending: Ending, code: Code, rows: int, columns: int, tokens: int, device: torch.device
) -> Tuning:
    """As ``choose`` for a product with an ending, of up to 16 tokens. It is one of a step's, in which it always pays to
    begin before its forerunner has ended."""
    found = choose(code, rows, columns, tokens, device)
    if ending == PLAIN:
        return found
    found = replace(found, overlap=overlaps(device))
    if found.wide:
        found = by_rule(code, rows, columns, tokens, torch.cuda.get_device_capability(device))
    halves = found.with_halves() if ending.kind == "gated" else found
    return halves if can_be_stored(code, halves, columns, ending) else replace(halves, stored=False)


def can_be_stored(code: Code, tuning: Tuning, columns: int, ending: Ending = PLAIN) -> bool:
    """Whether a block has room for its weights, if they are to be ``stored``."""
    nbytes = shared_memory("linear", code, tuning, ending) + stored_memory(code, tuning, columns, code.quads)
    return not tuning.stored or (code.can_be_stored(columns, tuning.split) and nbytes <= MOST_STORED)


@functools.cache
def _chosen(
    code: Code, rows: int, columns: int, bucket: int, name: str, capability: tuple[int, int]
) -> Tuning:
    wanted = {"bits": code.bits, "table": code.table}
    known = [entry for entry in table(name, capability) if all(entry[key] == value for key, value in wanted.items())]
    serving = ONE_KERNEL if bucket in ONE_KERNEL else (bucket,)
    known = [entry for entry in known if entry["tokens"] in serving]
    kind = _kind(code)
    alike = [entry for entry in known if all(entry.get(key, False) == kind[key] for key in kind)]
    known = alike or [entry for entry in known if not kind["small"]]  # small groups are another kernel

    # The nearest size by the number of weights, then by proportion; one of another order says nothing.
    def distance(entry: dict[str, Any]) -> tuple[float, float, float]:
        ratios = [
            entry["rows"] * entry["columns"] / (rows * columns), entry["rows"] / entry["columns"] / (rows / columns),
            entry["tokens"] / bucket,
        ]  # fmt: skip
        size, shape, count = (max(each, 1 / each) for each in ratios)
        return size, shape, count

    details = _details(code)
    same = [entry for entry in known if all(entry.get(key) == details[key] for key in details)]
    for entries in (same, known):
        nearest = min((entry for entry in entries if max(distance(entry)[:2]) <= ALIKE), key=distance, default=None)
        if nearest is not None:
            measured = Tuning(**nearest["tuning"])
            found = measured if alike and not measured.wide else fitted(code, measured)
            found = found.holding(code, bucket) if found.held else found
            if found.suits(code) and found.shared_memory(code) <= (MOST_SHARED_WIDE if found.wide else MOST_SHARED):
                return found
    return by_rule(code, rows, columns, bucket, capability)


def by_rule(code: Code, rows: int, columns: int, tokens: int, capability: tuple[int, int]) -> Tuning:
    """A fair choice where nobody measured."""
    wide, overlap = capability == (9, 0), capability >= (9, 0)
    if tokens == 1:
        return fitted(code, _of_one_token(code, rows, overlap))
    if tokens <= 16:
        return _of_few_tokens(code, rows, tokens, overlap)
    if wide:
        return _wide(code, rows, tokens)
    at_once = min(8, -(-tokens // 8))
    blocks = -(-rows // 64) * -(-tokens // (8 * at_once))
    split = next((each for each in (1, 2, 4) if blocks * each >= BLOCKS), 4)
    own = Tuning(1, at_once, across=4, along=1, depth=1, stages=4, split=split, overlap=overlap)
    fitting = (replace(own, stages=stages) for stages in (4, 3, 2))
    return next((each for each in fitting if each.shared_memory(code) <= MOST_SHARED), replace(own, stages=2))


def _of_one_token(code: Code, rows: int, overlap: bool) -> Tuning:
    """The rule for one token: about as many bytes on their way for each number of bits, and more warps to a row where
    there are few rows."""
    few = code.step * code.bits // 256 < 2  # loads of a step
    small = code.parts > 4
    if code.fits_planes:
        if rows <= NARROW:
            return Tuning(2, along=8, depth=2, spread=True, overlap=overlap)
        return Tuning(4, along=4, depth=4, spread=True, overlap=overlap, stored=overlap)
    if rows <= NARROW:
        own = Tuning(along=8 if small else 16, depth=2 if small else 1, spread=True, overlap=overlap)
        return replace(own, stored=overlap and few)
    tiles = 4 if few else 2 if small else 1
    # Two-level scales of small groups would take all registers for one block.
    room = 2 if tiles == 2 and code.scale == "bilevel" else 0
    return Tuning(tiles=tiles, depth=1 if few or small else 2, spread=True, overlap=overlap, room=room)


def _of_few_tokens(code: Code, rows: int, tokens: int, overlap: bool) -> Tuning:
    """The rule for 2 to 16 tokens. Where tokens are held, warps over rows share them, the more the more these are."""
    narrow, own = rows <= NARROW, Tuning(tokens=-(-tokens // 8), depth=1, overlap=overlap)
    if code.shares_scales:
        across, along = ((4, 4) if narrow else (8, 2)) if tokens > 8 else (2, 8 if narrow else 4)
        held = replace(own, across=across, along=along).holding(code, tokens)
        return held if held.held or tokens <= 8 else replace(own, across=2, along=4, depth=2)
    own = replace(own, tiles=2 if code.step * code.bits // 256 < 2 else 1, along=16 if narrow and tokens <= 8 else 8)
    return own.holding(code, tokens) if tokens <= 4 else own  # of more, outliers of large groups gain nothing by it


def _wide(code: Code, rows: int, tokens: int) -> Tuning:
    """The rule where four warps can multiply together: about as many blocks as the GPU has processors."""
    own = Tuning(1, min(16, widths(tokens)[0]), across=8, along=1, stages=MOST_STAGES, wide=True, overlap=True)
    most = replace(own, tokens=32, rescaled=True, in_turns=True)
    few = replace(own, across=4, stages=stages_of(own.tokens, 4), split=4, rescaled=code.can_rescale and tokens > 32)
    if rows <= NARROW and tokens <= 64 and few.suits(code):
        return fitted(code, few)
    if rows <= NARROW and 64 < tokens <= 128:
        own = replace(own, tokens=8)
    elif rows > NARROW and tokens > 128 and most.suits(code) and code.step == 128:  # as much as shared memory holds
        own = most
    blocks = -(-rows // own.rows) * -(-tokens // (8 * own.tokens))
    split = next((each for each in (1, 2, 4) if blocks * each >= 0.6 * BLOCKS), 4)
    return fitted(code, replace(own, split=split))


@functools.lru_cache(maxsize=1 << 12)
def of_prompt(code: Code, rows: int, columns: int, tokens: int, processors: int) -> Tuning:
    """The rule for prompts: what should take the fewest cycles on so many ``processors``."""

    def cycles(tuning: Tuning) -> float:
        of_stage = 32 * tuning.tokens  # of the tensor cores, which are all that counts
        _, _, longest = tiles(tuning, rows, tokens, processors)
        return longest * (-(-columns // 64) / tuning.split * of_stage + ENDS[tuning.split > 1])

    every = (
        Tuning(2 // fours, at_once, stages=MOST_STAGES, split=split, wide=True, overlap=True, unpackers=fours)
        for at_once, fours in PROMPTS.items() for split in (1, 2)
    )  # fmt: skip
    return fitted(code, min(every, key=cycles))


def widths(tokens: int) -> list[int]:
    """How many times 8 tokens a block of four warps together may take, likelier ones first."""
    if tokens > 128:
        return [32, 16, 8]
    first = next(each for each in (2, 4, 8, 16) if 8 * each >= tokens)
    return [first, first // 2] if first > 4 else [first]


def stages_of(at_once: int, across: int) -> int:
    """Steps of tokens in shared memory, at most: where a block has four warps, a processor takes three."""
    return MOST_STAGES if across > 4 else max(2, min(6, 32 // at_once))


def fits_registers(tuning: Tuning) -> bool:
    """Whether the sums of four warps together stay in registers."""
    return tuning.tiles * tuning.tokens <= (32 if tuning.rescaled else 16)


def fitted(code: Code, tuning: Tuning) -> Tuning:
    """With as many steps on their way as registers and, for four warps together, shared memory have room for; small
    groups are scaled so often that several steps would be long programs."""
    small = code.parts > 4
    if tuning.unpackers:
        return _fitted_prompt(code, tuning)
    if not tuning.wide:
        return replace(tuning, depth=1) if small and not tuning.spread else tuning
    roomy = tuning.tokens <= 8 and code.outliers is None  # whose warps need registers too
    depth = 1 if small else 4 if roomy else 3 if tuning.tokens == 16 and tuning.rescaled else 2
    every = (replace(tuning, stages=stages, depth=depth) for stages in range(tuning.stages, 1, -1))
    return next((each for each in every if each.shared_memory(code) <= MOST_SHARED_WIDE), replace(tuning, stages=2))


def _fitted_prompt(code: Code, tuning: Tuning) -> Tuning:
    """As much as shared memory has room for: stages enough to hide what unpacking waits for, then codes that come from
    far, then more stages."""
    depths = (3, 2) if code.step == 128 else (2,)
    every = (
        replace(tuning, stages=stages, depth=depth)
        for least in (4, 3) for depth in (*depths, 1) for stages in range(tuning.stages, least - 1, -1)
    )  # fmt: skip
    fits = (each for each in every if each.shared_memory(code) <= MOST_SHARED_WIDE)
    return next(fits, replace(tuning, stages=3, depth=1))


@functools.cache
def table(name: str, capability: tuple[int, int]) -> list[dict[str, Any]]:
    """Measured entries: those of this machine, else of this GPU, and of what it lacks those of GPUs of this compute
    capability."""
    here = _own(name)
    if here.is_file():
        return _read(here)["entries"]
    files = sorted(FOLDER.glob("*.json"), key=lambda path: path.stem == name)
    found = [data["entries"] for path in files if tuple((data := _read(path))["capability"]) == capability]
    return list({_key(entry): entry for entries in found for entry in entries}.values())


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(key, False) for key in KEY)


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return data


def keep(entries: list[dict[str, Any]], device: torch.device) -> Path:
    """Put ``entries`` into the table of this machine, in the place of those of the same product; returns its path."""
    name = _name(device)
    path = _own(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        capability = torch.cuda.get_device_capability(device)
        merged = {_key(each): each for each in (*table(name, capability), *entries)}
        write_text(path, json.dumps({"capability": capability, "entries": list(merged.values())}, indent=1) + "\n")
    table.cache_clear()
    _chosen.cache_clear()
    return path


def entry(code: Code, rows: int, columns: int, tokens: int, tuning: Tuning) -> dict[str, Any]:
    """What a table says of one measurement."""
    own = {**_kind(code), **_details(code), "rows": rows, "columns": columns, "tokens": tokens}
    return {**own, "tuning": asdict(tuning)}


def _kind(code: Code) -> dict[str, Any]:
    """What of a code its measurements are known by; entries do not have to say what is false."""
    return {
        "bits": code.bits, "table": code.table, "outliers": code.outliers is not None, "small": code.parts > 4,
    }  # fmt: skip


def _details(code: Code) -> dict[str, Any]:
    """In what else its measurements differ: those of a code that differs only so do where there are no others."""
    return {"group": code.group, "zero": code.zero is not None}


def _own(name: str) -> Path:
    return cache_root() / "kernels" / f"{name}.json"


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may load its weights while its forerunner still runs (compute capability 9 and later)."""
    return torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")
