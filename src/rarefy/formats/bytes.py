"""Bytes by what they say, for weights and for caches alike; bits per weight follow from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class ByteCount:
    """Stored bytes, split by purpose. Counted from tensors that exist, never from a formula.

    codes: quantized values; scales: scales, zero points and their second order; tables: look-up tables and codebooks;
    indices: where kept values lie; values: floating-point values of sparse and dense parts of a compressed weight;
    transform: permutations, input scales and signs; exact: tensors that were left in 16 or 32 bits.
    """

    codes: int = 0
    scales: int = 0
    tables: int = 0
    indices: int = 0
    values: int = 0
    transform: int = 0
    exact: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __add__(self, other: ByteCount) -> ByteCount:
        return ByteCount(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def bits_per_weight(self, weights: int) -> dict[str, float]:
        """Bits per original weight by part, with their ``total``; zeros when there are no weights."""
        parts = {name: size * 8 / weights if weights else 0.0 for name, size in asdict(self).items()}
        return {"total": sum(parts.values()), **parts}


def total(counts: list[ByteCount]) -> ByteCount:
    """The sum of several counts."""
    return sum(counts, ByteCount())
