"""Every model with every attention and cache under every load: costs and quality that an interruption does not lose."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field

from rarefy.core.config import StrictModel, parse
from rarefy.core.environment import this_environment
from rarefy.core.errors import OptionError, SourceError
from rarefy.core.progress import progress
from rarefy.evaluation.candidates import Candidate, check_length
from rarefy.evaluation.efficiency.measure import Cost, Load, measure_cost
from rarefy.evaluation.efficiency.roof import Roof, measure_roof
from rarefy.evaluation.forward import CacheFactory
from rarefy.evaluation.journal import Journal
from rarefy.evaluation.results import Comparison, Sizes

DENSE = "dense"


class Matrix(StrictModel):
    """What a file for ``rarefy bench --matrix`` may say: every model x attention x cache x load is a row. ``caches``
    and ``attention``: ``dense``, or as for ``rarefy eval --kv`` and ``--attention``.

    ``windows`` of ``context`` tokens of ``data`` measure quality against the ``reference`` (0: none is). ``watts``: a
    stated power, for energy that is then labelled as modelled. ``threads`` None leaves Torch's.
    """

    models: tuple[str, ...] = Field(min_length=1)
    reference: str | None = None
    caches: tuple[str, ...] = Field(default=(DENSE,), min_length=1)
    attention: tuple[str, ...] = Field(default=(DENSE,), min_length=1)
    batches: tuple[int, ...] = Field(default=(1,), min_length=1)
    prompt_tokens: tuple[int, ...] = Field(default=(128,), min_length=1)
    new_tokens: int = Field(default=32, ge=2)
    rounds: int = Field(default=5, ge=1)
    warm: int = Field(default=1, ge=0)
    windows: int = Field(default=0, ge=0)
    context: int = Field(default=512, ge=2)
    data: str = "demo"
    threads: int | None = Field(default=None, ge=1)
    dtype: str = "auto"
    device: str = "auto"
    watts: float | None = Field(default=None, gt=0)

    def loads(self) -> list[Load]:
        """Every load, smallest prompts first."""
        return [
            Load(
                batch=batch, prompt_tokens=prompt, new_tokens=self.new_tokens, rounds=self.rounds, warm=self.warm
            )
            for prompt, batch in itertools.product(self.prompt_tokens, self.batches)
        ]  # fmt: skip


class Row(StrictModel):
    """One combination. ``compression_ratio``: dense bytes / stored bytes; ``quality_kept``: perplexity of the reference
    / that of the model; ``compression_rate``: their product, which hides a collapse of quality and ranks nothing on its
    own. Quality is that of the model with this cache and attention; None where it was
    not measured."""

    model: str
    cache: str
    attention: str = DENSE
    cost: Cost
    bits_per_weight: dict[str, float] | None
    compression_ratio: float | None
    perplexity: float | None = None
    kl: float | None = None
    quality_kept: float | None = None

    @property
    def compression_rate(self) -> float | None:
        if self.compression_ratio is None or self.quality_kept is None:
            return None
        return self.compression_ratio * self.quality_kept


class Efficiency(StrictModel):
    """A whole matrix, measured on one machine under one ``roof``."""

    rows: tuple[Row, ...]
    roof: Roof
    protocol: str | None


# What compares a model of a matrix, with a cache (by its name and maker) and attention, to the reference.
Judge = Callable[[str, str, CacheFactory | None, str], Comparison]
# What lets a loaded model attend as a name says.
Attend = Callable[[Any, str], object]


def read_matrix(path: Path) -> Matrix:
    """The matrix in a YAML file. Raises SourceError or OptionError, naming the first wrong key."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as failure:
        raise SourceError(f"'{path}' is not YAML that can be read ({str(failure).splitlines()[0]}).") from None
    if not isinstance(content, dict):
        raise OptionError(f"'{path}' holds no options; write at least 'models: [demo]'.")
    return parse(Matrix, content, f"'{path}'", OptionError)


