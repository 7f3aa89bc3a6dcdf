"""How tokens are drawn by an executor that chooses them itself."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from the softmax of ``logits / temperature`` over the ``top_k`` largest (0: all), of those
    over the fewest that have ``top_p`` of its mass; reproducible for a ``seed``."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise OptionError(f"{self} cannot be drawn from; use temperature > 0, top_k >= 0 and 0 < top_p <= 1.")
