"""The evaluation loop: windows stream through the reference and through every candidate; logits never pile up."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rarefy.core.errors import FormatError, OptionError, UnsupportedError
from rarefy.core.logs import logger
from rarefy.core.memory import available_bytes, peak_bytes
from rarefy.core.progress import progress
from rarefy.evaluation.candidates import Candidate, check_length, plan_passes
from rarefy.evaluation.forward import forward
from rarefy.evaluation.perplexity import perplexity
from rarefy.evaluation.protocol import Protocol
from rarefy.evaluation.results import Comparison, Evaluation, Sizes
from rarefy.evaluation.scoring import Scorer, Scores
from rarefy.layers.execution import Executor, executed, executing

log = logger(__name__)

# Tokens of one forward pass. Two CPU cores are busy with 512 already, and logits take context * vocabulary numbers.
CPU_TOKENS = 512
GPU_TOKENS = 8192


def evaluate(
    candidates: Sequence[Candidate],
    windows: torch.Tensor,
    protocol: Protocol,
    *,
    reference: Candidate | None = None,
    micro_batch: int | None = None,
    free_bytes: int | None = None,
) -> Comparison:
    """Perplexity of every candidate on ``windows`` (LongTensor [count, context]) and divergence from ``reference``.

    Each micro-batch of ``micro_batch`` windows (None: as many as suit device and context) goes through the reference
    once and then through the candidates. Candidates given as loaders are loaded as many at a time as ``free_bytes``
    allows (None: what the machine has free); the reference then runs once per such pass, and ``Comparison.passes`` says
    how often. Memory: the models of a pass plus two micro-batches of logits. BOS tokens are already part of
    ``windows``; ``protocol`` is recorded with each result, with context, windows and dtype as they were. Without
    candidates the reference alone is measured.

    Raises OptionError (shapes, tokens or contexts beyond the model), UnsupportedError (not a causal language model, or
    another vocabulary than the reference's), FormatError (logits that are not finite).
    """
    _check_request(candidates, windows, reference, micro_batch)
    free = available_bytes() if free_bytes is None else free_bytes
    passes = plan_passes(candidates, reference, free) or [[]]
    scorer = Scorer()
    dense = None if reference is None else _Subject(reference, scorer, protocol)
    subjects = [_Subject(candidate, scorer, protocol) for candidate in candidates]
    steps = windows.shape[0] * (len(candidates) + (len(passes) if dense else 0))
    with progress("evaluate", steps) as advance:
        if dense is not None:
            dense.open(windows)
        for number, group in enumerate(passes):
            present = [subjects[index] for index in group]
            for subject in present:
                subject.open(windows)
            everyone = present if dense is None else [dense, *present]
            batch = micro_batch or _micro_batch(everyone[0].model.device, windows.shape[1])
            with _evaluating([subject.model for subject in everyone]):
                for start in range(0, windows.shape[0], batch):
                    tokens = windows[start : start + batch]
                    expected = None
                    if dense is not None:
                        # Later passes need the reference's logits only: its own numbers are in the first.
                        expected = dense.step(tokens, start, None, count=number == 0)
                        advance(len(tokens), dense.speed())
                    for subject in present:
                        subject.step(tokens, start, expected)
                        advance(len(tokens), subject.speed())
            for subject in present:
                subject.close()
            gc.collect()  # models hold reference cycles, and the next pass needs their memory
    results = [subject.result(windows, protocol) for subject in subjects]
    if protocol.executor == "fast" and all(result.protocol.executor == "exact" for result in results):
        log.warning("No kernel here quantizes the activations of these models; everything runs exact.")
    return Comparison(
        candidates=results,
        reference=None if dense is None else dense.result(windows, protocol),
        passes=len(passes),
    )


class _Subject:
    """One model while it is measured: opened, run window by window, summed up, closed."""

    def __init__(self, candidate: Candidate, scorer: Scorer, protocol: Protocol):
        self.candidate = candidate
        self.name = candidate.name
        self.model: Any = None
        self._scorer, self._chunk, self._wanted = scorer, protocol.chunk, protocol.executor
        self._executor: Executor = "exact"
        self._nll = self._kl = self._seconds = 0.0
        self._agree = self._tokens = self._forwarded = self._peak = 0
        self._compared = False
        self._dtype = ""
        self._density: float | None = None

    def open(self, windows: torch.Tensor) -> None:
        self.model = self.candidate.open()
        self._dtype = str(self.model.dtype).removeprefix("torch.")
        _check_fits(self.model, self.name, windows)

    def close(self) -> None:
        self._density = self.candidate.share_read(self.model)
        self.model = None

    def step(self, tokens: torch.Tensor, first: int, expected: torch.Tensor | None, count: bool = True) -> torch.Tensor:
        """Run on ``tokens`` [B, T], windows ``first`` and on, add to the sums if ``count``; the logits [B, T, V]."""
        begin = time.perf_counter()
        with executing(self.model, self._wanted):
            logits = forward(self.model, tokens, cache=self.candidate.cache, chunk=self._chunk)
            self._executor = executed(self.model)
        if expected is not None and expected.shape[-1] != logits.shape[-1]:
            raise UnsupportedError(
                f"'{self.name}' predicts {logits.shape[-1]} tokens where the reference predicts {expected.shape[-1]}; "
                "compare models of one vocabulary."
            )
        if count:
            for index in range(tokens.shape[0]):
                against = None if expected is None else expected[index, :-1]
                self._add(self._scorer.score(logits[index, :-1], tokens[index, 1:], against), first + index)
        self._seconds += time.perf_counter() - begin
        self._forwarded += tokens.numel()
        self._peak = max(self._peak, _peak(logits.device))
        return logits

    def _add(self, scores: Scores, window: int) -> None:
        rows = [row for row in scores if row is not None]
        sums = torch.stack([row.double().sum() for row in rows]).tolist()
        if not all(map(math.isfinite, sums)):
            good = torch.stack([row.isfinite() for row in rows]).all(0)
            raise FormatError(
                f"'{self.name}' gives probabilities that are not finite at {int((~good).sum())} of {good.numel()} "
                f"positions of window {window}; load it in float32, and if that does not help, compress it again."
            )
        self._tokens += scores.nll.numel()
        self._nll += sums[0]
        if len(sums) == len(scores):
            self._compared = True
            self._kl += sums[1]
            self._agree += int(sums[2])

    def speed(self) -> str:
        return f"{self.name}: {self._forwarded / self._seconds:.0f} tokens/s"

    def result(self, windows: torch.Tensor, protocol: Protocol) -> Evaluation:
        count, context = windows.shape
        sizes = self.candidate.sizes or Sizes()
        return Evaluation(
            model=self.name,
            perplexity=perplexity(self._nll, self._tokens),
            nll=self._nll / self._tokens,
            # A divergence is never negative, but the rounding of its float32 terms may be.
            kl=max(0.0, self._kl / self._tokens) if self._compared else None,
            top1_agreement=self._agree / self._tokens if self._compared else None,
            tokens=self._tokens,
            protocol=protocol.model_copy(
                update={"context": context, "windows": count, "dtype": self._dtype, "executor": self._executor}
            ),
            bits_per_weight=sizes.bits_per_weight,
            stored_bytes=sizes.stored_bytes,
            dense_bytes=sizes.dense_bytes,
            seconds=self._seconds,
            tokens_per_second=self._forwarded / self._seconds,
            peak_bytes=self._peak,
            attention_density=self._density,
        )


def _check_request(
    candidates: Sequence[Candidate], windows: torch.Tensor, reference: Candidate | None, micro_batch: int | None
) -> None:
    if windows.ndim != 2 or windows.dtype != torch.long or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise OptionError(
            f"Windows have to be a LongTensor [count, context] with count >= 1 and context >= 2, not {windows.dtype} "
            f"{list(windows.shape)}; cut the tokens with rarefy.sources.windows."
        )
    if micro_batch is not None and micro_batch < 1:
        raise OptionError(f"micro_batch is {micro_batch}; use 1 or more, or None.")
    if not candidates and reference is None:
        raise OptionError("There is no model to evaluate; name at least one.")


def _check_fits(model: Any, name: str, windows: torch.Tensor) -> None:
    """Out-of-range ids and positions are an IndexError on a CPU, but on a GPU they end the process: look before."""
    config = model.config.get_text_config()
    vocab = getattr(config, "vocab_size", None)
    largest = int(windows.max())
    if vocab is not None and largest >= vocab:
        raise OptionError(
            f"The windows hold token {largest}, but '{name}' has a vocabulary of {vocab}; use its own tokenizer."
        )
    check_length(model, name, windows.shape[1])


def _micro_batch(device: torch.device, context: int) -> int:
    return max(1, (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // context)


def _peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_bytes()


@contextmanager
def _evaluating(models: Sequence[Any]) -> Iterator[None]:
    """Dropout off while measuring; models that were training go on training."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()
