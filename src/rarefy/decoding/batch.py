"""Several sequences that take their steps together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rarefy.core.errors import OptionError
from rarefy.decoding.cache import KeyValues, Sequences
from rarefy.decoding.program import Program
from rarefy.decoding.sampling import Sampling

STEP = 8  # sequences; kernels multiply by so many tokens at once, and each number of sequences is captured anew


@runtime_checkable
class BatchExecutor(Protocol):
    """An executor that advances several sequences by one token each in a step, and chooses the tokens itself."""

    def read(self, tokens: Tensor, cache: Sequences, number: int) -> Tensor:
        """Logits ``[1, vocabulary]`` after ``tokens`` [T] more of sequence ``number``."""

    def write(self, tokens: Tensor, cache: KeyValues, count: int, sampling: Sampling | None = None) -> Tensor:
        """The ``count`` tokens int64 ``[M, count]`` that follow ``tokens`` [M], of each sequence of ``cache``."""


class Batch:
    """``prompts``, each a row of tokens int64 ``[T]`` of its own length, and what is written after them.

    Places that `STEP` leaves empty take steps too, which nobody sees. Raises OptionError for a prompt without tokens.
    """

    def __init__(
        self, executor: BatchExecutor, program: Program, prompts: Sequence[Tensor], dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise OptionError("Every sequence of a batch needs at least one token.")
        self._executor, self._count = executor, len(prompts)
        places = len(prompts) if len(prompts) <= STEP else -(-len(prompts) // STEP) * STEP
        self._cache = Sequences(
            places, program.layers, program.kv_heads, program.head_dim, dtype, program.positions, device
        )
        for number, prompt in enumerate(prompts):
            if len(prompt) > 1:
                executor.read(prompt[:-1], self._cache, number)
        last = torch.zeros(places, dtype=torch.int64, device=device)
        last[: len(prompts)] = torch.stack([prompt[-1] for prompt in prompts])
        self._last = last

    def write(self, count: int, sampling: Sampling | None = None) -> Tensor:
        """The ``count`` next tokens int64 ``[sequences, count]``: the most likely, or drawn as ``sampling`` says.

        Raises OptionError when they do not fit the model's positions.
        """
        written = self._executor.write(self._last, self._cache, count, sampling)
        self._last = written[:, -1].contiguous()
        self._cache.lengths[self._count :] = [0] * (len(self._last) - self._count)
        return written[: self._count]
