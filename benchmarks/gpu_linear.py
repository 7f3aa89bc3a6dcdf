"""One linear layer with weights in code on one GPU, for 1 to 256 tokens, against what PyTorch and others have.

Weights are random codes (no quality is claimed here), in several copies that together exceed the GPU's own cache. Every
call is in a CUDA graph; peers are timed in turn in one process. ``ratio`` is the time of the best peer over ours,
``ratio_to_bf16`` that of the dense layer, ``fraction_of_limit`` the bytes of weights and activations at the bandwidth
of a copy over our time, ``max_rel_error`` that against float64 on the same codes.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from graphs import BEYOND_CACHE, bandwidth, graph_of, microseconds
from harness import Row, arguments, write
from torch import Tensor

from rarefy.kernels.cuda import layout, program
from rarefy.kernels.cuda.program import Code, Tuning

KEY = ("job", "rows", "columns", "tokens")
SHAPES = [(14336, 4096), (4096, 14336), (28672, 4096), (4096, 4096)]
CODES = {
    "W4": Code(4, 128, center=8), "W3": Code(3, 128, center=4), "W2": Code(2, 128, center=2),
    "W8": Code(8, 128, center=128), "W1": Code(1, 128, center=1),
    "W4 zero": Code(4, 128, zero=torch.uint8), "LUT4": Code(4, 0, table="shared", scale=None),
    "FP4 g32": Code(4, 32, table="shared"), "W4 g32": Code(4, 32, center=8),
}  # fmt: skip


class Weights:
    """Random weights of one code, in copies; the last one's dense meaning in float64 on demand."""

    def __init__(self, code: Code, rows: int, columns: int):
        self.code, self.rows, self.columns = code, rows, columns
        tiles, steps, groups = -(-rows // 16), -(-columns // code.step), -(-columns // (code.group or columns))
        shape = tiles, steps, code.step * code.bits // 256, 32, 4
        words = tiles * steps * 32 * code.step * code.bits // 64
        self.nbytes = words * 4 + (0 if code.scale is None else 2 * rows * groups) + (rows * groups if code.zero else 0)
        self.count = max(2, -(-int(BEYOND_CACHE) // self.nbytes))
        pairs = tiles, groups, 8, 2
        self.codes = [
            torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int64).int() for _ in range(self.count)
        ]
        self.scales: list[Tensor | None] = [None] * self.count
        self.zeros: list[Tensor | None] = [None] * self.count
        if code.scale is not None:
            self.scales = [((0.5 + torch.rand(pairs, device="cuda")) / 64).to(code.scale) for _ in range(self.count)]
        if code.zero is not None:
            self.zeros = [
                torch.randint(0, 1 << code.bits, pairs, device="cuda").to(code.zero) for _ in range(self.count)
            ]
        self.table = torch.randn(1 << code.bits, device="cuda").bfloat16() / 8 if code.table else None
        self.pair_table = None if self.table is None else layout.pair_table(self.table)

    def product(self, x: Tensor) -> Tensor:
        """``x`` times the first copy in float64, by rows."""
        code = self.code
        codes = layout.unpack_codes(self.codes[0], code.bits, code.span, code.order, self.rows, self.columns)

        def spread(pairs: Tensor | None) -> Tensor | float:
            if pairs is None:
                return float(code.center)
            numbers = layout.unpack_pairs(pairs, self.rows).double()
            return numbers.repeat_interleave(code.group or self.columns, 1)[:, : self.columns]

        values = codes.double() - spread(self.zeros[0]) if self.table is None else self.table.double()[codes.long()]
        if self.scales[0] is not None:
            values *= spread(self.scales[0])
        return x.double() @ values.T

    def calls(self, tuning: Tuning, x: Tensor, overlap: bool) -> tuple[list[Callable[[], Any]], Tensor]:
        """A call for each copy, and where the first leaves its result."""
        found: list[Callable[[], Any]] = []
        outs = []
        for codes, scale, zero in zip(self.codes, self.scales, self.zeros, strict=True):
            y = torch.full((x.shape[0], self.rows), torch.nan, device="cuda", dtype=x.dtype)
            partial, arrived = None, None
            if tuning.split > 1:
                across, _, deep = program.grid(tuning, self.rows, x.shape[0])
                partial = torch.empty(tuning.split, x.shape[0], self.rows, device="cuda")
                arrived = torch.zeros(across * deep, dtype=torch.int32, device="cuda")
            tensors = {"codes": codes, "scale": scale, "zero": zero, "table": self.pair_table, "x": x, "y": y,
                       "partial": partial, "arrived": arrived}  # fmt: skip
            given = program.arguments(
                tensors, rows=self.rows, columns=self.columns, tokens=x.shape[0], stride=x.stride(0)
            )
            outs.append((y, partial, arrived))

            def call(given: program.Arguments = given) -> None:
                program.linear(self.code, tuning, given, x.dtype == torch.float16, x.device, overlap)

            call.keep = (x, outs)  # type: ignore[attr-defined]
            found.append(call)
        return found, outs[0][0]


def candidates(code: Code, tokens: int) -> Iterator[Tuning]:
    """What may be fastest."""
    loads = code.step * code.bits // 256
    if tokens <= 16:
        for tiles in (1, 2, 4):
            for across, along in ((1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (4, 2), (4, 4)):
                for depth in (1, 2, 4):
                    if tiles * depth * loads <= 12:
                        yield Tuning(tiles, -(-tokens // 8), across, along, depth)
        if tokens > 4:
            for tiles in (1, 2, 4):
                for across, along in ((2, 4), (4, 2), (4, 1), (8, 1)):
                    for split in (1, 2, 4):
                        yield Tuning(tiles, -(-tokens // 8), across, along, 2 if tiles * loads <= 4 else 1, 3, split)
        return
    width = min(8, -(-tokens // 8))
    for tokens_at_once in sorted({width, max(1, width // 2), min(16, -(-tokens // 8))}):
        for tiles in (1, 2, 4):
            if tiles * tokens_at_once > 16:
                continue
            for across, along in ((4, 1), (8, 1), (4, 2), (2, 2)):
                for depth in (1, 2):
                    if tiles * loads * depth > 8 or (tiles * tokens_at_once == 16 and depth > 1):
                        continue
                    for stages in (2, 3, 4):
                        for split in (1, 2, 4):
                            yield Tuning(tiles, tokens_at_once, across, along, depth, stages, split)


@dataclass
class Trials:
    """What was tried, for the file that is kept beside the rows."""

    rows: list[dict[str, Any]]
    deadline: float

    def best(self, name: str, weights: Weights, x: Tensor, most: int) -> Tuning | None:
        """The fastest tuning that computes the right thing."""
        code, tokens = weights.code, x.shape[0]
        tried = list(candidates(code, tokens))
        if len(tried) > most:
            tried = [tried[index * len(tried) // most] for index in range(most)]
        tried = [each for each in tried if each.shared_memory(code) <= 220 * 1024]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda each: _compiles(code, each, x.dtype), tried))
        expected = weights.product(x)
        times: dict[Tuning, float] = {}
        for tuning in tried:
            if time.monotonic() > self.deadline:
                break
            row = {"code": name, "rows": weights.rows, "columns": weights.columns, "tokens": tokens, **asdict(tuning)}
            try:
                calls, y = weights.calls(tuning, x, overlap=False)
                calls[0]()
                row["error"] = relative(y, expected)
                if not row["error"] < 1e-2:
                    self.rows.append(row)
                    continue
                row["microseconds"] = times[tuning] = microseconds({"": (graph_of(calls), len(calls))}, 5)[""]
            except Exception as failure:  # the next one may do
                row["failure"] = str(failure).splitlines()[0][:200]
            self.rows.append(row)
        wrong = [row for row in self.rows[-len(tried) :] if "error" in row and not row["error"] < 1e-2]
        failed = [row for row in self.rows[-len(tried) :] if "failure" in row]
        if wrong or failed:
            print(f"  {name} M={tokens}: {len(wrong)} wrong, {len(failed)} failed: {(wrong + failed)[0]}", flush=True)
        return min(times, key=lambda each: times[each]) if times else None


def _compiles(code: Code, tuning: Tuning, dtype: torch.dtype) -> None:
    try:
        program.kernel(0, "linear", code, tuning, dtype == torch.float16)
    except Exception:  # said when it is run
        return


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def bf16_calls(rows: int, columns: int, x: Tensor) -> list[Callable[[], Any]]:
    count = max(2, -(-int(BEYOND_CACHE) // (rows * columns * 2)))
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def tinygemm_calls(rows: int, columns: int, x: Tensor) -> list[Callable[[], Any]]:
    count = max(2, -(-int(BEYOND_CACHE) // (rows * columns // 2)))
    packed = [
        torch._convert_weight_to_int4pack(
            torch.randint(0, 256, (rows, columns // 2), device="cuda", dtype=torch.uint8), 8
        )
        for _ in range(count)
    ]
    scales = torch.rand(columns // 128, rows, 2, device="cuda", dtype=torch.bfloat16)
    return [lambda w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in packed]  # type: ignore[misc]


def gemlite_calls(bits: int, rows: int, columns: int, x: Tensor) -> list[Callable[[], Any]]:
    from gemlite.helper import A16Wn

    count = max(2, -(-int(BEYOND_CACHE) * 8 // (rows * columns * bits)))
    layers = []
    for _ in range(count):
        codes = torch.randint(0, 1 << bits, (rows, columns), device="cuda", dtype=torch.uint8)
        scale = torch.rand(rows, columns // 128, device="cuda", dtype=torch.bfloat16)
        zero = torch.full_like(scale, 1 << (bits - 1))
        layers.append(A16Wn(device="cuda:0", dtype=torch.bfloat16).from_weights(codes, scale, zero, bits, 128))
    return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]


def triton_times(weights: Weights, x: Tensor, trials: Trials) -> tuple[float, str] | None:
    from rarefy.kernels.triton import linear as portable

    if not portable.fits(weights.code):
        return None
    tokens = max(16, 1 << (x.shape[0] - 1).bit_length())
    tried = [
        portable.Tuning(tiles, min(tokens, 64 if tiles == 16 else 128), split, warps, stages)
        for tiles, split, warps, stages in ((8, 1, 4, 3), (8, 2, 4, 4), (16, 2, 8, 3), (2, 1, 4, 4), (8, 4, 4, 3))
    ]
    expected, best = weights.product(x), None
    for tuning in tried:
        if time.monotonic() > trials.deadline:
            break
        try:
            calls = [
                functools.partial(portable.linear, weights.code, tuning, x, codes, scale, zero, weights.rows)
                for codes, scale, zero in zip(weights.codes, weights.scales, weights.zeros, strict=True)
            ]
            error = relative(calls[0](), expected)
            took = microseconds({"": (graph_of(calls), len(calls))}, 5)[""]
        except Exception as failure:
            print(f"  triton {tuning}: {str(failure).splitlines()[0][:160]}", flush=True)
            continue
        trials.rows.append({"code": "triton", "rows": weights.rows, "columns": weights.columns, "tokens": x.shape[0],
                            **asdict(tuning), "error": error, "microseconds": took})  # fmt: skip
        if error < 1e-2 and (best is None or took < best[0]):
            best = took, str(tuning)
    return best


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trials", type=Path, help="keep the times of everything that was tried here")
    parser.add_argument("--seconds", type=float, default=200, help="stop trying after so many")
    parser.add_argument("--most", type=int, default=60, help="tunings to try for a job")
    parser.add_argument("--codes", default=",".join(CODES), help="which, by name")
    parser.add_argument("--tokens", default="1,4,8,16,32,64,128,256")
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    parser.add_argument("--triton", action="store_true", help="time the portable kernel too")
    options = parser.parse_args()
    torch.manual_seed(0)
    trials = Trials([], time.monotonic() + options.seconds)
    limit = bandwidth()
    counts = [int(each) for each in options.tokens.split(",")]
    print(f"copy {limit / 1e6:.2f} TB/s", flush=True)
    rows: list[Row] = []
    try:
        for shape in SHAPES[: 1 if options.quick else options.shapes]:
            for tokens in counts:
                rows += measured(shape, tokens, options, trials, limit)
                if time.monotonic() > trials.deadline:
                    print("out of time", flush=True)
                    return
    finally:
        if options.trials:
            options.trials.write_text(json.dumps(trials.rows) + "\n", "utf-8")
        write(options, rows, KEY)


def measured(shape: tuple[int, int], tokens: int, options: Any, trials: Trials, limit: float) -> list[Row]:
    """Rows of one shape and number of tokens."""
    height, width = shape
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    kept: list[Any] = []
    makers = {
        "bf16": lambda: bf16_calls(height, width, x), "tinygemm": lambda: tinygemm_calls(height, width, x),
        "gemlite": lambda: gemlite_calls(4, height, width, x),
    }  # fmt: skip
    for name, maker in makers.items():
        try:
            calls = maker()
            kept.append(calls)
            graphs[name] = graph_of(calls), len(calls)
        except Exception as failure:
            print(f"  {name}: {type(failure).__name__} {str(failure).splitlines()[0][:120]}", file=sys.stderr)
    peers = list(graphs)
    found: dict[str, tuple[Weights, Tuning, float, str]] = {}
    for name in options.codes.split(","):
        weights = Weights(CODES[name], height, width)
        tuning = trials.best(name, weights, x, 20 if options.quick else options.most)
        if tuning is None:
            continue
        calls, y = weights.calls(tuning, x, overlap=False)
        calls[0]()
        error = relative(y, weights.product(x))
        graphs[name] = graph_of(calls), len(calls)
        kept.append(calls)
        found[name] = weights, tuning, error, "cuda"
        for overlapped in (tuning, replace(tuning, depth=max(1, tuning.depth // 2))):
            try:
                calls, _ = weights.calls(overlapped, x, overlap=True)
                label = f"{name}+overlap" if overlapped == tuning else f"{name}+overlap/2"
                graphs[label] = graph_of(calls), len(calls)
                kept.append(calls)
            except Exception as failure:
                print(f"  overlap: {str(failure).splitlines()[0][:160]}", flush=True)
        if options.triton and (portable := triton_times(weights, x, trials)):
            print(f"  triton {name} M={tokens} {shape}: {portable[0]:.1f} us {portable[1]}", flush=True)
    times = microseconds(graphs, 9)
    print(shape, f"M={tokens}", {name: round(each, 1) for name, each in times.items()}, flush=True)
    rows: list[Row] = []
    for name, (weights, tuning, error, note) in found.items():
        size = weights.nbytes + 2 * tokens * (height + width)
        ours = min(times[each] for each in times if each == name or each.startswith(f"{name}+"))
        peer = min((each for each in peers), key=lambda each: times[each])
        rows.append({
            "goal": goal_of(name, tokens), "job": name, "rows": height, "columns": width, "tokens": tokens,
            "peer": peer, "microseconds": round(ours, 2), "without_overlap": round(times[name], 2),
            "peer_microseconds": round(times[peer], 2), "ratio": round(times[peer] / ours, 3),
            "ratio_to_bf16": round(times["bf16"] / ours, 3), "fraction_of_limit": round(size / limit / ours, 3),
            "max_rel_error": error, "bits_per_weight": round(weights.nbytes * 8 / height / width, 3),
            "note": f"{note}; {tuning}; copy {limit / 1e6:.2f} TB/s",
        })  # fmt: skip
        print(f"  {name}: {ours:.1f} us, {rows[-1]['fraction_of_limit']} of limit, {rows[-1]['ratio']}x {peer}, "
              f"{rows[-1]['ratio_to_bf16']}x bf16, error {error:.1e}, {tuning}", flush=True)  # fmt: skip
    return rows


def goal_of(name: str, tokens: int) -> str:
    if name != "W4":
        return {"LUT4": "G6", "FP4 g32": "G6", "W1": "G8"}.get(name, "G5")
    return "G1" if tokens == 1 else "G2" if tokens <= 16 else "G3" if tokens <= 64 else "G4"


if __name__ == "__main__":
    main()
