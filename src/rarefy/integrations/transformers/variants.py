"""Models to evaluate as people name them, each with every attention and every cache that is to be measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rarefy.core.errors import OptionError
from rarefy.evaluation.forward import CacheFactory
from rarefy.integrations.transformers.kv_evaluation import with_caches
from rarefy.integrations.transformers.plan_evaluation import with_plans
from rarefy.integrations.transformers.subjects import Subjects, open_subjects


def open_variants(
    models: Sequence[Any],
    reference: Any,
    *,
    attention: Sequence[str] = (),
    kv: Sequence[str] = (),
    cache: CacheFactory | None = None,
    reads_cache: bool = True,
    **options: Any,
) -> Subjects:
    """`open_subjects`, with a candidate for every model, plan of ``attention`` and cache of ``kv``; a single model is
    then its own reference. ``reads_cache``: tokens come in several passes. Raises OptionError where a cache would not
    be read or is named twice, and as `open_subjects`, `with_plans` and `with_caches`."""
    if kv and (cache is not None or not reads_cache):
        raise OptionError("kv= needs chunk=, the tokens of a pass that reads the cache, and no cache= beside it.")
    if (attention or kv) and reference is None and len(models) == 1:
        reference = models[0]
    subjects = open_subjects(models, reference, cache=cache, **options)
    planned = with_plans(subjects.candidates, attention, reads_cache=reads_cache)
    return replace(subjects, candidates=with_caches(planned, kv, subjects.tokenizer))
