"""How fast models write: prefill, decode and first token, taken in turns so that a busy machine is busy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from rarefy.core.config import StrictModel
from rarefy.core.progress import progress
from rarefy.kernels.cpu import library

READ_BYTES = 1 << 28  # beyond every cache


class Decoder(Protocol):
    """Something that continues a sequence greedily. ``step_bytes``: of weights that one token has to read.

    ``memory_bytes``: what holding it took, with its first run, if that was measured.
    """

    name: str
    executor: str
    step_bytes: int
    memory_bytes: int | None

    def start(self, tokens: Sequence[int]) -> int:
        """Begin anew with ``tokens``; the token that follows."""

    def write(self, token: int, count: int) -> list[int]:
        """Go on with ``token``; the ``count`` tokens that follow."""


class Speed(StrictModel):
    """Medians over rounds. ``decode_ratio`` and ``prefill_ratio``: this one's time / the first one's, above 1 where the
    first is faster. ``fraction_of_read``: time to stream ``step_bytes`` from memory / time of a step."""

    name: str
    executor: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    step_bytes: int
    memory_bytes: int | None
    decode_ratio: float
    prefill_ratio: float
    fraction_of_read: float


class SpeedComparison(StrictModel):
    """Rows in the order given, with what they ran on: ``read_bytes_per_second`` of one streaming thread, or of the
    GPU."""

    rows: tuple[Speed, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    read_bytes_per_second: float


def measure(
    decoders: Sequence[Decoder], prompt: Sequence[int], new_tokens: int, rounds: int, *, warm: int = 1,
    read: Callable[[], float] | None = None,
) -> SpeedComparison:  # fmt: skip
    """Time ``rounds`` rounds, after ``warm`` untimed ones, in each of which every decoder reads ``prompt`` and then
    takes ``new_tokens`` steps. The order turns from round to round; memory bandwidth is measured between them, by
    ``read`` (None: `read_bandwidth`)."""
    prefill: list[list[float]] = [[] for _ in decoders]
    decode: list[list[float]] = [[] for _ in decoders]
    reads = []
    with progress("bench", (warm + rounds) * len(decoders), live=False) as advance:
        for turn in range(warm + rounds):
            if turn >= warm:
                reads.append((read or read_bandwidth)())
            for place in range(len(decoders)):
                index = (place + turn) % len(decoders)
                first, step = _once(decoders[index], prompt, new_tokens)
                if turn >= warm:
                    prefill[index].append(first)
                    decode[index].append(step)
                advance(note=decoders[index].name)
    bandwidth = statistics.median(reads)
    firsts, steps = ([statistics.median(times) for times in each] for each in (prefill, decode))
    rows = tuple(
        Speed(
            name=decoder.name, executor=decoder.executor, prefill_tokens_per_second=len(prompt) / first,
            decode_tokens_per_second=1 / step, first_token_seconds=first, step_bytes=decoder.step_bytes,
            memory_bytes=decoder.memory_bytes, decode_ratio=step / steps[0], prefill_ratio=first / firsts[0],
            fraction_of_read=decoder.step_bytes / bandwidth / step,
        )
        for decoder, first, step in zip(decoders, firsts, steps, strict=True)
    )  # fmt: skip
    return SpeedComparison(
        rows=rows, prompt_tokens=len(prompt), new_tokens=new_tokens, rounds=rounds, threads=torch.get_num_threads(),
        read_bytes_per_second=bandwidth,
    )  # fmt: skip


def read_bandwidth() -> float:
    """Bytes a second that one thread reads from memory: the best of three passes over 256 MB."""
    data = torch.ones(READ_BYTES // 4)
    read: Callable[[torch.Tensor], object] = library.read if library.available() else torch.sum
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            read(data)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return READ_BYTES / min(times)


def gpu_read_bandwidth() -> float:
    """Bytes a second that the GPU reads from its memory: the best of three sums over 1 GB."""
    data = torch.ones(READ_BYTES, device="cuda")
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        data.sum()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return data.numel() * data.element_size() / min(times[1:])


def _once(decoder: Decoder, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Seconds of reading the prompt, and of a step after it."""
    begin = time.perf_counter()
    token = decoder.start(prompt)
    between = time.perf_counter()
    decoder.write(token, new_tokens)
    return between - begin, (time.perf_counter() - between) / new_tokens
