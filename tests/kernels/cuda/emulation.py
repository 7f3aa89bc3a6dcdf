"""Kernels of ``kernels/cuda`` run by this processor, a block after another; see emulator.h."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rarefy.kernels.cuda import attend, encode, encode_blocks, kept, program, unrotate
from rarefy.kernels.cuda import attend_token as token
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.linear import aligned, pointed, pointed_entries, pointed_sparse, terms_of
from rarefy.kernels.cuda.prepared import code_of, sparse_code_of
from rarefy.kernels.prepared import Prepared, flat

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
KEPT = HERE.parents[2] / ".pytest_cache" / "emulated"

FLAGS = ["-std=c++17", "-Og", "-fPIC", "-w", "-Wno-psabi"]  # compiles no slower than -O0, and runs twice as fast


@functools.cache
def _standard() -> Path:
    """The headers of the standard library that every kernel includes here, parsed once for all of them."""
    folder = Path(tempfile.mkdtemp(prefix="rarefy-emulated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    header = folder / "standard.h"
    lines = (HERE / "emulator.h").read_text("utf-8").splitlines()
    header.write_text("".join(f"{line}\n" for line in lines if line.startswith("#include <")))
    subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
    return header


@functools.cache
def _library(macros: tuple[str, ...], source: Path = program.SOURCE) -> ctypes.CDLL:
    assert COMPILER is not None
    kept = _kept() / f"{hashlib.sha256(repr((macros, source.name)).encode()).hexdigest()[:32]}.so"
    if not kept.is_file():
        given = [*FLAGS, *macros, f'-DKERNEL_SOURCE="{source}"', "-shared", "-include", str(_standard())]
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            path = Path(folder) / "kernel.so"
            subprocess.run([COMPILER, *given, str(HERE / "emulated.cpp"), "-o", str(path)], check=True)
            path.replace(kept)
    return ctypes.CDLL(str(kept))


@functools.cache
def _kept() -> Path:
    """Where kernels lie that this or another process of tests compiled, a second or more for each; those that were made
    of other sources go."""
    digest = hashlib.sha256(repr((COMPILER, FLAGS)).encode())
    for path in sorted((*program.SOURCE.parent.glob("*.cu*"), *HERE.glob("emulat*.[ch]*"))):
        digest.update(path.name.encode() + path.read_bytes())
    own = KEPT / digest.hexdigest()[:16]
    for other in KEPT.glob("*"):
        if other != own:
            shutil.rmtree(other, ignore_errors=True)
    return own


def _run(
    name: str, code: Code, tuning: program.Tuning, half: bool, given: program.Arguments | program.Prompt,
    grid: tuple[int, int, int], ending: program.Ending = program.PLAIN,
) -> None:  # fmt: skip
    macros = [f"-D{macro}={value}" for macro, value in program.definitions(code, tuning, half, ending).items()]
    run = _library(tuple(macros), program.SOURCES.get(name, program.SOURCE)).run
    which = {"dequantize": 1, "arrange": 1, "quantize": 2, "dequantize_to_bytes": 3}.get(name, 0)
    threads = program.ARRANGING if name == "arrange" else tuning.threads
    stored = program.stored_memory(code, tuning, given.columns, given.quads) if name == "linear" else 0
    run(which, ctypes.byref(given), *grid, threads, program.shared_memory(name, code, tuning, ending) + stored)


def program_linear(
    code: Code, tuning: program.Tuning, given: program.Arguments, half: bool, device: torch.device,
    ending: program.Ending = program.PLAIN,
) -> None:  # fmt: skip
    """In the place of ``program.linear``, for one kernel."""
    _run("linear", code, tuning, half, given, program.grid(tuning, given.rows, given.tokens), ending)


def linear(x: Tensor, prepared: Sequence[Prepared], tuning: program.Tuning, most: int = 1 << 30) -> Tensor:
    """``x [tokens, columns]`` times a term of codes, with or without one of outliers, by at most so many blocks,
    which are also the tiles of prompts that are not halved."""
    (codes, *lists), half, tokens = terms_of(*flat(prepared)[:3]), x.dtype == torch.float16, x.shape[0]
    tensors, numbers, multiplier = codes
    code, rows, own = code_of(tensors, numbers), numbers["rows"], pointed(codes, half)
    for entries, more, _ in lists:
        dtype = torch.float16 if more["half"] else torch.bfloat16
        code = code.with_outliers(dtype, x.shape[1], entries["entries"].shape[1])
        own.update(pointed_entries(entries))
    x, y = aligned(x), torch.full((tokens, rows), torch.nan, dtype=x.dtype)
    grid = program.grid(tuning, rows, tokens)
    work = program.workspace(code, tuning, rows, x.shape[1], tokens, x.device)
    given = program.arguments(
        {**own, **work, "x": x, "y": y}, rows=rows, columns=x.shape[1], tokens=tokens,
        stride=x.stride(0), second_rows=numbers["second_rows"], multiplier=multiplier,
    )  # fmt: skip
    if tuning.unpackers:
        box = struct.pack("QqIII", x.data_ptr(), x.stride(0), tokens, x.shape[1], tuning.strip)
        prompt = program.Prompt(a=given, whole=most)
        prompt.tokens[: len(box)] = box
        blocks, _, _ = program.tiles(tuning, rows, tokens, 132)
        _run("prompt", code, tuning, half, prompt, (min(blocks, most), tuning.split, 1))
        return y
    if tuning.wide:
        _run("arrange", code, tuning, half, given, program.arranging(code, tuning, given))
    _run("gemm" if tuning.wide else "linear", code, tuning, half, given, grid)
    assert "arrived" not in work or not work["arrived"].any()
    return y


def dequantize(prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """The weight of a term of codes, ``[rows, columns]``."""
    (codes,), half = terms_of(*flat([prepared])[:3]), dtype == torch.float16
    tensors, numbers, multiplier = codes
    weight = torch.full((numbers["rows"], numbers["columns"]), torch.nan, dtype=dtype)
    given = program.arguments(
        {**pointed(codes, half), "y": weight}, rows=numbers["rows"], columns=numbers["columns"],
        second_rows=numbers["second_rows"], multiplier=multiplier,
    )  # fmt: skip
    tuning = program.Tuning()
    code = code_of(tensors, numbers)
    units = -(-numbers["rows"] // 16) * -(-given.steps // code.steps_of_warp)
    _run("dequantize", code, tuning, half, given, (-(-units * 32 // tuning.threads), 1, 1))
    return weight


def dequantize_to_bytes(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The weight of a term of integers in E4M3, and the steps of its rows."""
    ((tensors, numbers, _),) = terms = terms_of(*flat([prepared])[:3])
    rows, columns = numbers["rows"], numbers["columns"]
    weight = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    step = torch.full((rows,), torch.nan)
    given = program.arguments(
        {**pointed(terms[0], True), "y": weight, "partial": step}, rows=rows, columns=columns,
        second_rows=numbers["second_rows"],
    )  # fmt: skip
    tuning, code = program.Tuning(), code_of(tensors, numbers)
    blocks = -(-rows // 16) * -(-given.steps // code.steps_of_warp) * 32 // tuning.threads + 1
    _run("dequantize_to_bytes", code, tuning, True, given, (blocks, 1, 1))
    return weight, step


def quantize_tokens(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """As ``kernels/activations.py`` says."""
    codes, step = torch.zeros(x.shape, dtype=torch.uint8), torch.full(x.shape[:1], torch.nan)
    given = program.arguments(
        {"codes": codes, "scale": gain, "x": x, "y": codes, "partial": step}, rows=0, columns=x.shape[1],
        tokens=x.shape[0], stride=x.stride(0), multiplier=eps,
    )  # fmt: skip
    code, tuning = Code(8, span=16, float8=True), program.Tuning()
    _run("quantize", code, tuning, x.dtype == torch.float16, given, (x.shape[0], 1, 1))
    return codes.view(torch.float8_e4m3fn), step


def sparse(x: Tensor, prepared: Prepared) -> Tensor:
    """``x [tokens, columns]`` times a term of kept weights."""
    (term,), half, tokens = terms_of(*flat([prepared])[:3]), x.dtype == torch.float16, x.shape[0]
    code, x, y = sparse_code_of(*term[:2]), aligned(x), torch.full((tokens, prepared.rows), torch.nan, dtype=x.dtype)
    given = kept.arguments(pointed_sparse(term), x, y, term[2])
    most = kept.at_once(tokens)
    shared = code.shared_memory(most, x.shape[1])
    macros = [f"-D{macro}={value}" for macro, value in code.definitions(most, half).items()]
    library = _library((*macros, f"-DENTRY={code.entry}"), code.source)
    library.run(0, ctypes.byref(given), *code.grid(prepared.rows, 2), 32 * code.warps, shared)
    return y


def attention(
    whole: attend.CodedAttention, query: Tensor, scaling: float, exact: attend.Exact | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ``query [B, Hq, D]`` over runs in code and what is exact."""
    code = whole.program(query.dtype, exact)
    macros = [f"-D{macro}={value}" for macro, value in code.definitions().items()]
    library = _library((*macros, "-DENTRY=rarefy_attend"), attend.SOURCE)
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:2], torch.nan)
    given = whole.arguments(query, scaling, exact, out, lse)
    for _ in range(2):  # the second finds its counters as the first did
        library.run(0, ctypes.byref(given), *whole.grid, code.threads, code.shared_memory)
    return out, lse


def encoded(code: encode.Code, x: Tensor, **tables: Tensor | None) -> tuple[encode.Encoded, Tensor]:
    """Codes of ``x [B, H, tokens, D]``, and what is wrong with it."""
    assert code.fits
    to, faults = encode.empty(code, x), torch.zeros(1, dtype=torch.int32)
    given = encode.arguments(x, to, faults, tables)
    macros = [f"-D{macro}={value}" for macro, value in code.definitions(x.dtype).items()]
    library = _library((*macros, f"-DENTRY={code.entry}"), code.source)
    library.run(0, ctypes.byref(given), *code.grid(x), code.threads, code.shared_memory)
    return to, faults


def encoded_blocks(
    code: encode_blocks.BlockCode, x: Tensor, **tables: Tensor | None
) -> tuple[encode_blocks.EncodedBlocks, Tensor]:
    """Whole blocks ``x [B, H, tokens, D]`` in code, and what is wrong with them."""
    assert code.fits
    to, faults = encode_blocks.empty(code, x), torch.zeros(1, dtype=torch.int32)
    given = encode_blocks.arguments(x, to, faults, **tables)
    macros = [f"-D{macro}={value}" for macro, value in code.definitions(x.dtype).items()]
    library = _library((*macros, f"-DENTRY={code.entry}"), code.source)
    library.run(0, ctypes.byref(given), *code.grid(x), code.threads, code.shared_memory)
    return to, faults


def attend_token(form: token.Form, grid: tuple[int, int, int], given: token.Arguments) -> None:
    """In the place of the launch of ``attend_token.cu``."""
    macros = [f"-D{macro}={value}" for macro, value in form.definitions().items()]
    library = _library((*macros, "-DENTRY=rarefy_attend_token"), token.SOURCE)
    library.run(0, ctypes.byref(given), *grid, 32 * form.warps, form.shared_memory)


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, n, D]`` without RoPE."""
    assert unrotate.fits(x, cos, sin)
    out = torch.full(x.shape, torch.nan)
    form, grid, given = unrotate.arguments(x, cos, sin, out)
    macros = [f"-D{macro}={value}" for macro, value in form.definitions().items()]
    library = _library((*macros, f"-DENTRY={unrotate.ENTRY}"), unrotate.SOURCE)
    library.run(0, ctypes.byref(given), *grid, unrotate.THREADS, 0)
    return out
