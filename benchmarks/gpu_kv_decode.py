"""Attention of one new token over a KV cache in code, on one GPU, against the best 16-bit attention of torch.

32 query heads over 8 KV heads of 128 channels, one sequence. Caches are filled with random codes (no quality is
claimed here), several until they exceed the GPU's own cache; peers are timed in turn in one process, as CUDA graphs.
``ratio`` is the time of the best of torch's bf16 kernels over ours, ``fraction_of_limit`` the bytes of the cache at the
bandwidth of a copy over our time, ``max_rel_error`` that against the decoded cache in float32 at the shortest context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from graphs import BEYOND_CACHE, bandwidth, graph_of, microseconds
from harness import Row, arguments, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.kernels.triton.decode_attention import DecodeAttention, Tiles
from rarefy.recipes.kv.turbo_quant import gaussian_table

KEY = ("job", "tokens")
HEADS, QUERY_HEADS, CHANNELS = 8, 32, 128
SCALING = CHANNELS**-0.5
GROUP = 128
CONFIGURATIONS = [(4, 2), (4, 3), (8, 2), (8, 3)]  # warps, stages
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Job:
    name: str
    keys: str
    values: str
    num_bits: int

    def tiles(self, tokens: int) -> tuple[Tiles, Tiles]:
        return side(self.keys, self.num_bits, tokens), side(self.values, self.num_bits, tokens)


JOBS = [
    Job("uniform 4 bit", "channel", "token", 4), Job("uniform 3 bit", "channel", "token", 3),
    Job("uniform 2 bit", "channel", "token", 2), Job("uniform 8 bit", "channel", "token", 8),
    Job("rotated table 4 bit", "table", "table", 4), Job("fp8", "fp8", "fp8", 8), Job("bf16", "bf16", "bf16", 16),
]  # fmt: skip


def side(kind: str, num_bits: int, tokens: int) -> Tiles:
    """Random keys or values of one run."""
    shape = (1, HEADS, tokens, CHANNELS)
    if kind in ("bf16", "fp8"):
        numbers = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return Tiles("dense", ((numbers if kind == "bf16" else numbers.to(torch.float8_e4m3fn),),), num_bits)
    words = torch.randint(-(2**31), 2**31, (1, HEADS, tokens * CHANNELS * num_bits // 32), device="cuda")
    scale = (0.5 + torch.rand(1, HEADS, tokens * CHANNELS // GROUP, device="cuda")) / 2 ** (num_bits - 1)
    codes = words.to(torch.int32)
    if kind == "table":
        lut = gaussian_table(num_bits).cuda()
        return Tiles("table", ((codes, scale[:, :, :tokens].half().contiguous()),), num_bits, 1, 1, lut)
    zero = 2 ** (num_bits - 1) + torch.randn_like(scale)
    return Tiles(kind, ((codes, scale.half(), zero.half()),), num_bits, GROUP, GROUP)


def nbytes(*tiles: Tiles) -> int:
    return sum(tensor.numel() * tensor.element_size() for each in tiles for run in each.runs for tensor in run)


def decoded(tiles: Tiles, tokens: int) -> Tensor:
    """What the tiles stand for, float32 ``[1, H, tokens, D]``."""
    from rarefy import packing

    numbers = tiles.runs[0]
    if tiles.kind == "dense":
        return numbers[0].float()
    stream = numbers[0].unflatten(-1, (-1, tiles.num_bits))
    codes = packing.unpack_bits(stream, tiles.num_bits, tokens * CHANNELS)
    if tiles.kind == "table":
        assert tiles.lut is not None
        return tiles.lut[codes.int()].unflatten(-1, (tokens, CHANNELS)) * numbers[1].float().unsqueeze(-1)
    scale, zero = (each.float().unsqueeze(-1) for each in numbers[1:])
    values = (codes.unflatten(-1, (-1, GROUP)).float() - zero) * scale
    if tiles.kind == "token":
        return values.flatten(2).unflatten(-1, (tokens, CHANNELS))
    return values.unflatten(2, (-1, CHANNELS)).transpose(-1, -2).flatten(2, 3)


def ours(job: Job, tokens: int, query: Tensor, warps: int, stages: int) -> tuple[torch.cuda.CUDAGraph, int, int]:
    """A graph of calls over copies that exceed the GPU's cache, their number, and the bytes of one."""
    first = job.tiles(tokens)
    size = nbytes(*first)
    count = max(1, min(16, -(-int(BEYOND_CACHE) // size)))
    tiles = [first, *(job.tiles(tokens) for _ in range(count - 1))]
    attention = [
        DecodeAttention(k, v, 1, HEADS, QUERY_HEADS, CHANNELS, tokens, device=query.device, num_warps=warps,
                        num_stages=stages)
        for k, v in tiles
    ]  # fmt: skip
    return graph_of([lambda each=each: each(query, SCALING) for each in attention]), count, size  # type: ignore[misc]


def peers(tokens: int, query: Tensor) -> dict[str, tuple[torch.cuda.CUDAGraph, int]]:
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
            found[name] = graph_of([lambda k=k, v=v: call(k, v) for k, v in pairs]), count  # type: ignore[misc]
        except RuntimeError as failure:
            print(f"{name}: {str(failure).splitlines()[0]}")
    return found


def error(job: Job, tokens: int, query: Tensor) -> float:
    keys, values = job.tiles(tokens)
    attention = DecodeAttention(keys, values, 1, HEADS, QUERY_HEADS, CHANNELS, tokens, device=query.device)
    found, _ = attention(query, SCALING)
    group = QUERY_HEADS // HEADS
    k, v = (decoded(each, tokens).repeat_interleave(group, 1) for each in (keys, values))
    expected = ((query[:, :, None] @ k.mT * SCALING).softmax(-1) @ v)[:, :, 0]
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    lengths = [8192, 131072] if options.quick else [8192, 32768, 131072, 524288, 1048576]
    query = torch.randn(1, QUERY_HEADS, CHANNELS, device="cuda")
    limit, rounds = bandwidth(), 15
    best: dict[str, tuple[int, int]] = {}
    errors: dict[str, float] = {}
    for job in JOBS:
        trial = {}
        for warps, stages in CONFIGURATIONS[: 2 if options.quick else None]:
            try:
                graph, count, _ = ours(job, 32768, query, warps, stages)
            except Exception as failure:  # whatever a compiler raises: the next configuration may do
                print(f"{job.name}, {warps} warps, {stages} stages: {type(failure).__name__}")
                continue
            trial[warps, stages] = microseconds({"": (graph, count)}, 5)[""]
        if not trial:
            continue
        errors[job.name] = error(job, lengths[0], query)
        best[job.name] = min(trial, key=lambda each: trial[each])
        print(job.name, f"error {errors[job.name]:.1e}", {k: round(v, 1) for k, v in trial.items()}, flush=True)
    rows: list[Row] = []
    for tokens in lengths:
        graphs = peers(tokens, query)
        names = list(graphs)
        sizes = {}
        for job in JOBS:
            if job.name not in best or (job.name == "bf16" and tokens > 131072):
                continue
            graph, count, sizes[job.name] = ours(job, tokens, query, *best[job.name])
            graphs[job.name] = graph, count
        times = microseconds(graphs, rounds)
        peer = min(names, key=lambda name: times[name])
        for name, size in sizes.items():
            rows.append({
                "goal": "D8", "job": f"decode attention, {name}", "tokens": tokens, "peer": f"torch {peer} bf16",
                "microseconds": round(times[name], 2), "peer_microseconds": round(times[peer], 2),
                "ratio": round(times[peer] / times[name], 3),
                "ratio_to_fp8": round(times.get("fp8", 0.0) / times[name], 3),
                "fraction_of_limit": round(size / limit / times[name], 3),
                "max_rel_error": errors[name], "bits_per_weight": size * 8 / (2 * HEADS * tokens * CHANNELS),
                "note": f"{best[name][0]} warps, {best[name][1]} stages; copy {limit / 1e6:.2f} TB/s; synthetic codes",
            })  # fmt: skip
            print(tokens, name, f"{times[name]:.1f} us, {rows[-1]['ratio']}x of {peer},",
                  f"{rows[-1]['fraction_of_limit']} of the limit", flush=True)  # fmt: skip
        del graphs, graph
        torch.cuda.empty_cache()
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
