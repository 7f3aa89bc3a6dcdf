"""The fastest way to cut work up, found by trying on the GPU at hand."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.kernels.cuda import program
from rarefy.kernels.cuda.code import Code
from rarefy.kernels.cuda.program import Tuning
from rarefy.kernels.cuda.tuning import (
    MOST_SHARED,
    MOST_SHARED_WIDE,
    can_be_stored,
    fits_registers,
    fitted,
    overlaps,
    stages_of,
    widths,
)

BEYOND_CACHE = 400e6  # bytes of copies that no GPU keeps on the chip
ROUNDS, WARM_UP = 7, 3
OVERLAPPED = 8  # of the fastest, which are tried again so
# By 8 tokens at once: warps across the rows, blocks over the columns, blocks that share tokens; likelier ones first.
FORMS = {
    2: [(8, 1, 1), (4, 4, 1), (4, 2, 1), (4, 1, 1), (8, 1, 2)],
    4: [(8, 1, 1), (4, 4, 1), (8, 2, 1), (4, 2, 1), (8, 1, 2)],
    8: [(8, 1, 1), (8, 2, 1), (4, 4, 1), (8, 4, 1), (8, 1, 2)],
    16: [(8, 1, 1), (8, 2, 1), (8, 1, 2), (8, 4, 1), (4, 2, 1)],
    32: [(8, 1, 1), (8, 2, 1), (8, 1, 2), (8, 4, 1), (8, 2, 2)],
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A product: what is stored, its tensors by name as ``program.arguments`` takes them, and the size."""

    code: Code
    tensors: Mapping[str, Tensor]
    rows: int
    columns: int
    second_rows: int = 1

    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def copies(self, nbytes: float = BEYOND_CACHE) -> list[dict[str, Tensor]]:
        """The tensors again and again, until they exceed ``nbytes``."""
        count = max(2, -(-int(nbytes) // self.nbytes()))
        return [{name: tensor.clone() for name, tensor in self.tensors.items()} for _ in range(count)]

    def calls(
        self, copies: list[dict[str, Tensor]], tuning: Tuning, x: Tensor
    ) -> tuple[list[Callable[[], None]], list[Tensor]]:
        """A call for each copy, and where each leaves its result."""
        found: list[Callable[[], None]] = []
        results: list[Tensor] = []
        for own in copies:
            y = torch.full((x.shape[0], self.rows), torch.nan, device=x.device, dtype=x.dtype)
            work = program.workspace(self.code, tuning, self.rows, x.shape[1], x.shape[0], x.device)
            given = program.arguments(
                {**own, **work, "x": x, "y": y}, rows=self.rows, columns=self.columns,
                tokens=x.shape[0], stride=x.stride(0), second_rows=self.second_rows,
            )  # fmt: skip
            results.append(y)

            def call(given: program.Arguments = given, kept: object = work) -> None:
                program.linear(self.code, tuning, given, x.dtype == torch.float16, x.device)

            found.append(call)
        return found, results


def candidates(code: Code, tokens: int, wide: bool = False, columns: int = 0) -> Iterator[Tuning]:
    """What may be fastest for so many tokens, likelier ones first; ``wide`` where four warps can multiply together, and
    bulk copies can bring weights of so many ``columns``."""
    through_memory = itertools.chain(_wide(code, tokens) if wide else (), _staged(tokens))
    every: list[Iterator[Tuning]] = [_direct(code, tokens), through_memory]
    if wide and tokens == 1 and columns:
        every.insert(0, _stored(code, columns))
    while every:  # in turns
        for tunings in list(every):
            tuning = next(tunings, None)
            if tuning is None:
                every.remove(tunings)
            elif tuning.shared_memory(code) <= (MOST_SHARED_WIDE if tuning.wide else MOST_SHARED):
                yield tuning


def _direct(code: Code, tokens: int) -> Iterator[Tuning]:
    """For few tokens: from memory to registers."""
    loads = code.step * code.bits // 256
    if tokens > 16:
        return
    if tokens == 1:
        likely = [(2, 1, 1, 8), (1, 2, 1, 8), (1, 2, 1, 16), (2, 2, 2, 4), (4, 1, 1, 8), (4, 2, 1, 8), (1, 1, 1, 16),
                  (1, 1, 1, 8), (2, 1, 2, 4), (2, 2, 1, 8), (1, 4, 1, 4), (1, 2, 1, 4)]  # fmt: skip
    else:
        likely = [(2, 1, 1, 4), (1, 1, 1, 4), (2, 1, 2, 4), (2, 1, 1, 8), (1, 1, 1, 8), (1, 2, 1, 8)]
    others = itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (8, 4, 16))
    for tiles, depth, across, along in dict.fromkeys([*likely, *others]):
        if across * along <= 16 and tiles * depth * loads <= 16 and (loads < 4 or tiles < 4):
            own = Tuning(tiles, -(-tokens // 8), across, along, depth, spread=tokens == 1)
            held = own.holding(code, tokens)
            yield held
            if code.shares_scales:  # many warps with few registers each
                yield replace(held, room=max(1, 24 // (across * along)))
            if held != own:
                yield own


def _stored(code: Code, columns: int) -> Iterator[Tuning]:
    """For one token: weights of a block at once."""
    likely = [(2, 2, 4), (1, 4, 4), (3, 1, 4), (4, 1, 4), (7, 1, 4)] if code.fits_planes else []
    others = [(1, 1, 8), (1, 1, 4), (2, 1, 4), (1, 2, 4), (2, 1, 8), (4, 1, 4), (2, 2, 4), (1, 2, 8), (1, 1, 16)]
    for tiles, across, along in dict.fromkeys([*likely, *others]):
        for depth in (4, 2, 1) if code.fits_planes else (1, 2):
            own = Tuning(tiles, 1, across, along, depth, spread=True, stored=True)
            if can_be_stored(code, own, columns):
                yield own


def _staged(tokens: int) -> Iterator[Tuning]:
    """For many: through shared memory."""
    width = -(-tokens // 8)
    if tokens <= 4:
        return
    for at_once in sorted({min(width, most) for most in (16, 8)}, reverse=True):
        for tiles in (2, 1, 4):
            for across, along in ((8, 1), (4, 1), (4, 2), (8, 2)):
                for stages, split in ((4, 1), (4, 2), (3, 1), (3, 2), (4, 4)):
                    if tiles * at_once <= 16:
                        yield Tuning(tiles, at_once, across, along, 1, stages, split)


def _wide(code: Code, tokens: int) -> Iterator[Tuning]:
    """For many, four warps together: all tokens at once or, which leaves more blocks, half of them or less."""
    if tokens <= 8:
        return
    for place in range(5):
        for at_once in widths(tokens):
            across, split, cluster = FORMS[at_once][place]
            own = Tuning(1, at_once, across, 1, 2, stages_of(at_once, across), split, wide=True, cluster=cluster)
            if code.can_rescale and (at_once >= 16 or (at_once == 8 and across == 4)):
                own = replace(own, rescaled=True, in_turns=at_once > 16)
            if fits_registers(own) and own.suits(code):
                yield fitted(code, own)


def takes_wide(device: torch.device) -> bool:
    """Whether four warps can multiply together."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def fastest(problem: Problem, x: Tensor, most: int = 64) -> tuple[Tuning, dict[Tuning, float]]:
    """The best of at most ``most`` candidates for ``x [tokens, columns]``, and microseconds of all that ran.

    Raises UnsupportedError when none of them compiles.
    """
    every = candidates(problem.code, x.shape[0], takes_wide(x.device), problem.columns)
    tried = list(itertools.islice(every, most))
    half = x.dtype == torch.float16

    def compiles(tuning: Tuning) -> bool:
        try:
            program.compiled(problem.code, tuning, half, x.device)
        except UnsupportedError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        tried = [tuning for tuning, works in zip(tried, pool.map(compiles, tried), strict=True) if works]
    copies, times = problem.copies(), {}

    def measure(tuning: Tuning) -> None:
        calls, _ = problem.calls(copies, tuning, x)
        times[tuning] = microseconds({"": (graph_of(calls), len(calls))}, ROUNDS)[""]

    for tuning in tried:
        measure(tuning)
    if overlaps(x.device):
        for tuning in sorted(times, key=lambda each: times[each])[:OVERLAPPED]:
            measure(replace(tuning, overlap=True))
        best = min(times, key=lambda each: times[each])
        if best.overlap and not best.wide:
            measure(replace(best, late=True))
    if not times:
        raise UnsupportedError("No form of the kernel compiles for this GPU.")
    return min(times, key=lambda each: times[each]), times


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls, warmed up, as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(graphs: Mapping[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Median time of one call in each graph (of so many), in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + WARM_UP):
        for name, (graph, count) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if number >= WARM_UP:
                times[name].append(begin.elapsed_time(end) * 1e3 / count)
    return {name: statistics.median(each) for name, each in times.items()}
