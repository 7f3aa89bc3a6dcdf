"""What an evaluation says: numbers, the protocol they hold under, and the sizes they were bought with."""

from __future__ import annotations

from pydantic import Field

from rarefy.core.config import StrictModel
from rarefy.evaluation.protocol import Protocol


class Sizes(StrictModel):
    """What a model weighs, as its owner counted it.

    ``bits_per_weight``: by part (codes, scales, tables, indices, values, ...) with their ``total``; ``stored_bytes``:
    the weights as they are on disk; ``dense_bytes``: the same weights uncompressed.
    """

    bits_per_weight: dict[str, float] | None = None
    stored_bytes: int | None = Field(default=None, ge=0)
    dense_bytes: int | None = Field(default=None, ge=0)


class Evaluation(StrictModel):
    """One model's quality. ``kl`` and ``top1_agreement`` are None when there was no reference.

    ``perplexity`` = exp(``nll``); ``nll`` and ``kl`` (reference || model, whole vocabulary) are means in nats per
    predicted token, ``top1_agreement`` is a share, ``tokens`` counts predicted tokens. ``seconds`` is the time of this
    model's forward passes and metrics, ``tokens_per_second`` its window tokens over that time, and ``peak_bytes`` the
    most memory so far of the process, or of the GPU when the model is on one. ``attention_density``: share of blocks of
    keys that sparse attention read, 1 where all passes stayed dense, None for models without a plan.
    """

    model: str
    perplexity: float
    nll: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    protocol: Protocol
    bits_per_weight: dict[str, float] | None
    stored_bytes: int | None
    dense_bytes: int | None
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    attention_density: float | None = None


class LayerDifference(StrictModel):
    """One layer of two models. ``first`` and ``second`` say how it is stored, ``*_bits`` what that takes per weight;
    ``difference`` is |second - first| / |first| of the weights in the Frobenius norm, None where shapes differ. Scales
    that a recipe moved from one layer into the next count, though they do not change the model."""

    name: str
    first: str
    second: str
    first_bits: float
    second_bits: float
    difference: float | None


class ModelDifference(StrictModel):
    """The layers that two models have in common."""

    first: str
    second: str
    layers: tuple[LayerDifference, ...]


class Comparison(StrictModel):
    """Many models on the same windows: ``candidates`` in the order given, the ``reference`` (None without one), and how
    often the reference was run over all windows (``passes``: 1 unless memory could not hold all models at once)."""

    candidates: list[Evaluation]
    reference: Evaluation | None
    passes: int
