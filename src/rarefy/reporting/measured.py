"""The part of a report on benchmarks: recipes by bits and quality, times against peers, and every row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import plotly.graph_objects as go

from rarefy.reporting import figures
from rarefy.reporting.benchmarks import (
    Benchmark,
    Job,
    Quality,
    Row,
    best_under,
    cell,
    columns,
    joined,
    quality,
    speeds,
    title,
)
from rarefy.reporting.figures import Axis, Figure, Looks, Point, look, plain, present, spec
from rarefy.reporting.parts import Card, Section, Table

BITS = Axis("Bits per weight", "bits per compressed weight", log=True)
KL = Axis("divergence", "KL from dense (nats per token)", log=True)
PERPLEXITY = Axis("perplexity", "perplexity", log=True)
BUDGETS = (2.5, 3.5, 4.5, 5.5)
# The budget that the sentence of a card is about.
GIST = 4.5
# A perplexity beyond this many times the dense one, or the best, would leave the others no room; it stays in the table.
FARTHEST = 20.0


def cards(benchmarks: Sequence[Benchmark]) -> list[Card]:
    """For every model and protocol, which job loses least at which budget of bits."""
    groups = [group for benchmark in joined(benchmarks) for group in quality(benchmark)]
    return [_card(group, _named(group, groups)) for group in groups]


def sections(benchmarks: Sequence[Benchmark]) -> tuple[list[Section], list[Section]]:
    """For every benchmark its pictures and tables: those of bits and quality, and the others."""
    benchmarks = joined(benchmarks)
    looks = _looks(benchmarks)
    everyone = [group for benchmark in benchmarks for group in quality(benchmark)]
    first, others = [], []
    for number, benchmark in enumerate(benchmarks):
        anchor, groups, timed = f"benchmark-{number}", quality(benchmark), speeds(benchmark)
        for index, group in enumerate(groups):
            heading = f"Bits and quality: {_named(group, everyone)}"
            first.append(_quality_section(group, looks, f"{anchor}-{index}", heading, benchmark.describe()))
        if timed or not groups:
            drawn = present([_speed_figure(timed, f"plot-{anchor}-speed")])
            others.append(Section(anchor, title(benchmark.name), drawn, [_all(benchmark)], [benchmark.describe()]))
    return first, others


def _named(group: Quality, groups: Sequence[Quality]) -> str:
    """The model, with the first words of the protocol where it was measured under several."""
    alone = sum(other.model == group.model for other in groups) == 1
    return group.model if alone else f"{group.model}, {group.protocol.split(',')[0]}"


def _looks(benchmarks: Sequence[Benchmark]) -> Looks:
    """The marker of every recipe, the same in all pictures."""
    groups = [group for benchmark in benchmarks for group in quality(benchmark)]
    families = dict.fromkeys(job.family for group in groups for job in group.compressed)
    return {family: look(index) for index, family in enumerate(families)}


def _card(group: Quality, name: str) -> Card:
    dense = group.dense
    facts = [] if dense is None else [("dense", f"perplexity {dense.perplexity:.2f}")]
    best: dict[str, tuple[float, Job]] = {}
    for bits in BUDGETS:
        job = best_under(group.compressed, bits)
        if job is not None:
            best.setdefault(job.name, (bits, job))
    facts += [(f"up to {bits:g} bits", f"{job.name}: {_loss(job, dense)}") for bits, job in best.values()]
    count = len(group.compressed)
    job = best_under(group.compressed, GIST)
    if job is None:
        return Card(name, f"{count} ways to compress it.", facts)
    gist = f"At {job.bits:.2f} bits per weight {job.name} is the best of {count} ways: {_loss(job, dense)}."
    return Card(name, gist, facts)


def _loss(job: Job, dense: Job | None) -> str:
    if dense is None:
        return f"perplexity {job.perplexity:,.2f}"
    times = job.perplexity / dense.perplexity
    return f"perplexity {job.perplexity:,.2f} ({f'{times - 1:+.1%}' if times < 10 else f'{times:,.0f} times dense'})"


def _quality_section(group: Quality, looks: Looks, anchor: str, heading: str, origin: str) -> Section:
    drawn = [_pareto(group, looks, KL, f"plot-{anchor}-kl"), _pareto(group, looks, PERPLEXITY, f"plot-{anchor}-ppl")]
    headings = ("weights", "bits/weight", "perplexity", "range", "KL (nats)", "same token", "seeds", "calibration")
    rows = [
        (
            job.name, f"{job.bits:.3f}", f"{job.perplexity:,.2f}",
            f"{job.spread[0]:,.2f} to {job.spread[1]:,.2f}" if job.spread[0] < job.spread[1] else "-",
            "-" if job.kl is None else f"{job.kl:.4f}",
            "-" if job.top1_agreement is None else f"{job.top1_agreement:.1%}", str(job.seeds), job.calibration or "-",
        )
        for job in sorted(group.jobs, key=lambda job: (-job.dense, job.bits))
    ]  # fmt: skip
    notes = [f"Measured on {group.tokens} predicted tokens: {group.protocol}.", origin]
    table = Table("Every way to compress it, by bits", headings, rows)
    return Section(anchor, heading, present(drawn), [table], notes)


def _pareto(group: Quality, looks: Looks, loss: Axis, name: str) -> Figure | None:
    points = []
    for job in group.compressed:
        value, spread = (job.kl, job.kl_spread) if loss is KL else (job.perplexity, job.spread)
        if value is not None and value > 0:
            ranged = spread if spread is not None and spread[0] < spread[1] else None
            points.append(Point(job.name, job.bits, value, job.family, ranged))
    dense = group.dense
    level = None if loss is KL or dense is None else (f"dense: {dense.perplexity:.2f}", dense.perplexity)
    limit = math.inf if loss is KL else FARTHEST * (level[1] if level else min(point.y for point in points))
    shown = [point for point in points if point.y <= limit]
    used = {family: marker for family, marker in looks.items() if any(point.series == family for point in shown)}
    drawn = figures.trade_off_of(shown, used, BITS, loss, name, level)
    if drawn is None or len(shown) == len(points):
        return drawn
    hidden = ", ".join(point.label for point in points if point not in shown)
    return replace(drawn, about=f"{drawn.about} Far above, and only in the table: {hidden}.")


def _speed_figure(rows: Sequence[Row], name: str) -> Figure | None:
    """Times of peers over ours: one line for each job, one series for each peer; None without any."""
    if not rows:
        return None
    drawn = go.Figure()
    peers = dict.fromkeys(str(row["peer"]) for row in rows)
    for index, peer in enumerate(peers):
        own = [row for row in rows if str(row["peer"]) == peer]
        drawn.add_scatter(
            x=[row["ratio"] for row in own], y=[plain(_what(row)) for row in own], mode="markers", name=plain(peer),
            marker={"size": 10, **look(index)},
            hovertemplate="%{y}<br>%{x:.3g} times<extra>" + plain(peer) + "</extra>",
        )  # fmt: skip
    jobs = dict.fromkeys(_what(row) for row in rows)
    drawn.update_layout(showlegend=True)
    drawn.update_xaxes(title="time of the peer over ours", type="log")
    drawn.update_yaxes(autorange="reversed", automargin=True)
    drawn.add_vline(x=1, line={"dash": "dash", "width": 1, "color": figures.DENSE["color"]})
    about = "Right of the dashed line, at more than 1, we are faster than that peer; left of it slower."
    table = [(_what(row), str(row["peer"]), f"{row['ratio']:.3g}") for row in rows]
    return Figure(
        name, "Speed against peers", about, spec(drawn, 120 + 26 * len(jobs), len(peers)), ("job", "peer", "ratio"),
        table,
    )  # fmt: skip


def _what(row: Row) -> str:
    return " ".join(str(row[part]) for part in ("goal", "model", "job") if row.get(part) is not None)


def _all(benchmark: Benchmark) -> Table:
    names = columns(benchmark.rows)
    first = [name for name in ("job", "model", "goal") if name in names]
    names = [*first, *(name for name in names if name not in first)]
    rows = [[cell(row.get(name)) for name in names] for row in benchmark.rows]
    return Table("Every measurement", [name.replace("_", " ") for name in names], rows)
