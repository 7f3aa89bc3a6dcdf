"""``rarefy eval --kv``: what coded KV caches cost a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from rarefy.cli.common import print_record, print_table
from rarefy.core.errors import OptionError

if TYPE_CHECKING:
    from rarefy.evaluation.bootstrap import Interval
    from rarefy.evaluation.caches import CacheComparison

REGIMES = ("chunked", "decode", "distorted")


def evaluate_caches(
    models: Sequence[str], caches: Sequence[str], *, regime: str, as_json: bool, **options: Any
) -> None:
    """Measure ``caches`` on the one model of ``models`` and print the table or JSON."""
    from rarefy import api

    if len(models) != 1:
        raise OptionError(f"--kv compares caches of one model, not of {len(models)}; name one model.")
    if regime not in REGIMES:
        raise OptionError(f"--regime '{regime}' is unknown; use {', '.join(REGIMES)}.")
    chosen = cast(Literal["chunked", "decode", "distorted"], regime)
    result = api.compare_caches(models[0], caches, regime=chosen, **options)
    if as_json:
        print_record("caches", result.model_dump())
    else:
        print_caches(result)


def print_caches(result: CacheComparison) -> None:
    """A row for each cache, with 95% intervals of the differences in nats."""
    rows = [
        (
            cache.name,
            f"{cache.bits['total']:.3f}",
            f"{cache.nll:.4f}",
            _interval(cache.gap),
            _interval(cache.versus_first),
            f"{cache.kl:.4f}",
            f"{cache.top1_agreement:.2%}",
            f"{cache.shared_bytes / 1e3:.0f}",
            f"{cache.seconds:.1f}",
        )
        for cache in result.caches
    ]
    dense = ("dense", "16.000", f"{result.dense_nll:.4f}", "-", "-", "-", "-", "-", f"{result.dense_seconds:.1f}")
    heads = ("cache", "bits", "nats/token", "less dense", "less first", "KL", "top-1", "tables kB", "seconds")
    print_table(heads, [dense, *rows])
    print(f"{result.model}: {result.protocol.describe()}; {result.tokens} predicted tokens")


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:+.4f} ({interval.low:+.4f} .. {interval.high:+.4f})"
