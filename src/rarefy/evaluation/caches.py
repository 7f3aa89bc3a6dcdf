"""What coding the KV cache costs: one model with several caches on the same windows, against itself with the dense one.

A forward pass over a whole window says nothing about a cache, because tokens attend to their own pass exactly. So every
number says which *regime* it was measured in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rarefy.core.config import StrictModel
from rarefy.core.errors import OptionError
from rarefy.core.progress import progress
from rarefy.evaluation.bootstrap import Interval, paired_interval
from rarefy.evaluation.candidates import check_causal
from rarefy.evaluation.forward import new_cache, step
from rarefy.evaluation.scoring import Scorer

Regime = Literal["chunked", "decode", "distorted"]


class CacheMaker(Protocol):
    """Makes an empty coded cache; unless ``exact_arrival``, the pass that brings a block reads it from its codes."""

    def __call__(self, model: Any, *, exact_arrival: bool = True) -> Any: ...


class CacheProtocol(StrictModel):
    """How the caches were read. ``chunked``: windows go through in pieces of ``chunk`` tokens, each reading what was
    kept of those before. ``decode``: the first ``prefill`` tokens at once, then token by token, of which alone
    predictions count. ``distorted``: all at once, every whole block read from its codes, as papers simulate it."""

    regime: Regime = "chunked"
    chunk: int = 64
    prefill: int = 0
    context: int
    windows: int
    dtype: str
    text: str = ""

    def describe(self) -> str:
        """One line for tables."""
        how = {
            "chunked": f"chunked, {self.chunk} tokens at a time",
            "decode": f"decode after {self.prefill} tokens",
            "distorted": "distorted, blocks read from codes at once",
        }[self.regime]
        return f"{how}; context {self.context}, {self.windows} windows, {self.dtype}, {self.text}"


class CacheEvaluation(StrictModel):
    """One cache. ``nll`` and ``kl`` (dense cache || this one) in nats per predicted token; ``gap``: its nll less that
    of the dense cache, and ``versus_first`` less that of the first cache, paired by windows. ``bits`` per number of
    keys and values by part, as measured after a window, where what is exact counts 16 bits; ``shared_bytes`` on top."""

    name: str
    nll: float
    kl: float
    top1_agreement: float
    gap: Interval | None
    versus_first: Interval | None
    bits: dict[str, float]
    shared_bytes: int
    seconds: float


class CacheComparison(StrictModel):
    """Several caches of ``model`` on the same windows."""

    model: str
    protocol: CacheProtocol
    dense_nll: float
    dense_seconds: float
    tokens: int
    caches: list[CacheEvaluation]


def compare_caches(
    model: Any, name: str, windows: Tensor, makers: Mapping[str, CacheMaker], protocol: CacheProtocol,
    batch_size: int = 1,
) -> CacheComparison:  # fmt: skip
    """Measure the caches of ``makers`` by name on ``windows`` (LongTensor [count, context]).

    The dense cache goes through the model in the same pieces, ``batch_size`` windows at a time. Raises OptionError
    where the regime leaves nothing to measure.
    """
    check_causal(model, name)
    protocol = protocol.model_copy(
        update={"context": windows.shape[1], "windows": windows.shape[0], "dtype": str(model.dtype).split(".")[-1]}
    )
    first = _first_scored(protocol)
    scorer, sums = Scorer(), {label: _Sums() for label in makers}
    dense_nll: list[float] = []
    dense_seconds = 0.0
    with progress("evaluate caches", len(windows) * (1 + len(makers))) as advance:
        for tokens in windows.split(batch_size):
            begin = time.perf_counter()
            expected, _ = _run(model, tokens, None, protocol)
            dense_seconds += time.perf_counter() - begin
            for row, target in enumerate(tokens[:, first + 1 :]):
                dense_nll.append(float(scorer.score(expected[row, first:-1], target).nll.double().mean()))
            advance(len(tokens), note="dense")
            for label, maker in makers.items():
                begin = time.perf_counter()
                logits, cache = _run(model, tokens, maker, protocol)
                sums[label].seconds += time.perf_counter() - begin
                for row, target in enumerate(tokens[:, first + 1 :]):
                    scores = scorer.score(logits[row, first:-1], target, expected[row, first:-1])
                    assert scores.kl is not None and scores.agree is not None
                    sums[label].add(scores.nll, scores.kl, scores.agree, cache)
                advance(len(tokens), note=label)
    baseline = next(iter(sums.values())).nll if sums else []
    return CacheComparison(
        model=name,
        protocol=protocol,
        dense_nll=sum(dense_nll) / len(dense_nll),
        dense_seconds=dense_seconds,
        tokens=len(windows) * (windows.shape[1] - 1 - first),
        caches=[
            own.result(label, dense_nll, None if own.nll is baseline else baseline) for label, own in sums.items()
        ],
    )


class _Sums:
    """What one cache adds up to, by window."""

    def __init__(self) -> None:
        self.nll: list[float] = []
        self.kl: list[float] = []
        self.agree: list[float] = []
        self.bits: dict[str, float] = {}
        self.shared_bytes = 0
        self.seconds = 0.0

    def add(self, nll: Tensor, kl: Tensor, agree: Tensor, cache: Any) -> None:
        self.nll.append(float(nll.double().mean()))
        self.kl.append(float(kl.double().mean()))
        self.agree.append(float(agree.double().mean()))
        self.bits, self.shared_bytes = cache.bits(exact=16), cache.shared_bytes()

    def result(self, name: str, dense: Sequence[float], baseline: Sequence[float] | None) -> CacheEvaluation:
        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        return CacheEvaluation(
            name=name, nll=mean(self.nll), kl=max(0.0, mean(self.kl)), top1_agreement=mean(self.agree),
            gap=paired_interval(self.nll, dense),
            versus_first=None if baseline is None else paired_interval(self.nll, baseline),
            bits=self.bits, shared_bytes=self.shared_bytes, seconds=self.seconds,
        )  # fmt: skip


def _first_scored(protocol: CacheProtocol) -> int:
    """The first position whose prediction counts: none before it reads anything from codes."""
    first = protocol.prefill if protocol.regime == "decode" else 0
    if first + 1 >= protocol.context:
        raise OptionError(
            f"Nothing is left to decode after {first} of {protocol.context} tokens; use a smaller --prefill."
        )
    return first


@torch.inference_mode()
def _run(model: Any, tokens: Tensor, maker: CacheMaker | None, protocol: CacheProtocol) -> tuple[Tensor, Any]:
    """Logits [B, T, V] of ``tokens`` [B, T], and the cache that then holds them."""
    past = new_cache(model, None) if maker is None else maker(model, exact_arrival=protocol.regime != "distorted")
    if protocol.regime == "distorted":
        pieces = [tokens]
    elif protocol.regime == "chunked":
        pieces = list(tokens.split(protocol.chunk, 1))
    else:
        pieces = [tokens[:, : protocol.prefill]] if protocol.prefill else []
        pieces += list(tokens[:, protocol.prefill :].split(1, 1))
    return torch.cat([step(model, piece, past) for piece in pieces], 1), past