def run_matrix(
    matrix: Matrix,
    candidates: Sequence[Candidate],
    caches: Mapping[str, CacheFactory | None],
    device: torch.device,
    *,
    attend: Attend | None = None,
    judge: Judge | None = None,
    work_dir: Path | None = None,
) -> Efficiency:
    """Measure every candidate (those of ``matrix.models``, in order) with every attention and cache under every load.

    One model is loaded at a time; ``attend`` sets its attention where the matrix has another than the dense one.
    ``judge`` compares a model of the matrix, with cache and attention, to its reference, where the matrix wants
    quality. ``work_dir`` keeps finished rows of models that live in folders; they are of this machine and
    these versions only. Raises OptionError, UnsupportedError.
    """
    bench = _Bench(matrix, device, Journal(work_dir), attend)
    rows: list[Row] = []
    protocol: str | None = None
    loads = matrix.loads()
    ways = list(itertools.product(matrix.attention, caches))
    with progress("bench", len(candidates) * len(ways) * len(loads), live=False) as advance:
        for name, candidate in zip(matrix.models, candidates, strict=True):
            own: list[Row] = []
            for attention, cache in ways:
                for load in loads:
                    cost = bench.cost(candidate, attention, cache, caches[cache], load)
                    own.append(_row(candidate, attention, cache, cost))
                    advance(1, f"{candidate.name}, {attention} attention, {cache} cache, {load.describe()}")
            bench.close()
            if judge is not None and matrix.windows:
                for attention, cache in ways:
                    comparison = judge(name, cache, caches[cache], attention)
                    protocol = comparison.candidates[0].protocol.describe()
                    own = [
                        _judged(row, comparison) if (row.attention, row.cache) == (attention, cache) else row
                        for row in own
                    ]
            rows += own
    if bench.roof is None:
        raise OptionError("There is no model to measure; name at least one.")
    return Efficiency(rows=tuple(rows), roof=bench.roof, protocol=protocol)


class _Bench:
    """The machine, and the model that is loaded on it."""

    def __init__(self, matrix: Matrix, device: torch.device, journal: Journal, attend: Attend | None):
        self._matrix, self._device, self._journal, self._attend = matrix, device, journal, attend
        self._environment = this_environment().model_dump(mode="json")
        self._model: Any = None
        self._attends = DENSE
        self.roof: Roof | None = None

    def cost(self, candidate: Candidate, attention: str, cache: str, factory: CacheFactory | None, load: Load) -> Cost:
        """What the candidate costs, as it was kept or measured now."""
        key = {
            "bench": load.model_dump(mode="json"), "cache": cache, "model": candidate.identity,
            "attention": attention, "watts": self._matrix.watts, "environment": self._environment,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        kept = None if candidate.identity is None else self._journal.take(key)
        if kept is not None:
            self.roof = self.roof or Roof.model_validate(kept["roof"])
            return Cost.model_validate(kept["cost"])
        if self._model is None:
            self._model, self._attends = candidate.open().eval(), DENSE
        if attention != self._attends:
            if self._attend is None:
                raise OptionError(f"Nothing here lets a model attend by '{attention}'; give attend=.")
            self._attend(self._model, attention)
            self._attends = attention
        check_length(self._model, candidate.name, load.prompt_tokens + load.new_tokens)
        self.roof = self.roof or measure_roof(self._device, self._model.dtype)
        cost = measure_cost(self._model, load, self.roof, cache=factory, watts=self._matrix.watts)
        if candidate.identity is not None:
            self._journal.keep(key, {"cost": cost.model_dump(mode="json"), "roof": self.roof.model_dump(mode="json")})
        return cost

    def close(self) -> None:
        """Drop the model: the next one needs its memory."""
        self._model = None
        gc.collect()  # models hold reference cycles


def _row(candidate: Candidate, attention: str, cache: str, cost: Cost) -> Row:
    sizes = candidate.sizes or Sizes()
    ratio = sizes.dense_bytes / sizes.stored_bytes if sizes.dense_bytes and sizes.stored_bytes else None
    return Row(
        model=candidate.name, cache=cache, attention=attention, cost=cost, bits_per_weight=sizes.bits_per_weight,
        compression_ratio=ratio,
    )  # fmt: skip


def _judged(row: Row, comparison: Comparison) -> Row:
    quality, dense = comparison.candidates[0], comparison.reference
    kept = None if dense is None else dense.perplexity / quality.perplexity
    return row.model_copy(update={"perplexity": quality.perplexity, "kl": quality.kl, "quality_kept": kept})
