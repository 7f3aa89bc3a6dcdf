"""What a compression did: layer by layer, in bytes, bits, seconds and errors, with every fallback."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rarefy.contracts import Recipe, Rule
from rarefy.core.config import StrictModel
from rarefy.formats.bytes import ByteCount
from rarefy.formats.terms import Term
from rarefy.layers.manifest import Manifest, Report, RuleEntry


class LayerReport(StrictModel):
    """One compressed weight. ``relative_error`` is |W - stored| / |W| in the Frobenius norm; ``output_error`` is
    that of the layer's outputs on the calibration data, None where nothing was observed."""

    name: str
    method: str
    shape: tuple[int, ...]
    bits_per_weight: float
    relative_error: float
    output_error: float | None = None
    seconds: float
    notes: tuple[str, ...] = ()


class CompressionReport(StrictModel):
    """Result of ``rarefy.compress``. Bytes are those of tensors; ``bits_per_weight`` covers compressed weights only."""

    model: str
    recipe: str
    out: str | None
    bits_per_weight: dict[str, float]
    weights: int
    stored_bytes: int
    dense_bytes: int
    seconds: float
    peak_bytes: int
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class Ledger:
    """Collects what happens during one compression and turns it into the manifest and the report."""

    recipe: Recipe
    layers: list[LayerReport] = field(default_factory=list)
    count: ByteCount = field(default_factory=ByteCount)
    weights: int = 0
    notes: list[str] = field(default_factory=list)
    _entries: dict[str, tuple[Rule, list[str], list[dict[str, Any]]]] = field(default_factory=dict)

    def add(self, layer: LayerReport, rule: Rule, terms: Iterable[Term]) -> None:
        """Record one solved weight."""
        terms = list(terms)
        specs = [term.spec.model_dump(mode="json") for term in terms]
        key = json.dumps([rule.method, rule.options, specs], sort_keys=True)
        self._entries.setdefault(key, (rule, [], specs))[1].append(layer.name)
        self.layers.append(layer)
        self.weights += math.prod(layer.shape)
        for term in terms:
            self.count += term.byte_count()

    @property
    def bits_per_weight(self) -> dict[str, float]:
        return self.count.bits_per_weight(self.weights)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        return tuple(f"{layer.name}: {note}" for layer in self.layers for note in layer.notes)

    def manifest(self, stored_bytes: int, dense_bytes: int, recipe_version: int | None = None) -> Manifest:
        """The manifest of the finished model; byte totals are of all its tensors."""
        rules = tuple(
            RuleEntry(method=rule.method, options=rule.options, modules=tuple(modules), terms=tuple(specs))  # type: ignore[arg-type]
            for rule, modules, specs in self._entries.values()
        )
        version = recipe_version or max(rule.recipe().recipe_version for rule in self.recipe.rules)
        report = Report(
            bits_per_weight={name: round(bits, 6) for name, bits in self.bits_per_weight.items()},
            weights=self.weights,
            stored_bytes=stored_bytes,
            dense_bytes=dense_bytes,
            notes=(*self.notes, *by_reason(self.layers)),
        )
        return Manifest(
            recipe=self.recipe.name, recipe_version=version, rules=rules, execution=self.recipe.execution, report=report
        )


def by_reason(layers: Iterable[LayerReport]) -> list[str]:
    """Every note of ``layers`` once, with the layer that it is of, or the first of them and how many there are."""
    of: dict[str, list[str]] = {}
    for layer in layers:
        for note in layer.notes:
            of.setdefault(note, []).append(layer.name)
    return [
        f"{names[0]}: {note}" if len(names) == 1 else f"{len(names)} layers, the first {names[0]}: {note}"
        for note, names in of.items()
    ]
