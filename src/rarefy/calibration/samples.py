"""Calibration data: what a model eats, cut into batches."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import OptionError
from rarefy.core.logs import logger
from rarefy.layers.checkpoint import digest_of

log = logger(__name__)

Batch = dict[str, Tensor]
GIVEN = "samples given by the caller"


@dataclass(frozen=True)
class Samples:
    """Batches of model inputs (``input_ids``, ``pixel_values``, ...), each tensor with the samples in front.

    ``name`` is for reports; ``notes`` say what was asked for and could not be had.
    """

    batches: tuple[Batch, ...]
    name: str
    notes: tuple[str, ...] = field(default=())

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(_size(batch) for batch in self.batches)

    @property
    def positions(self) -> int:
        """Tokens of all samples; for models that read no tokens an estimate."""
        return sum(_size(batch) * _length(batch) for batch in self.batches)

    def describe(self) -> str:
        """``C4 and Wikipedia sample, 128 x 512 tokens``."""
        lengths = {batch["input_ids"].shape[1] for batch in self.batches if "input_ids" in batch}
        if not lengths:
            return f"{self.name}, {self.count} samples"
        span = f"{min(lengths)}" if len(lengths) == 1 else f"{min(lengths)}-{max(lengths)}"
        return f"{self.name}, {self.count} x {span} tokens"

    def identity(self) -> str:
        """A hash of all tensors."""
        parts = [f"{name}{digest_of(tensor)}" for batch in self.batches for name, tensor in sorted(batch.items())]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def first(self, count: int) -> Samples:
        """The first ``count`` samples."""
        batches, left = [], count
        for batch in self.batches:
            if left > 0:
                batches.append({name: tensor[:left] for name, tensor in batch.items()})
                left -= _size(batches[-1])
        return Samples(tuple(batches), self.name, self.notes)

    def part(self, index: int, parts: int) -> Samples:
        """Every ``parts``-th batch from ``index`` on: one rank's share."""
        return Samples(self.batches[index::parts], self.name, self.notes)

    def rebatch(self, tokens: int, parts: int = 1) -> Samples:
        """Batches of at most ``tokens`` positions (at least one sample each), and at least ``parts`` of them if there
        are as many samples. Samples of other lengths stay apart."""
        pieces: list[Batch] = []
        for batch in self.batches:
            step = max(1, min(tokens // max(1, _length(batch)), _size(batch) // parts))
            for start in range(0, _size(batch), step):
                pieces.append({name: tensor[start : start + step] for name, tensor in batch.items()})
        return Samples(tuple(pieces), self.name, self.notes)


def sample_windows(tokens: Tensor, samples: int, seq_len: int, bos: int | None, seed: int, name: str) -> Samples:
    """``samples`` windows of ``seq_len`` tokens drawn from a text's ``tokens [N]`` without overlap, in random order.

    A text with fewer windows gives all it has, one shorter than a window gives itself; both are noted. Raises
    OptionError when fewer than two tokens are left.
    """
    notes = []
    lead = 0 if bos is None else 1
    body = seq_len - lead
    if tokens.numel() < 2:
        raise OptionError(f"The calibration text '{name}' has {tokens.numel()} tokens; give a longer one (--data).")
    if body < 1 or seq_len < 2:
        raise OptionError(f"--seq-len {seq_len} leaves nothing to learn from; use 2 or more.")
    if tokens.numel() < body:
        notes.append(f"the calibration text has {tokens.numel()} tokens, fewer than one sequence of {seq_len}")
        body = tokens.numel()
    windows = tokens[: tokens.numel() // body * body].reshape(-1, body)
    if len(windows) < samples and not notes:
        notes.append(f"the calibration text holds {len(windows)} sequences of {seq_len} tokens, not {samples}")
    generator = torch.Generator().manual_seed(seed)
    chosen = windows[torch.randperm(len(windows), generator=generator)[:samples]]
    if bos is not None:
        chosen = torch.cat([chosen.new_full((len(chosen), 1), bos), chosen], dim=1)
    return Samples(({"input_ids": chosen},), name, tuple(notes))


def as_samples(data: Any) -> Samples:
    """``Samples`` from token ids ``[samples, tokens]``, or a sequence of mappings of model inputs.

    Raises OptionError for anything else.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, Tensor) and data.dim() == 2 and not data.is_floating_point():
        return Samples(({"input_ids": data.cpu()},), GIVEN)
    if isinstance(data, Sequence) and data and all(isinstance(batch, Mapping) for batch in data):
        batches = [{key: value.cpu() for key, value in batch.items() if isinstance(value, Tensor)} for batch in data]
        if all(batch and len({len(value) for value in batch.values()}) == 1 for batch in batches):
            return Samples(tuple(batches), GIVEN)
    raise OptionError(
        "Calibration data is a text file's name, token ids [samples, tokens], or a list of batches of model inputs "
        "whose tensors have the samples in front."
    )


def on_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """``batch`` on ``device``, its floating tensors in ``dtype``."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype) for name, tensor in batch.items()
    }


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _length(batch: Batch) -> int:
    """Positions of a sample; an image model's patches are not known here."""
    return batch["input_ids"].shape[1] if "input_ids" in batch else 256


def open_samples(data: Any, tokenizer: Any, config: Any, samples: int, seq_len: int, seed: int) -> Samples:
    """Calibration samples of a text, or as the caller gives them; ``tokenizer`` may be a function that finds it."""
    from rarefy.sources.texts import open_text
    from rarefy.sources.windows import begin_token, tokenize

    if not isinstance(data, str | Path):
        return as_samples(data)
    text = open_text(data, "calibration")
    tokenizer = tokenizer() if inspect.isfunction(tokenizer) else tokenizer
    longest = _longest(config)
    notes: tuple[str, ...] = ()
    if longest is not None and seq_len > longest:
        notes = (f"sequences have {longest} tokens, the model's longest, not {seq_len}",)
        seq_len = longest
    drawn = sample_windows(
        tokenize(tokenizer, text.text), samples, seq_len, begin_token(tokenizer), seed, text.note or text.name
    )
    for note in (*notes, *drawn.notes):
        log.warning("Calibration: %s.", note)
    return Samples(drawn.batches, drawn.name, (*notes, *drawn.notes))


def _longest(config: Any) -> int | None:
    """The most tokens that a model takes, if its configuration (object or JSON) says so."""
    values = config if isinstance(config, dict) else config.to_dict()
    values = values.get("text_config") or values
    return next((int(values[name]) for name in ("max_position_embeddings", "n_positions") if values.get(name)), None)
