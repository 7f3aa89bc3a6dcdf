"""One linear layer with weights in code on one GPU, for 1 to 256 tokens, against what PyTorch and others have.

Weights are random codes (no quality is claimed here), in several copies that together exceed the GPU's own cache. Every
call is in a CUDA graph; peers are timed in turn in one process. ``ratio`` is the time of the best peer over ours,
``ratio_to_bf16`` that of the dense layer, ``fraction_of_limit`` the bytes of weights and activations at the bandwidth
of a copy over our time, ``max_rel_error`` that against float64 on the same codes.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from graphs import bandwidth, graph_of, microseconds
from harness import Row, arguments, write
from torch import Tensor

from rarefy import packing
from rarefy.formats.grids import BinaryGrid, FloatGrid, Grid, IntegerGrid, LutGrid
from rarefy.formats.patterns import NM, Bitmap, Groups
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Quantized, Sparse, Term
from rarefy.formats.terms.plain import ResidualSpec
from rarefy.formats.terms.quantized import QuantizedSpec
from rarefy.kernels import cuda
from rarefy.kernels.activations import quantize_tokens
from rarefy.kernels.cuda import measure, program
from rarefy.kernels.cuda import tuning as tuning_tables
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.linear import _in_bytes, dense_sum, most_tokens, pointed, pointed_entries, terms_of
from rarefy.kernels.cuda.prepared import code_of
from rarefy.kernels.cuda.program import Tuning
from rarefy.kernels.prepared import flat

KEY = ("job", "rows", "columns", "tokens")
DEFAULT = (
    "W4@1,4,8,16,32,64,128,256,512,1024; W3@1,16,64; W2@1,16,64; W8@1,16,64; LUT4@1,64; LUT4 rows@1; LUT3 rows@1; "
    "NF4 g64@1,64; W3 + 0.45%@1,16,64; W3 + 1%@1; SpQR@1,16; binary@1"
)
SHAPES = [(14336, 4096), (4096, 14336), (28672, 4096), (4096, 4096)]
EPS = 1e-5  # of a norm
MOST_OF_TINYGEMM = 64  # tokens, each of which takes it as long
EVERYWHERE = 500e6  # bytes of all copies, of which the GPU's cache may keep a few percent


@dataclass(frozen=True)
class Job:
    grid: Grid
    outliers: float = 0.0  # share of weights
    goals: tuple[str, str, str, str] = ("G5", "G5", "G5", "G5")  # for 1, up to 16, 64 and more tokens
    beside: str = ""  # another job, which up to 16 tokens are timed with too


SPQR = BilevelScale(rows=16, groups=1, scale_bits=3, zero_bits=3)
JOBS = {
    "W4": Job(IntegerGrid(num_bits=4, group_size=128), goals=("G1", "G2", "G3", "G4")),
    "W3": Job(IntegerGrid(num_bits=3, group_size=128)), "W2": Job(IntegerGrid(num_bits=2, group_size=128)),
    "W8": Job(IntegerGrid(num_bits=8, group_size=128)),
    "W4 zero": Job(IntegerGrid(num_bits=4, group_size=128, zero="integer")),
    "LUT4": Job(LutGrid(num_bits=4, rows_per_lut=None), goals=("G6",) * 4, beside="W4"),
    "LUT4 rows": Job(LutGrid(num_bits=4), goals=("G6",) * 4, beside="W4"),
    "LUT3 rows": Job(LutGrid(num_bits=3), goals=("G6",) * 4),
    "LUT3 rows + 0.45%": Job(LutGrid(num_bits=3), 0.0045, ("G7",) * 4, "LUT3 rows"),
    "NF4 g64": Job(FloatGrid(format="nf4", group_size=64), goals=("G6",) * 4),
    "W3 + 0.45%": Job(IntegerGrid(num_bits=3, group_size=128), 0.0045, ("G7",) * 4, "W3"),
    "W3 + 1%": Job(IntegerGrid(num_bits=3, group_size=128), 0.01, ("G7",) * 4, "W3"),
    "SpQR": Job(IntegerGrid(num_bits=3, group_size=16, zero="float", scales=SPQR), 0.0045, ("G7",) * 4),
    "binary": Job(BinaryGrid(group_size=128), goals=("G8",) * 4, beside="W2"),
    "fp8": Job(FloatGrid(format="fp8_e4m3")),
}  # fmt: skip


def random_term(grid: Grid, rows: int, columns: int) -> Term:
    """Codes and parameters of a grid, drawn as they would be stored."""
    spec = QuantizedSpec(grid=grid)  # type: ignore[arg-type]
    tensors = {}
    for name, entry in spec.layout((rows, columns)).items():
        shape, dtype = [int(size) for size in entry.shape], entry.dtype
        if dtype.is_floating_point:
            tensors[name] = ((0.5 + torch.rand(shape, device="cuda")) / 64).to(dtype)
        else:
            octets = torch.randint(0, 256, (*shape, dtype.itemsize), device="cuda", dtype=torch.uint8)
            if name == "codes" and grid.code_bits == 8:
                octets &= 0x77  # not all bytes are numbers of E4M3
            tensors[name] = octets.view(dtype)[..., 0]
    return spec.build((rows, columns), tensors)


def random_outliers(share: float, rows: int, columns: int) -> Term:
    count = round(share * columns)
    numbers = torch.rand(rows, columns, device="cuda").topk(count).indices.sort().values
    entries = packing.pack_entries(torch.randn(rows * count, device="cuda").half(), numbers.flatten())
    row_ptr = torch.arange(rows + 1, device="cuda", dtype=torch.int32).unsqueeze(0) * count
    return ResidualSpec().build((rows, columns), {"entries": entries, "row_ptr": row_ptr})


class Weights:
    """Random weights of a job in the layout of the kernels, in copies that no cache holds."""

    def __init__(self, job: Job, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        terms = [random_term(job.grid, rows, columns)]
        if job.outliers:
            terms.append(random_outliers(job.outliers, rows, columns))
        self.nbytes = sum(term.byte_count().total for term in terms)
        self.made = [cuda.prepare(*term.operation()) for term in terms]  # type: ignore[misc]
        (self.term, *lists) = terms_of(*flat(self.made)[:3])
        self.code = code_of(*self.term[:2])
        own = {name: tensor for name, tensor in pointed(self.term, False).items() if tensor is not None}
        for entries, _, _ in lists:
            self.code = self.code.with_outliers(torch.float16, columns, entries["entries"].shape[1])
            own.update({name: each for name, each in pointed_entries(entries).items() if each is not None})
        self._dense = dense_sum([self.term, *lists]).bfloat16()
        self._dense_error = dense_sum([self.term, *lists]) - self._dense
        numbers = self.term[1]
        self.problem = measure.Problem(self.code, own, rows, columns, numbers["second_rows"])
        self.copies = self.problem.copies(EVERYWHERE)

    def product(self, x: Tensor) -> Tensor:
        """``x`` times the weight in float64."""
        return x.double() @ (self._dense.double() + self._dense_error.double()).T

    def calls(self, tuning: Tuning, x: Tensor) -> tuple[list[Callable[[], Any]], Tensor]:
        """A call for each copy, and where the first leaves its result."""
        calls, results = self.problem.calls(self.copies, tuning, x)
        calls[0].results = results  # type: ignore[attr-defined]
        return calls, results[0]  # type: ignore[return-value]


@dataclass
class Trials:
    """What was tried, for the file that is kept beside the rows."""

    rows: list[dict[str, Any]]
    deadline: float
    narrow: bool
    entries: list[dict[str, Any]] = field(default_factory=list)

    def best(self, name: str, weights: Weights, x: Tensor, most: int) -> Tuning | None:
        """The fastest tuning that computes the right thing."""
        code, tokens = weights.code, x.shape[0]
        wide = measure.takes_wide(x.device) and not self.narrow
        overlap = tuning_tables.overlaps(x.device)
        known = tuning_tables.choose(code, weights.rows, weights.columns, tokens, x.device)
        every = [known, *itertools.islice(measure.candidates(code, tokens, wide, weights.columns), most)]
        tried = list(dict.fromkeys(replace(each, overlap=overlap) for each in every))
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda each: _compiles(code, each, x.dtype), tried))
        expected = weights.product(x)
        times: dict[Tuning, float] = {}

        def attempt(tuning: Tuning) -> None:
            if time.monotonic() > self.deadline:
                return
            row = {"code": name, "rows": weights.rows, "columns": weights.columns, "tokens": tokens, **asdict(tuning)}
            self.rows.append(row)
            try:
                calls, y = weights.calls(tuning, x)
                calls[0]()
                row["error"] = relative(y, expected)
                if row["error"] < 1e-2:
                    row["microseconds"] = times[tuning] = microseconds({"": (graph_of(calls), len(calls))}, 5)[""]
            except Exception as failure:  # the next one may do
                row["failure"] = str(failure).splitlines()[0][:200]

        first = len(self.rows)
        for tuning in tried:
            attempt(tuning)
        if times:  # rarely better alone, or when its successor comes late
            found = min(times, key=lambda each: times[each])
            attempt(replace(found, overlap=False))
            if not found.wide:
                attempt(replace(found, late=True))
        wrong = [row for row in self.rows[first:] if "error" in row and not row["error"] < 1e-2]
        failed = [row for row in self.rows[first:] if "failure" in row]
        if wrong or failed:
            print(f"  {name} M={tokens}: {len(wrong)} wrong, {len(failed)} failed: {(wrong + failed)[0]}", flush=True)
        if not times:
            return None
        found = min(times, key=lambda each: times[each])
        self.entries.append(tuning_tables.entry(code, weights.rows, weights.columns, tokens, found))
        return found


def _compiles(code: Code, tuning: Tuning, dtype: torch.dtype) -> None:
    try:
        program.compiled(code, tuning, dtype == torch.float16, torch.device("cuda", 0))
    except Exception:  # said when it is run
        return


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def peers_of(names: Iterable[str], rows: int, columns: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """What others make of a layer of this size: for each a product with every copy of its weights."""
    makers = {"bf16": _bf16, "tinygemm": _tinygemm, "gemlite": _gemlite, "spqr_quant": _spqr_quant}
    makers |= {"marlin": _marlin, "bitsandbytes": _bitsandbytes}
    found = {}
    for name in names:
        try:
            found[name] = makers[name](rows, columns)
        except Exception as failure:
            print(f"  {name}: {type(failure).__name__} {str(failure).splitlines()[0][:120]}", flush=True)
    return found


def _count(bits: int, rows: int, columns: int) -> range:
    return range(max(2, -(-int(EVERYWHERE) * 8 // (rows * columns * bits))))


def _bf16(rows: int, columns: int) -> list[Callable[[Tensor], Tensor]]:
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in _count(16, rows, columns)]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def _tinygemm(rows: int, columns: int) -> list[Callable[[Tensor], Tensor]]:
    codes = torch.randint(0, 256, (rows, columns // 2), device="cuda", dtype=torch.uint8)
    packed = [torch._convert_weight_to_int4pack(codes, 8) for _ in _count(4, rows, columns)]
    scales = torch.rand(columns // 128, rows, 2, device="cuda", dtype=torch.bfloat16)
    return [lambda x, w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in packed]  # type: ignore[misc]


def _gemlite(rows: int, columns: int) -> list[Callable[[Tensor], Tensor]]:
    from gemlite.helper import A16Wn

    codes = torch.randint(0, 16, (rows, columns), device="cuda", dtype=torch.uint8)
    scale = torch.rand(rows, columns // 128, device="cuda", dtype=torch.bfloat16)
    zero = torch.full_like(scale, 8)
    maker = A16Wn(device="cuda:0", dtype=torch.bfloat16)
    return [maker.from_weights(codes, scale, zero, 4, 128) for _ in _count(4, rows, columns)]


def _spqr_quant(rows: int, columns: int) -> list[Callable[[Tensor], Tensor]]:
    """The kernel of SpQR's authors, which is given as many outliers; 8 bytes hold 16 weights of a row."""
    from spqr_quant.inference import FeatureFlags

    share, flags = JOBS["SpQR"].outliers, int(FeatureFlags.SPARSE_FUSED_FP32_ASYNC)
    row_ptr = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * round(share * columns)
    x, y = (torch.randn(size, device="cuda").half() for size in (columns, rows))
    calls = []
    for _ in _count(4, rows, columns):
        octets = torch.randint(0, 256, (rows * columns // 16, 8), device="cuda", dtype=torch.uint8)
        entries = random_outliers(share, rows, columns).operation()[1][0]  # type: ignore[index]
        sizes = (rows, columns, 3, 16, 16, octets.view(torch.int64).flatten(), row_ptr, entries, entries.numel())
        call = functools.partial(torch.ops.spqr_cuda.spqr_mul, *sizes, x, flags, y, y)  # in float16, not the input
        calls.append(lambda _, call=call: call())
    return calls  # type: ignore[return-value]


def _marlin(rows: int, columns: int) -> list[Callable[[Tensor], Tensor]]:
    """Groups of 128, activations in float16, the only ones it takes."""
    import marlin

    scales = torch.rand(columns // 128, rows, device="cuda").half()
    locks = torch.zeros(rows // 128 * 16, device="cuda", dtype=torch.int32)

    @functools.cache
    def room(tokens: int) -> tuple[Tensor, Tensor]:
        return torch.randn(tokens, columns, device="cuda").half(), torch.empty(tokens, rows, device="cuda").half()

    def product(codes: Tensor, x: Tensor) -> Tensor:
        given, result = room(len(x))
        marlin.mul(given, codes, result, scales, locks)
        return result

    tiles = (columns // 16, rows * 2)
    copies = [torch.randint(-(1 << 31), 1 << 31, tiles, device="cuda").int() for _ in _count(4, rows, columns)]
    return [functools.partial(product, codes) for codes in copies]


def _bitsandbytes(rows: int, columns: int) -> list[Callable[[Tensor], Tensor]]:
    """NF4 in groups of 64 with scales of 32 bits, for which it has a kernel of its own for one token."""
    import bitsandbytes

    copies = []
    for _ in _count(4, rows, columns):
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        copies.append(bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    return [lambda x, c=c: bitsandbytes.matmul_4bit(x, c[0].t(), quant_state=c[1]) for c in copies]  # type: ignore[misc]


def triton_time(weights: Weights, x: Tensor) -> float | None:
    """The best time of the portable kernel."""
    from rarefy.kernels.triton import linear as portable

    if not portable.fits(weights.code):
        return None
    expected, times = weights.product(x), []
    for tiles, split, warps, stages in ((8, 4, 4, 3), (16, 2, 8, 3)):
        tuning = portable.Tuning(tiles, max(16, min(64, 1 << (x.shape[0] - 1).bit_length())), split, warps, stages)
        calls = [
            functools.partial(
                portable.linear, weights.code, tuning, x, copy["codes"], copy["scale"], copy.get("zero"), weights.rows
            )
            for copy in weights.copies
        ]
        if relative(calls[0](), expected) < 1e-2:
            times.append(microseconds({"": (graph_of(calls), len(calls))}, 5)[""])
    return min(times, default=None)


BYTES = {"fp8 activations and weights": ("fp8", False), "fp8 activations, W4": ("W4", False)}
BYTES["fp8 activations and weights, after a norm"] = ("fp8", True)


def byte_rows(job: str, tokens: int, rows: int, columns: int) -> list[Row]:
    """Activations quantized, after a norm if that is measured too, then multiplied as bytes, against the bf16 layer."""
    from rarefy.kernels.triton.step import PLAIN, Gain, add_norm

    grid, normed = BYTES[job]
    term = random_term(JOBS[grid].grid, rows, columns)
    made = cuda.prepare(*term.operation())  # type: ignore[misc]
    copies = [replace(made, tensors={name: each.clone() for name, each in made.tensors.items()}) for _ in range(4)]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    gain = torch.rand(columns, device="cuda", dtype=torch.bfloat16) + 0.5

    def in_bytes(own: Any) -> tuple[Tensor, Tensor]:
        found = _in_bytes(terms_of(*flat([own])[:3])[0], x)
        assert found is not None, "too few tokens"
        return found

    codes, step = quantize_tokens(x)

    def product(own: Any) -> Tensor:
        return _scaled(*quantize_tokens(x, gain, EPS), in_bytes(own)) if normed else cuda.linear(x, [own], True)

    def plain(weight: Callable[[Tensor], Tensor]) -> Tensor:
        return weight(add_norm(x, Gain(gain, EPS, PLAIN)) if normed else x)

    values = x.double()
    if normed:
        values = values * (values.square().mean(1, keepdim=True) + EPS).rsqrt() * gain.double()
    error = relative(product(made), values @ term.decode().double().T)
    dense = _bf16(rows, columns)[:4]
    alone = [functools.partial(_scaled, codes, step, in_bytes(own)) for own in copies]
    times = microseconds(
        {
            "ours": (graph_of([functools.partial(product, own) for own in copies]), len(copies)),
            "bf16": (graph_of([functools.partial(plain, weight) for weight in dense]), len(dense)),
            "_scaled_mm alone": (graph_of(alone), len(alone)),
        },
        15,
    )
    rounded = {name: round(each, 1) for name, each in times.items()}
    print(f"{job} {rows}x{columns} M={tokens}", rounded, f"error {error:.1e}", flush=True)
    return [{
        "goal": "G10", "job": job, "rows": rows, "columns": columns, "tokens": tokens,
        "peer": "bf16", "microseconds": round(times["ours"], 2), "peer_microseconds": round(times["bf16"], 2),
        "ratio": round(times["bf16"] / times["ours"], 3), "ratio_to_bf16": round(times["bf16"] / times["ours"], 3),
        "fraction_of_limit": round(times["_scaled_mm alone"] / times["ours"], 3), "max_rel_error": error,
        "bits_per_weight": round(term.byte_count().total * 8 / rows / columns, 3),
        "note": "all but the weight is made in the time; the limit is the library's product of bytes alone; "
                f"{2 * tokens * rows * columns / times['ours'] / 1e6:.0f} TFLOP/s",
    }]  # fmt: skip


def kept_terms(rows: int, columns: int) -> dict[str, tuple[Term, tuple[str, ...]]]:
    """Weights of which half is kept, and what each is held against."""

    def codes_of(group: int, pattern: Groups | NM, mask: Tensor) -> Term:
        codes = torch.randint(0, 16, (rows, columns), device="cuda", dtype=torch.uint8)
        scale = ((0.5 + torch.rand(rows, columns // group, device="cuda")) / 64).half()
        grid = IntegerGrid(num_bits=4, group_size=group)
        return Quantized.from_codes(codes, {"scale": scale}, grid, pattern=pattern, mask=mask)

    def half_of(size: int, count: int = columns) -> Tensor:
        """Of each ``size`` neighbours among ``count`` a half."""
        order = torch.rand(rows, count // size, size, device="cuda").argsort(2)
        return (order < size // 2).flatten(1)

    values = torch.randn(rows, columns, device="cuda")
    groups = half_of(columns // 16, columns // 16).repeat_interleave(16, 1)
    return {
        "W4, half of the groups of 16": (codes_of(16, Groups(size=16, index="bitmap"), groups), ("W4 g128", "W4 g16")),
        "W4 2:4": (codes_of(128, NM(n=2, m=4, index="rank"), half_of(4)), ("W4 g128",)),
        "16 bits 2:4": (Sparse.from_weight(values, half_of(4), NM(n=2, m=4, index="rank"), "bfloat16"), ("bf16",)),
        "16 bits, half": (Sparse.from_weight(values, half_of(columns), Bitmap(), "bfloat16"), ("bf16",)),
    }  # fmt: skip


def kept_rows(rows: int, columns: int, limit: float) -> list[Row]:
    """Weights of which half is kept, one token, against all of them."""
    found: list[Row] = []
    x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
    dense, kept = {}, []
    for group in (128, 16):
        weights = Weights(Job(IntegerGrid(num_bits=4, group_size=group)), rows, columns)
        calls, _ = weights.calls(tuning_tables.choose(weights.code, rows, columns, 1, x.device), x)
        kept.append((weights, calls))  # a graph does not
        dense[f"W4 g{group}"] = graph_of(calls), len(calls)
    products = _bf16(rows, columns)
    dense["bf16"] = graph_of([functools.partial(product, x) for product in products]), len(products)
    for name, (term, peers) in kept_terms(rows, columns).items():
        made, size = cuda.prepare(*term.operation()), term.byte_count().total  # type: ignore[misc]
        error = relative(cuda.linear(x, [made]), x.double() @ term.decode().double().T)
        count = max(2, -(-int(EVERYWHERE) // size))
        copies = [
            replace(made, tensors={name: tensor.clone() for name, tensor in made.tensors.items()}) for _ in range(count)
        ]
        ours = graph_of([functools.partial(cuda.linear, x, [own]) for own in copies]), count
        times = microseconds({**dense, "ours": ours}, 9)
        print(f"{name} {rows}x{columns}", {each: round(value, 1) for each, value in times.items()}, error, flush=True)
        for peer in peers:
            found.append({
                "goal": "G8", "job": name if peer == peers[0] else f"{name}, beside {peer}", "rows": rows,
                "columns": columns, "tokens": 1, "peer": f"own {peer}" if peer != "bf16" else peer,
                "microseconds": round(times["ours"], 2), "peer_microseconds": round(times[peer], 2),
                "ratio": round(times[peer] / times["ours"], 3),
                "ratio_to_bf16": round(times["bf16"] / times["ours"], 3),
                "fraction_of_limit": round(size / limit / times["ours"], 3), "max_rel_error": error,
                "bits_per_weight": round(size * 8 / rows / columns, 3), "note": "half of the weights are kept",
            })  # fmt: skip
    return found


def _scaled(codes: Tensor, step: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
    return torch._scaled_mm(
        codes, weight[0].t(), step.unsqueeze(1), weight[1].unsqueeze(0), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trials", type=Path, help="keep the times of everything that was tried here")
    parser.add_argument("--seconds", type=float, default=1800, help="stop trying after so many")
    parser.add_argument("--most", type=int, default=48, help="tunings to try; 0: what is chosen without trying")
    parser.add_argument("--jobs", default=DEFAULT, help="names and tokens: 'W4@1,16; W3@1'")
    parser.add_argument("--shapes", default=",".join(f"{rows}x{columns}" for rows, columns in SHAPES))
    parser.add_argument("--gemlite", default="1,16,64", help="numbers of tokens for which gemlite is a peer")
    parser.add_argument("--spqr-quant", action="store_true", help="one token of SpQR beside its authors' kernel")
    parser.add_argument("--marlin", action="store_true", help="W4 beside Marlin")
    parser.add_argument("--bitsandbytes", action="store_true", help="NF4 beside bitsandbytes")
    parser.add_argument("--triton", action="store_true", help="time the portable kernel too")
    parser.add_argument("--fp8", default="", help="numbers of tokens whose activations are quantized too")
    parser.add_argument("--narrow", action="store_true", help="leave out what only some GPUs can do")
    parser.add_argument("--groups", action="store_true", help="time weights of which half is kept too")
    parser.add_argument("--tune", type=Path, help="write the best of what was tried there, as a table of the package")
    options = parser.parse_args()
    torch.manual_seed(0)
    trials = Trials([], time.monotonic() + options.seconds, options.narrow)
    limit = bandwidth()
    print(f"copy {limit / 1e6:.2f} TB/s", flush=True)
    shapes = [tuple(map(int, each.split("x"))) for each in options.shapes.split(",")]
    jobs = []
    for each in filter(None, options.jobs.split(";")):
        name, _, counts = each.strip().partition("@")
        jobs.append((name, [int(count) for count in counts.split(",")]))
    if options.quick:
        shapes, jobs = shapes[:1], jobs[:1]

    def keep(rows: list[Row]) -> None:
        if options.trials:
            options.trials.write_text(json.dumps(trials.rows) + "\n", "utf-8")
        if options.tune:
            options.tune.write_text(json.dumps({"entries": trials.entries}, indent=1) + "\n", "utf-8")
        write(options, rows, KEY)

    for height, width in shapes:
        others = [name for name in ("gemlite", "spqr_quant", "marlin", "bitsandbytes") if getattr(options, name)]
        peers = peers_of(["bf16", "tinygemm", *others], height, width)
        for name, counts in jobs:
            weights = Weights(JOBS[name], height, width)
            for tokens in counts:
                if time.monotonic() < trials.deadline:
                    keep(measured(name, weights, tokens, peers, options, trials, limit))
        if options.groups:
            keep(kept_rows(height, width, limit))
        for tokens in map(int, filter(None, options.fp8.split(","))):
            for job in BYTES:
                keep(byte_rows(job, tokens, height, width))


def measured(
    name: str, weights: Weights, tokens: int, peers: dict[str, list[Callable[[Tensor], Tensor]]], options: Any,
    trials: Trials, limit: float,
) -> list[Row]:  # fmt: skip
    """The row of one product."""
    height, width = weights.rows, weights.columns
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    tuning = None
    if tokens <= most_tokens([weights.term], x.device):
        if options.most:
            tuning = trials.best(name, weights, x, 16 if options.quick else options.most)
        else:
            tuning = tuning_tables.choose(weights.code, height, width, tokens, x.device)
        if tuning is None:
            return []
    known, beside = options.gemlite.split(","), JOBS[name].beside if tokens <= 16 else ""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for peer, products in peers.items():
        knows = {
            "gemlite": str(tokens) in known, "tinygemm": tokens <= MOST_OF_TINYGEMM,
            "spqr_quant": (name, tokens) == ("SpQR", 1), "marlin": name == "W4", "bitsandbytes": name == "NF4 g64",
        }  # fmt: skip
        if knows.get(peer, True):
            graphs[peer] = graph_of([functools.partial(product, x) for product in products]), len(products)
    if tuning is not None:
        calls, y = weights.calls(tuning, x)
        calls[0]()
    else:  # what the layer does: a dequantized weight and the library, which no cache of codes helps
        calls = [functools.partial(cuda.linear, x, weights.made)] * 3
        y = calls[0]()
    error = relative(y, weights.product(x))
    if beside:
        other = _kept_weights(beside, height, width)
        own, _ = other.calls(tuning_tables.choose(other.code, height, width, tokens, x.device), x)
        graphs[f"own {beside}"] = graph_of(own), len(own)
    graphs["ours"] = graph_of(calls), len(calls)
    times = microseconds(graphs, 9)
    if options.triton and (portable := triton_time(weights, x)):
        times["triton"] = portable
    size, ours = weights.nbytes + 2 * tokens * (height + width), times["ours"]
    peer = min((each for each in peers if each in times), key=lambda each: times[each])
    row = {
        "goal": JOBS[name].goals[sum(tokens > most for most in (1, 16, 64))], "job": name, "rows": height,
        "columns": width, "tokens": tokens, "peer": peer, "microseconds": round(ours, 2),
        "peer_microseconds": round(times[peer], 2), "ratio": round(times[peer] / ours, 3),
        "ratio_to_bf16": round(times["bf16"] / ours, 3), "fraction_of_limit": round(size / limit / ours, 3),
        "max_rel_error": error, "bits_per_weight": round(weights.nbytes * 8 / height / width, 3),
        "others": {each: round(value, 2) for each, value in times.items() if each != "ours"},
        "note": f"{tuning or 'dequantized'}; copy {limit / 1e6:.2f} TB/s",
    }  # fmt: skip
    print(f"{name} {height}x{width} M={tokens}: {ours:.1f} us, {row['fraction_of_limit']} of the limit, "
          f"{row['ratio_to_bf16']}x bf16, {row['others']}, error {error:.1e}, {tuning}", flush=True)  # fmt: skip
    rows: list[Row] = [row]
    for other in (f"own {beside}", "spqr_quant", "marlin", "bitsandbytes"):
        if other in times:
            rows.append({
                **row, "job": f"{name}, beside {other.removeprefix('own ')}", "peer": other,
                "ratio": round(times[other] / ours, 3), "peer_microseconds": round(times[other], 2),
            })  # fmt: skip
    return rows


@functools.lru_cache(maxsize=1)
def _kept_weights(name: str, rows: int, columns: int) -> Weights:
    """Those of a job that others are timed beside."""
    return Weights(JOBS[name], rows, columns)


if __name__ == "__main__":
    main()
