"""The part of a report on coded KV caches: what each keeps in bits, and what that costs."""

from __future__ import annotations

from rarefy.evaluation.bootstrap import Interval
from rarefy.evaluation.caches import CacheComparison
from rarefy.reporting import figures
from rarefy.reporting.figures import Axis, Point, look, present
from rarefy.reporting.parts import Section, Table

BITS = Axis("Bits per number of the cache", "bits per key or value number", log=True)
KL = Axis("divergence", "KL from the dense cache (nats per token)", log=True)
HEADINGS = (
    "cache", "bits", "NLL", "less that of the dense", "less that of the first", "KL from dense", "same token",
    "tables kB", "seconds",
)  # fmt: skip


def sections(found: tuple[CacheComparison, ...]) -> list[Section]:
    """One for each model and regime."""
    return [_section(each, number, len(found)) for number, each in enumerate(found)]


def _section(found: CacheComparison, number: int, count: int) -> Section:
    points = [Point(each.name, each.bits["total"], each.kl, each.name) for each in found.caches if each.kl > 0]
    looks = {point.series: look(index) for index, point in enumerate(points)}
    drawn = figures.trade_off_of(points, looks, BITS, KL, f"plot-caches-{number}")
    dense = ("dense", "16.000", f"{found.dense_nll:.4f}", "-", "-", "-", "-", "-", f"{found.dense_seconds:.1f}")
    rows = [
        (
            each.name, f"{each.bits['total']:.3f}", f"{each.nll:.4f}", _interval(each.gap),
            _interval(each.versus_first), f"{each.kl:.4f}", f"{each.top1_agreement:.2%}",
            f"{each.shared_bytes / 1e3:.0f}", f"{each.seconds:.1f}",
        )
        for each in found.caches
    ]  # fmt: skip
    title = f"KV caches of {found.model}" + (f" ({number + 1})" if count > 1 else "")
    notes = [
        f"Measured on {found.tokens} predicted tokens: {found.protocol.describe()}. Brackets are 95% intervals of the "
        "difference in nats, paired by windows."
    ]
    table = Table("Every cache", HEADINGS, [dense, *rows])
    return Section(f"caches-{number}", title, present([drawn]), [table], notes)


def _interval(found: Interval | None) -> str:
    return "-" if found is None else f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
