"""One sequence at a time through a model's program: feeding, going back, going on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.core.logs import logger
from rarefy.decoding import interpreter
from rarefy.decoding.batch import Batch, BatchExecutor
from rarefy.decoding.build import build
from rarefy.decoding.cache import DTYPES, KeyValues
from rarefy.decoding.native import Mode, NativeExecutor
from rarefy.decoding.program import Program
from rarefy.decoding.sampling import Sampling

log = logger(__name__)

# Tokens of a prompt that go through the program together on the CPU; more need more memory and gain no speed.
CHUNK = 256


class Executor(Protocol):
    """Runs a program. ``name`` says which code does, for reports; ``chunk``: tokens that it takes together."""

    name: str
    chunk: int

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """How it keeps keys and values of a model of ``dtype``."""

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether it can keep them in ``dtype``."""

    def __call__(self, tokens: Tensor, cache: KeyValues, *, every: bool = False) -> Tensor:
        """As ``interpreter.run``."""


class Interpreter:
    """The Torch executor: exact, and as fast as Torch is."""

    name = "torch"
    chunk = CHUNK

    def __init__(self, program: Program):
        self.program = program

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def keeps(self, dtype: torch.dtype) -> bool:
        return dtype in DTYPES

    def __call__(self, tokens: Tensor, cache: KeyValues, *, every: bool = False) -> Tensor:
        return interpreter.run(self.program, tokens, cache, every=every)


class Runner:
    """Decodes one sequence with ``model``, keeping its keys and values.

    ``mode``: ``exact`` keeps activations in 32 bits (in the model's dtype where Torch executes), ``fast`` may quantize
    them to 8. The native library executes, or Torch where it cannot, which is logged. ``cache_dtype``: of kept keys
    and values, by default the model's own, float16 where the library does not keep that; E4M3 only on GPUs and in
    Torch. A model that changes between calls is noticed: its program is built again and what was kept is forgotten.
    Raises UnsupportedError for a model that has no program, OptionError for a cache that its executor does not keep.
    """

    def __init__(self, model: Any, *, mode: Mode = "exact", cache_dtype: torch.dtype | None = None):
        if mode not in ("exact", "fast"):
            raise OptionError(f"The executor '{mode}' is unknown; use exact or fast.")
        self.model, self.mode = model, mode
        self._cache_dtype = cache_dtype
        self._build()

    @property
    def name(self) -> str:
        """What executes the program."""
        return self._execute.name

    @property
    def tokens(self) -> list[int]:
        """The sequence so far."""
        return list(self._tokens)

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return self.program.positions - len(self._tokens)

    def start(self, tokens: Tensor) -> Tensor:
        """Logits ``[1, vocabulary]`` after ``tokens`` [T] alone; what the last sequence shares is kept.

        Raises OptionError for no tokens, tokens outside the vocabulary, and more of them than the model has positions.
        """
        self._check(tokens)
        if self._state() != self._built_from:
            self._build()
        given = tokens.tolist()
        same = 0
        while same < min(len(given) - 1, len(self._tokens)) and given[same] == self._tokens[same]:
            same += 1
        self.crop(same)
        return self.extend(tokens[same:])

    def extend(self, tokens: Tensor, *, every: bool = False) -> Tensor:
        """Logits ``[1, vocabulary]`` after ``tokens`` [T] more, or of ``every`` one of them. Raises as ``start``."""
        self._check(tokens)
        self._check_room(len(tokens))
        parts = []
        for part in tokens.split(self._execute.chunk):
            parts.append(self._execute(part.to(self.model.device), self.cache, every=every))
            self._tokens += part.tolist()
        return torch.cat(parts) if every else parts[-1]

    @property
    def writes(self) -> bool:
        """Whether the executor chooses tokens itself, as `write` needs."""
        return isinstance(self._execute, BatchExecutor)

    def write(self, token: int, count: int, sampling: Sampling | None = None) -> list[int]:
        """``token``, which follows the sequence, and then the ``count`` tokens after it, chosen without the host; all
        but the last of these join the sequence. The most likely ones, or drawn as ``sampling`` says.

        Raises OptionError when they do not fit, UnsupportedError where the executor does not choose (see `writes`).
        """
        if not isinstance(self._execute, BatchExecutor):
            raise UnsupportedError(f"'{self.name}' does not choose tokens; use extend.")
        given = torch.tensor([token])
        self._check(given)
        self._check_room(count)
        written: list[int] = self._execute.write(given, self.cache, count, sampling)[0].tolist()
        self._tokens += [token, *written[:-1]]
        return written

    def batch(self, prompts: Sequence[Tensor]) -> Batch:
        """Several sequences beside this runner's own, each from its row of tokens on.

        Raises OptionError as ``start``, UnsupportedError where the executor does not choose tokens (see `writes`).
        """
        if not isinstance(self._execute, BatchExecutor):
            raise UnsupportedError(f"'{self.name}' takes one sequence; several need a GPU.")
        if self._state() != self._built_from:
            self._build()
        for prompt in prompts:
            self._check(prompt)
        device = self.model.device
        return Batch(self._execute, self.program, [each.to(device) for each in prompts], self.cache.keys.dtype, device)

    def crop(self, length: int) -> None:
        """Go back to the first ``length`` tokens."""
        self.cache.crop(length)
        del self._tokens[length:]

    def _build(self) -> None:
        self.program = build(self.model)
        self._execute = self._executor()
        self._built_from = self._state()  # layouts that the executor made included
        dtype = self._cache_dtype or self._execute.cache_dtype(self.model.dtype)
        if not self._execute.keeps(dtype):
            raise OptionError(f"'{self.name}' does not keep keys and values of this model in {dtype}; name another.")
        program = self.program
        self.cache = KeyValues(
            program.layers, program.kv_heads, program.head_dim, dtype, program.positions, self.model.device
        )
        self._tokens: list[int] = []

    def _executor(self) -> Executor:
        try:
            if self.model.device.type == "cpu":
                return NativeExecutor(self.program, self.mode)
            if find_spec("triton") is None:
                raise UnsupportedError("Triton is not installed.")
            from rarefy.decoding.graph import GraphExecutor

            return GraphExecutor(self.program)
        except UnsupportedError as reason:
            log.warning("Torch decodes, exactly: %s", reason)
            return Interpreter(self.program)

    def _state(self) -> list[tuple[int, int]]:
        """What changes when a tensor of the model is replaced or written to."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]

    def _check_room(self, count: int) -> None:
        if count > self.room:
            raise OptionError(
                f"{len(self._tokens) + count} tokens do not fit the model's {self.program.positions} positions; "
                "shorten the text."
            )

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens):
            raise OptionError(f"Tokens are a row of int64, not {list(tokens.shape)} of {tokens.dtype}; give some.")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.program.vocabulary:
            raise OptionError(f"Tokens lie outside the vocabulary of {self.program.vocabulary}; check the tokenizer.")
