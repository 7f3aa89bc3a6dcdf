"""Attention of one new token over a KV cache in code, on one GPU, against the best 16-bit attention of torch.

32 query heads over 8 KV heads of 128 channels, one sequence. Caches are filled with random codes (no quality is
claimed here), several until they exceed the GPU's own cache; peers are timed in turn in one process, as CUDA graphs.
``ratio`` is the time of the best of torch's bf16 kernels over ours, ``ratio_to_fp8`` that of our own kernel over 8-bit
floats with a scale for each token, ``fraction_of_limit`` the bytes of the cache at the bandwidth of a copy or a sum
over our time, ``max_rel_error`` that against the decoded cache in float32 at 8,192 tokens. What is in code goes through
the kernel in CUDA C++, 16-bit numbers through the one in Triton. Every job is tried with several shapes of the kernel,
and the best counts; ``--trials FILE`` keeps them all.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import Row, arguments, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.kernels.coded import LowRank, Outliers, Tiles, Turns
from rarefy.kernels.cuda import attend, driver
from rarefy.kernels.triton.decode_attention import DecodeAttention
from rarefy.kv.rotary import Rotary

KEY = ("job", "tokens")
HEADS, QUERY_HEADS, CHANNELS = 8, 32, 128
SCALING = CHANNELS**-0.5
FREQUENCIES = 500000.0 ** -(torch.arange(CHANNELS // 2) / (CHANNELS // 2))
BEYOND_CACHE = 200e6  # bytes that no GPU keeps on the chip
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PROGRAMS = (1584, 2112)  # of one call of the Triton kernel
COMPILERS = 12
KEPT = 2  # shapes of a job that are tried with other contexts than the first


@dataclass(frozen=True)
class Shape:
    """How the Triton kernel is compiled: rows of a tile, warps and stages, and how many programs a call has."""

    rows: int
    warps: int = 1
    stages: int = 2
    programs: int = 1584


DENSE = tuple(Shape(32, 1, stages, programs) for stages in (2, 3) for programs in PROGRAMS)
BLOCKED = (attend.Shape(), attend.Shape(depth=2))  # of blocks of as many tokens as a long tile
CODED = (attend.Shape(tile=64), attend.Shape())
AnyShape = Shape | attend.Shape
Attention = Callable[[Tensor, float], Any]


@dataclass(frozen=True)
class Job:
    """Codes of random numbers. ``group``: tokens of a channel, or channels of a token, that share a scale."""

    name: str
    keys: str
    values: str
    num_bits: int
    group: int = 128

    @property
    def shapes(self) -> tuple[AnyShape, ...]:
        return DENSE if self.keys == "bf16" else BLOCKED if self.keys.startswith("channel") else CODED

    def tiles(self, tokens: int) -> tuple[Tiles, Tiles]:
        keys, values = self._side(self.keys, tokens), self._side(self.values, tokens)
        return keys, replace(values, lut=keys.lut) if self.keys == "table" else values

    def _side(self, kind: str, tokens: int) -> Tiles:
        """Random keys or values of one run."""
        shape = (1, HEADS, tokens, CHANNELS)
        if kind.startswith("rows"):
            return self._rows(tokens, kind != "rows")
        if kind.endswith("corrected"):
            plain, blocks = self._side(kind.split()[0], tokens), (1, HEADS, tokens // 128)
            sizes = (128, 2), (2, CHANNELS), (128, 4)
            left, right, values = (torch.randn(*blocks, *size, device="cuda").half() / 8 for size in sizes)
            indices = torch.randint(32, values.shape, device="cuda") + 32 * torch.arange(4, device="cuda")
            outliers = Outliers(((values, indices.to(torch.uint8)),), "channel" if plain.kind == "channel" else "token")
            return replace(plain, block=128, outliers=outliers, low_rank=LowRank(((left, right),)))
        if kind == "bf16":
            return Tiles("dense", ((torch.randn(shape, device="cuda", dtype=torch.bfloat16),),), self.num_bits)
        if kind == "float8":
            numbers = (100 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)).clamp(-448, 448)
            codes = numbers.to(torch.float8_e4m3fn)
            scale = (0.5 + torch.rand(1, HEADS, tokens, device="cuda")) / 100
            return Tiles("float8", ((codes.view(torch.uint8), scale.half()),), 8)
        if kind == "product":
            words = (1, HEADS, tokens * CHANNELS // 2 // 4)
            codes = torch.randint(-(2**31), 2**31 - 1, words, device="cuda", dtype=torch.int32)
            books = torch.randn(HEADS, CHANNELS // 2, 256, 2, device="cuda").half()
            return Tiles("product", ((codes,),), 8, 1, 1, books)
        words = (1, HEADS, tokens * CHANNELS * self.num_bits // 32)
        codes = torch.randint(-(2**31), 2**31 - 1, words, device="cuda", dtype=torch.int32)
        scale = (0.5 + torch.rand(1, HEADS, tokens * CHANNELS // self.group, device="cuda")) / 2 ** (self.num_bits - 1)
        if kind == "table":
            entries = 1 << self.num_bits
            lut = torch.special.ndtri((torch.arange(entries, device="cuda") + 0.5) / entries)
            return Tiles("table", ((codes, scale[:, :, :tokens].half().contiguous()),), self.num_bits, 1, 1, lut)
        zero = 2 ** (self.num_bits - 1) + torch.randn_like(scale)
        block = 128 if kind == "channel" else 1
        return Tiles(kind, ((codes, scale.half(), zero.half()),), self.num_bits, block, self.group)

    @property
    def turned(self) -> bool:
        """Whether keys in code are without RoPE."""
        return self.keys == "rows before RoPE"

    def _rows(self, tokens: int, keys: bool) -> Tiles:
        """Tables over the vector of all heads, a hundredth of it outliers: keys around centers of channels, values
        within a range of each token."""
        width, entries = HEADS * CHANNELS, 1 << self.num_bits
        words = (1, 1, tokens * width * self.num_bits // 32)
        codes = torch.randint(-(2**31), 2**31 - 1, words, device="cuda", dtype=torch.int32)
        lut = torch.special.ndtri((torch.arange(entries, device="cuda") + 0.5) / entries)
        places = torch.arange(10, device="cuda") * (width // 10)
        indices = (torch.randint(width // 10, (1, 1, tokens, 10), device="cuda") + places).to(torch.int16)
        outliers = Outliers(((torch.randn(1, 1, tokens, 10, device="cuda").half(), indices),), "token")
        options = {"outliers": outliers, "joined": True}
        if keys:
            affine = torch.randn(width, device="cuda"), 0.5 + torch.rand(width, device="cuda")
            return Tiles("table", ((codes,),), self.num_bits, 32, 1, lut, affine=affine, **options)
        scale, offset = ((0.5 + torch.rand(1, 1, tokens, device="cuda")).half() for _ in range(2))
        return Tiles("table", ((codes, scale, offset),), self.num_bits, 32, 1, lut, **options)


JOBS = [
    Job("uniform 4 bit", "channel", "token", 4), Job("uniform 3 bit", "channel", "token", 3),
    Job("uniform 2 bit", "channel", "token", 2), Job("uniform 8 bit", "channel", "token", 8),
    Job("uniform 4 bit, groups of 64", "channel", "token", 4, 64),
    Job("uniform 4 bit, groups of 32", "channel", "token", 4, 32),
    Job("uniform 4 bit by token", "token", "token", 4), Job("uniform 3 bit by token", "token", "token", 3),
    Job("uniform 2 bit by token", "token", "token", 2), Job("rotated table 4 bit", "table", "table", 4),
    Job("rotated table 3 bit", "table", "table", 3), Job("product codes of 2 channels", "product", "product", 4),
    Job("tables before RoPE, outliers, 4 bit", "rows before RoPE", "rows", 4),
    Job("tables before RoPE, outliers, 3 bit", "rows before RoPE", "rows", 3),
    Job("tables after RoPE, outliers, 4 bit", "rows after RoPE", "rows", 4),
    Job("tables after RoPE, outliers, 3 bit", "rows after RoPE", "rows", 3),
    Job("uniform 4 bit, outliers and rank 2", "channel corrected", "token corrected", 4, 64),
    Job("fp8", "float8", "float8", 8), Job("bf16", "bf16", "bf16", 16),
]  # fmt: skip


def nbytes(*tiles: Tiles) -> int:
    parts = [(each.runs, each.outliers and each.outliers.runs, each.low_rank and each.low_rank.runs) for each in tiles]
    tensors = [tensor for each in parts for runs in each for run in runs or () for tensor in run]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def decoded(tiles: Tiles, tokens: int, turned: bool = False) -> Tensor:
    """What the tiles stand for, float32 ``[1, H, tokens, D]``; ``turned``: keys get their RoPE."""
    if tiles.joined:
        rows = _decoded_rows(tiles, tokens)
        return Rotary(FREQUENCIES).rotate(rows, torch.arange(tokens, device="cuda")[None]) if turned else rows
    if tiles.outliers is None or tiles.low_rank is None:
        return _decoded(tiles, tokens)
    plain, (values, indices), (left, right) = _decoded(tiles, tokens), tiles.outliers.runs[0], tiles.low_rank.runs[0]
    found = torch.zeros(*values.shape[:-1], 128, device="cuda").scatter_(-1, indices.long(), values.float())
    found = found.mT if tiles.kind == "channel" else found
    return plain + (found + left.float() @ right.float()).flatten(2, 3)


def _decoded_rows(tiles: Tiles, tokens: int) -> Tensor:
    from rarefy import packing

    assert tiles.lut is not None and tiles.outliers is not None
    stream = tiles.runs[0][0].unflatten(-1, (-1, tiles.num_bits))
    codes = packing.unpack_bits(stream, tiles.num_bits, stream.shape[-2] * 32).flatten(2).unflatten(-1, (tokens, -1))
    rows = tiles.lut[codes.int()]
    if tiles.affine is None:
        scale, offset = (each.float().unsqueeze(-1) for each in tiles.runs[0][1:])
        rows = rows * scale + offset
    else:
        rows = rows * tiles.affine[1] + tiles.affine[0]
    values, indices = tiles.outliers.runs[0]
    return rows.scatter_add(-1, indices.long(), values.float())[:, 0].unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _decoded(tiles: Tiles, tokens: int) -> Tensor:
    from rarefy import packing

    numbers = tiles.runs[0]
    if tiles.kind == "dense":
        return numbers[0].float()
    if tiles.kind == "float8":
        return numbers[0].view(torch.float8_e4m3fn).float() * numbers[1].float().unsqueeze(-1)
    if tiles.kind == "product":
        assert tiles.lut is not None
        codes = numbers[0].view(torch.uint8).unflatten(-1, (tokens, -1)).int()
        head, part = (torch.arange(size, device="cuda") for size in (HEADS, codes.shape[-1]))
        return tiles.lut.float()[head[:, None, None], part, codes].flatten(-2)
    stream = numbers[0].unflatten(-1, (-1, tiles.num_bits))
    codes = packing.unpack_bits(stream, tiles.num_bits, stream.shape[-2] * 32).flatten(2)
    if tiles.kind == "table":
        assert tiles.lut is not None
        return tiles.lut[codes.int()].unflatten(-1, (tokens, CHANNELS)) * numbers[1].float().unsqueeze(-1)
    scale, zero = (each.float().unsqueeze(-1) for each in numbers[1:])
    values = ((codes.unflatten(-1, (-1, tiles.group)).float() - zero) * scale).flatten(2)
    if tiles.kind == "token":
        return values.unflatten(-1, (tokens, CHANNELS))
    return values.unflatten(-1, (-1, CHANNELS, tiles.block)).transpose(-1, -2).flatten(2, 3)


class Captured:
    """Calls as one CUDA graph, which reads their memory: so they live as long as it."""

    def __init__(self, calls: list[Callable[[], Any]]):
        self.calls = calls
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()


def microseconds(graphs: dict[Any, Captured], rounds: int) -> dict[Any, float]:
    """Median time of one call in each graph, in turn."""
    times: dict[Any, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 2):
        for name, captured in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            captured.graph.replay()
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3 / len(captured.calls))
    return {name: statistics.median(each) for name, each in times.items()}


def attention(tiles: tuple[Tiles, Tiles], tokens: int, shape: AnyShape, turned: bool = False) -> Attention:
    device = torch.device("cuda")
    if isinstance(shape, attend.Shape):
        shift = torch.zeros(1, dtype=torch.int64, device=device)
        turns = Turns(FREQUENCIES.to(device), 1.0, shift) if turned else None
        return attend.CodedAttention(
            *tiles, ([tokens], [tokens]), 1, HEADS, QUERY_HEADS, device=device, turns=turns, shape=shape
        )
    return DecodeAttention(
        *tiles, 1, HEADS, QUERY_HEADS, CHANNELS, tokens, device=device, parts=max(1, shape.programs // HEADS),
        rows=shape.rows, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


def copies(job: Job, tokens: int) -> list[tuple[Tiles, Tiles]]:
    """As many caches as exceed the GPU's own."""
    first = job.tiles(tokens)
    return [first, *(job.tiles(tokens) for _ in range(min(15, int(BEYOND_CACHE) // nbytes(*first))))]


def peers(tokens: int, query: Tensor) -> dict[str, Captured]:
    """Torch's kernels over a bf16 cache."""
    count = max(1, -(-int(BEYOND_CACHE) // (2 * HEADS * tokens * CHANNELS * 2)))
    pairs = [
        tuple(torch.randn(1, HEADS, tokens, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(count)
    ]
    wide = query.to(torch.bfloat16).unsqueeze(2)
    found = {}
    for name, backend in BACKENDS.items():

        def call(k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(wide, k, v, scale=SCALING, enable_gqa=True)

        try:
            found[name] = Captured([lambda k=k, v=v: call(k, v) for k, v in pairs])  # type: ignore[misc]
        except RuntimeError as failure:
            print(f"{name}: {str(failure).splitlines()[0]}")
    return found


def bandwidth() -> float:
    """Bytes per microsecond that a copy reads and writes, or a sum reads, whichever is more."""
    source = torch.zeros(1 << 29, device="cuda")
    target = torch.empty_like(source)
    graphs = {2: Captured([lambda: target.copy_(source)]), 1: Captured([lambda: source.sum()])}
    return max(times * 4 * source.numel() / took for times, took in microseconds(graphs, 10).items())


def check(name: str, shape: AnyShape, tokens: int = 8192) -> tuple[str, AnyShape, float | str, dict[Any, bytes]]:
    """The error of one shape against attention over what is decoded, or why it does not run; machine code, or what is
    left in Triton's own cache."""
    job = next(each for each in JOBS if each.name == name)
    try:
        torch.manual_seed(0)
        query = torch.randn(1, QUERY_HEADS, CHANNELS, device="cuda")
        tiles = job.tiles(tokens)
        found, _ = attention(tiles, tokens, shape, job.turned)(query, SCALING)
        group = QUERY_HEADS // HEADS
        dense = decoded(tiles[0], tokens, job.turned), decoded(tiles[1], tokens)
        k, v = (each.repeat_interleave(group, 1) for each in dense)
        expected = ((query[:, :, None] @ k.mT * SCALING).softmax(-1) @ v)[:, :, 0]
        return name, shape, float((found - expected).norm() / expected.norm()), driver.images
    except Exception as failure:  # whatever a compiler raises: another shape may do
        return name, shape, f"{type(failure).__name__}: {str(failure)[:300]}", {}


def checked(jobs: list[Job], quick: bool) -> dict[tuple[str, AnyShape], float]:
    """Errors of all shapes that run and are right."""
    wanted = [(job.name, shape) for job in jobs for shape in job.shapes[: 1 if quick else None]]
    errors = {}
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, shape, error, images in pool.map(check, *zip(*wanted, strict=True)):
            driver.images.update(images)
            if isinstance(error, str) or not error < 0.02:
                print(f"{name}, {shape}: {error}", flush=True)
            else:
                errors[name, shape] = error
    return errors


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trials", type=Path, help="keep the time of every shape here")
    parser.add_argument("--seconds", type=float, default=200, help="begin no context after so many")
    options = parser.parse_args()
    begin = time.monotonic()
    lengths = [8192, 131072] if options.quick else [131072, 8192, 1048576, 32768]
    errors = checked(JOBS, options.quick)
    print(f"{len(errors)} kernels checked, {time.monotonic() - begin:.0f} s", flush=True)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    query = torch.randn(1, QUERY_HEADS, CHANNELS, device="cuda")
    limit, trials = bandwidth(), []
    print(f"{limit / 1e6:.2f} TB/s", flush=True)
    kept = {job.name: [shape for shape in job.shapes if (job.name, shape) in errors] for job in JOBS}
    for tokens in lengths:
        if time.monotonic() - begin > options.seconds:
            print(f"No time for {tokens} tokens.", flush=True)
            break
        graphs: dict[Any, Captured] = dict(peers(tokens, query))
        torch_times = microseconds(graphs, 15)
        peer = min(torch_times, key=lambda name: torch_times[name])
        print(tokens, {name: round(each, 1) for name, each in torch_times.items()}, flush=True)
        graphs.clear()
        fp8 = 0.0
        for job in sorted(JOBS, key=lambda each: each.name != "fp8"):
            if not kept[job.name] or (job.name == "bf16" and tokens > 131072):
                continue
            caches = copies(job, tokens)
            size = nbytes(*caches[0])
            graphs = {}
            for shape in kept[job.name]:
                calls = [attention(each, tokens, shape, job.turned) for each in caches]
                graphs[shape] = Captured([lambda call=call: call(query, SCALING) for call in calls])  # type: ignore[misc]
            times = microseconds(graphs, 7)
            order = sorted(times, key=lambda shape: times[shape])
            trials += [
                {"job": job.name, "tokens": tokens, **asdict(shape), "microseconds": round(times[shape], 2)}
                for shape in order
            ]  # fmt: skip
            # The best few again, in turn with the peer.
            again = microseconds({key: graphs[key] for key in order[:3]}, 15)
            best = min(again, key=lambda key: again[key])
            took = again[best]
            if tokens == lengths[0]:
                kept[job.name] = order[:KEPT]
            fp8 = took if job.name == "fp8" else fp8
            row: Row = {
                "goal": "D8", "job": f"decode attention, {job.name}", "tokens": tokens, "peer": f"torch {peer} bf16",
                "microseconds": round(took, 2), "peer_microseconds": round(torch_times[peer], 2),
                "ratio": round(torch_times[peer] / took, 3), "ratio_to_fp8": round(fp8 / took, 3),
                "fraction_of_limit": round(size / limit / took, 3), "max_rel_error": errors[job.name, best],
                "bits_per_weight": size * 8 / (2 * HEADS * tokens * CHANNELS),
                "note": f"{best}; {limit / 1e6:.2f} TB/s; synthetic codes",
            }  # fmt: skip
            write(options, [row], KEY)
            print(f"{tokens} {job.name}: {took:.1f} us, {row['ratio']}x of {peer}, {row['ratio_to_fp8']}x of fp8, "
                  f"{row['fraction_of_limit']} of the limit; {row['note']}", flush=True)  # fmt: skip
            shapes = (f"{times[shape]:.1f} {tuple(asdict(shape).values())}" for shape in order[:6])
            print("    " + ", ".join(shapes), flush=True)
            del caches, graphs, calls
            torch.cuda.empty_cache()
        if options.trials:
            options.trials.write_text(json.dumps(trials, indent=1))


if __name__ == "__main__":
    main()
