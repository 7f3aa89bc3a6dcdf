"""What a rarefy checkpoint says of itself in ``config.json``: strict, versioned, and all that loading needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from rarefy.core.config import StrictModel, parse
from rarefy.core.errors import CheckpointError, FormatError
from rarefy.formats.layout import Layout, prefixed
from rarefy.formats.terms import Shape, TermSpec
from rarefy.formats.terms.composed import AnyTerm, check_depth

FORMAT_VERSION = 1
WEIGHTS_NAME = "rarefy.safetensors"


class Execution(StrictModel):
    """How activations are treated: ``exact`` keeps them in 16 or 32 bits, ``fast`` may quantize them."""

    executor: Literal["exact", "fast"] = "exact"


class RuleEntry(StrictModel):
    """Modules that one rule of a recipe compressed to the same description of terms (shapes come from the model)."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    modules: tuple[str, ...] = Field(min_length=1)
    terms: tuple[AnyTerm, ...] = Field(min_length=1)


class Report(StrictModel):
    """What compression achieved: bits per compressed weight by part, and bytes of the whole model."""

    bits_per_weight: dict[str, float]
    weights: int
    stored_bytes: int
    dense_bytes: int
    notes: tuple[str, ...] = ()


class KvEntry(StrictModel):
    """How a model's KV cache is stored: a recipe with its options, and the file beside the weights that holds what the
    recipe was fitted to (None: it has no parameters)."""

    recipe: str
    version: int
    options: dict[str, Any] = Field(default_factory=dict)
    params: str | None = Field(None, pattern=r"^\w[\w.-]*\.safetensors$")


class AttentionEntry(StrictModel):
    """Which blocks of keys a model's queries read: a recipe with its options, and the file beside the weights that
    holds its parameters (None: it has none)."""

    recipe: str
    version: int
    options: dict[str, Any] = Field(default_factory=dict)
    params: str | None = Field(None, pattern=r"^\w[\w.-]*\.safetensors$")


class Manifest(StrictModel):
    """``config.json``'s ``quantization_config``."""

    quant_method: Literal["rarefy"] = "rarefy"
    format_version: int = FORMAT_VERSION
    requires: str = "rarefy>=0.1"
    recipe: str
    recipe_version: int = 1
    weights: str = Field(WEIGHTS_NAME, pattern=r"^\w[\w.-]*\.safetensors(\.index\.json)?$")
    rules: tuple[RuleEntry, ...]
    attention: AttentionEntry | None = None
    kv: KvEntry | None = None
    execution: Execution = Execution()
    report: Report | None = None

    def terms(self) -> dict[str, tuple[TermSpec, ...]]:
        """Module name -> its terms. Raises CheckpointError when a module is listed twice."""
        table: dict[str, tuple[TermSpec, ...]] = {}
        for rule in self.rules:
            for module in rule.modules:
                if module in table:
                    raise CheckpointError(
                        f"quantization_config lists module '{module}' twice; compress the model anew."
                    )
                table[module] = rule.terms
        return table

    def digest(self) -> str:
        """A short hash of what decides the meaning of stored tensors, kept beside them in the weight files."""
        meaning = [
            [module, [term.model_dump(mode="json") for term in terms]] for module, terms in sorted(self.terms().items())
        ]
        return hashlib.sha256(json.dumps([self.format_version, meaning], sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(data: Any) -> Manifest:
    """Parse ``quantization_config``. Raises CheckpointError for unknown versions, keys and values."""
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"This checkpoint has rarefy format version {version!r}, this rarefy reads up to {FORMAT_VERSION}; "
            "upgrade rarefy."
        )
    try:
        check_depth(data)
    except FormatError as failure:
        raise CheckpointError(f"quantization_config: {failure}.") from None
    return parse(Manifest, data, "quantization_config", CheckpointError, stored=True)


def layer_layout(terms: Iterable[TermSpec], shape: Shape) -> Layout:
    """Stored tensors of a compressed module, by their names within the module."""
    layout: Layout = {}
    for index, term in enumerate(terms):
        layout.update(prefixed(f"terms.{index}", term.layout(shape)))
    return layout
