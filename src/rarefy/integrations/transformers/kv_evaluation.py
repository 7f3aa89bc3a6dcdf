"""Coded KV caches as people write them down, and their measurement on a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import yaml

from rarefy.core.devices import Device
from rarefy.core.errors import OptionError
from rarefy.evaluation.caches import CacheComparison, CacheMaker, CacheProtocol, Regime
from rarefy.evaluation.caches import compare_caches as run
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.forward import CacheFactory
from rarefy.evaluation.protocol import bos_token
from rarefy.integrations.transformers.kv_calibration import open_kv
from rarefy.integrations.transformers.kv_setup import KvSetup, kv_recipe
from rarefy.integrations.transformers.subjects import open_subjects
from rarefy.recipes import discover
from rarefy.sources.texts import open_text
from rarefy.sources.windows import tokenize
from rarefy.sources.windows import windows as cut

CALIBRATION = ("params", "data", "samples", "seq_len", "seed")  # options of `open_kv`, not of a recipe


def parse_cache(text: str) -> tuple[str, dict[str, Any]]:
    """``"kivi:num_bits=2,group_size=32"`` as id and options."""
    return parse_choice("--kv", text)


def parse_choice(flag: str, text: str) -> tuple[str, dict[str, Any]]:
    """``"id:key=value,key=value"`` as id and options, as ``flag`` takes it; values are YAML scalars."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", rest)):  # commas in brackets are a list's
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise OptionError(f"{flag} '{text}' is not of the form ID:key=value,key=value, such as kivi:num_bits=4.")
        try:
            options[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            options[key] = value
    return name, options


def open_cache(model: Any, text: str, tokenizer: Any) -> KvSetup:
    """The setup that ``text`` names, calibrated on ``model`` if need be."""
    name, options = parse_cache(text)
    given = {key: options.pop(key) for key in CALIBRATION if key in options}
    return open_kv(model, name, options=options, tokenizer=tokenizer, **given)


def cache_factory(text: str, tokenizer: Any) -> CacheFactory:
    """What makes the cache that ``text`` names for any model; it is calibrated on each once, if need be."""
    name, options = parse_cache(text)
    discover()
    kv_recipe(name, {key: value for key, value in options.items() if key not in CALIBRATION})  # a typo shows at once
    setups: WeakKeyDictionary[Any, KvSetup] = WeakKeyDictionary()

    def make(model: Any) -> Any:
        if model not in setups:
            setups[model] = open_cache(model, text, tokenizer)
        return setups[model](model)

    return make


def with_caches(candidates: Sequence[Candidate], caches: Sequence[str], tokenizer: Any) -> list[Candidate]:
    """Every candidate with every cache; without caches the candidates as they are. Raises as `cache_factory`."""
    if not caches:
        return list(candidates)
    factories = {name: cache_factory(name, tokenizer) for name in caches}
    return [
        replace(
            each, name=f"{each.name}, {name}", cache=factory,
            identity=None if each.identity is None else f"{each.identity}, {name}",
        )
        for each in candidates
        for name, factory in factories.items()
    ]  # fmt: skip


def compare_caches(
    model: Any,
    caches: Sequence[str],
    *,
    regime: Regime,
    chunk: int,
    prefill: int,
    data: str | Path = "demo",
    context: int = 512,
    windows: int | None = 12,
    batch_size: int = 1,
    dtype: str | torch.dtype = "auto",
    device: Device = "auto",
    tokenizer: Any = None,
) -> CacheComparison:
    """``rarefy.compare_caches``."""
    if not caches:
        raise OptionError("Name at least one KV cache to measure, such as 'kivi:num_bits=2'.")
    subjects = open_subjects([model], None, dtype=dtype, device=device, tokenizer=tokenizer)
    text = open_text(data, "evaluation")
    tokens = cut(tokenize(subjects.tokenizer, text.text), context, windows, bos_token(subjects.tokenizer, None))
    candidate = subjects.candidates[0]
    loaded = candidate.open()
    makers: dict[str, CacheMaker] = {cache: open_cache(loaded, cache, subjects.tokenizer) for cache in caches}
    protocol = CacheProtocol(
        regime=regime, chunk=chunk, prefill=prefill, context=context, windows=len(tokens), dtype="", text=text.name
    )
    return run(loaded, candidate.name, tokens, makers, protocol, batch_size)
