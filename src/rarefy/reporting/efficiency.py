"""The part of a report on efficiency: what each combination costs, memory over time, and speed against quality."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from rarefy.core.memory import human
from rarefy.evaluation.efficiency.matrix import Efficiency, Row
from rarefy.reporting import figures
from rarefy.reporting.figures import Axis, Figure, Point, look, plain, present, spec
from rarefy.reporting.parts import Section, Table

STEP = Axis("Time of a token", "ms per new token (median)", from_zero=True)
PERPLEXITY = Axis("perplexity", "perplexity")
HEADINGS = (
    "model", "attention", "cache", "load", "first token ms", "p95", "token ms", "p95", "new tokens/s", "requests/s",
    "peak memory", "of memory", "compute", "prefill of roofline", "decode of roofline", "J/token", "times smaller",
    "quality kept", "compression rate",
)  # fmt: skip


def sections(found: tuple[Efficiency, ...]) -> list[Section]:
    """One for each matrix."""
    return [_section(each, number, len(found)) for number, each in enumerate(found)]


def _section(found: Efficiency, number: int, count: int) -> Section:
    title = "Efficiency" + (f" ({number + 1})" if count > 1 else "")
    drawn = [_speed_against_quality(found, f"plot-speed-{number}"), _timeline(found, f"plot-memory-{number}")]
    roof, first = found.roof, found.rows[0].cost
    notes = [
        f"Timed on {first.device} in {first.dtype}, {first.threads} threads. The machine reads "
        f"{roof.bytes_per_second / 1e9:.1f} GB/s and multiplies at {roof.flops_per_second / 1e9:.0f} GFLOP/s "
        f"({roof.dtype}): the roofline.",
        "Compute: operations done over what the machine could have done in that time. Compression rate: times smaller, "
        "times quality kept (perplexity of the reference over that of the model); it hides a collapse of quality and "
        "ranks nothing on its own.",
    ]
    sources = {row.cost.energy.source for row in found.rows if row.cost.energy is not None}
    if sources:
        modelled = "; modelled is a stated power times the time, not a measurement" if "modelled" in sources else ""
        notes.append(f"Energy: {', '.join(sorted(sources))}{modelled}.")
    else:
        notes.append("Energy: this machine has no counter that can be read.")
    if found.protocol is not None:
        notes.append(f"Quality: {found.protocol}.")
    table = Table("What each combination costs", HEADINGS, [_cells(row) for row in found.rows])
    return Section(f"efficiency-{number}", title, present(drawn), [table], notes)


def _cells(row: Row) -> tuple[str, ...]:
    cost = row.cost
    return (
        row.model, row.attention, row.cache, cost.load.describe(), f"{1e3 * cost.first_token.p50:.1f}",
        f"{1e3 * cost.first_token.p95:.1f}", f"{1e3 * cost.token.p50:.1f}", f"{1e3 * cost.token.p95:.1f}",
        f"{cost.new_tokens_per_second:.1f}", f"{cost.requests_per_second:.3g}", human(cost.memory.peak_bytes),
        _share(cost.memory.utilization), _share(cost.compute_utilization), _share(cost.prefill_roofline),
        _share(cost.decode_roofline), _number(cost.joules_per_token), _number(row.compression_ratio),
        _share(row.quality_kept), _number(row.compression_rate),
    )  # fmt: skip


def _speed_against_quality(found: Efficiency, name: str) -> Figure | None:
    """Perplexity against the time of a token, for the first load; None where quality was not measured."""
    first = found.rows[0].cost.load
    points = [
        Point(_what(row, found), 1e3 * row.cost.token.p50, row.perplexity, _what(row, found))
        for row in found.rows
        if row.perplexity is not None and math.isfinite(row.perplexity) and row.cost.load == first
    ]
    looks = {point.series: look(index) for index, point in enumerate(points)}
    return figures.trade_off_of(points, looks, STEP, PERPLEXITY, name)


def _timeline(found: Efficiency, name: str) -> Figure | None:
    """Memory while the last load of each combination ran; None where the system does not say."""
    last = {_what(row, found): row.cost.memory for row in found.rows}
    if not any(memory.peak_bytes for memory in last.values()):
        return None
    drawn = go.Figure()
    for index, (label, memory) in enumerate(last.items()):
        drawn.add_scatter(
            x=[moment for moment, _ in memory.timeline], y=[size / 1e9 for _, size in memory.timeline], mode="lines",
            name=plain(label), line={"color": look(index)["color"], "width": 2},
            hovertemplate="%{x:.2f} s<br>%{y:.3f} GB<extra>" + plain(label) + "</extra>",
        )  # fmt: skip
    drawn.update_xaxes(title="seconds")
    drawn.update_yaxes(title="GB held", rangemode="tozero")
    drawn.update_layout(showlegend=True)
    about = f"Memory of the process or GPU while it ran {found.rows[-1].cost.load.describe()} again and again."
    rows = [
        (label, human(memory.peak_bytes), human(memory.mean_bytes), human(memory.capacity_bytes))
        for label, memory in last.items()
    ]
    headings = ("model", "most", "mean", "of")
    return Figure(name, "Memory over time", about, spec(drawn, named=len(last)), headings, rows)


def _what(row: Row, found: Efficiency) -> str:
    """The model, with its attention and cache where there are several."""
    parts = [row.model]
    parts += [f"{row.attention} attention"] if len({each.attention for each in found.rows}) > 1 else []
    parts += [f"{row.cache} cache"] if len({each.cache for each in found.rows}) > 1 else []
    return ", ".join(parts)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
