"""The pictures of a report, drawn by plotly, each with its numbers as a table for those who cannot or will not look."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from rarefy.evaluation.results import Comparison, Evaluation
from rarefy.evaluation.tasks.results import TaskComparison
from rarefy.reporting.pareto import frontier

# Distinguishable by people who see few colours (Okabe and Ito), on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")
SCALE = "Viridis"
DENSE = {"color": COLOURS[-1], "symbol": SYMBOLS[-1]}
# Round numbers of a decade, for an axis of about one.
FINE = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)


@dataclass(frozen=True)
class Figure:
    """``spec`` is plotly's JSON; ``headings`` and ``rows`` are the same numbers; ``about`` says how to read them."""

    name: str
    title: str
    about: str
    spec: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Axis:
    """What a trade-off is drawn against: ``title`` for sentences, ``label`` with its unit for the axis."""

    title: str
    label: str
    more_is_better: bool = False
    from_zero: bool = False
    log: bool = False


Looks = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Point:
    """One model of a trade-off; points of one ``series`` look alike, ``spread`` is the range of ``y`` over seeds."""

    label: str
    x: float
    y: float
    series: str
    spread: tuple[float, float] | None = None


def _bits(evaluation: Evaluation) -> float | None:
    return None if evaluation.bits_per_weight is None else evaluation.bits_per_weight["total"]


# Each axis with what gives its number, None where that was not measured.
AXES: dict[str, tuple[Axis, Callable[[Evaluation], float | None]]] = {
    "bits": (Axis("Bits per weight", "bits per compressed weight"), _bits),
    "size": (Axis("Size", "MB of the whole model"), lambda each: each.stored_bytes and each.stored_bytes / 1e6),
    "speed": (Axis("Speed", "tokens per second", more_is_better=True), lambda each: each.tokens_per_second),
    # The reference, which has no divergence, diverges from itself by nothing.
    "kl": (Axis("divergence", "KL from dense (nats per token)", from_zero=True), lambda each: each.kl or 0.0),
    "perplexity": (Axis("perplexity", "perplexity"), lambda each: each.perplexity),
}


def trade_off(comparison: Comparison, cost: str, loss: str, name: str) -> Figure | None:
    """Every model as a point, ``cost`` against ``loss`` (keys of AXES), with the line of those that nobody beats.

    The dense reference takes part but for bits, which it would stretch beyond reading. None when fewer than two models
    have both numbers.
    """
    dense = comparison.reference
    everyone = [*comparison.candidates, *([dense] if dense is not None and cost != "bits" else [])]
    (of_cost, cost_in), (of_loss, loss_in) = AXES[cost], AXES[loss]
    points: list[Point] = []
    looks: Looks = {}
    for index, each in enumerate(everyone):
        x, y = cost_in(each), loss_in(each)
        if x is not None and y is not None and math.isfinite(y):
            label = each.model + (" (dense)" if each is dense else "")
            series = label if label not in looks else f"{label} ({index + 1})"
            looks[series] = DENSE if each is dense else look(index)
            points.append(Point(label, x, y, series))
    return trade_off_of(points, looks, of_cost, of_loss, name)


def trade_off_of(
    points: Sequence[Point],
    looks: Looks,
    of_cost: Axis,
    of_loss: Axis,
    name: str,
    level: tuple[str, float] | None = None,
) -> Figure | None:
    """Points, with the line of those that nobody beats; ``looks`` has a marker for every series, ``level`` is a loss to
    draw across with its label. None for fewer than two points."""
    if len(points) < 2:
        return None
    sign = -1.0 if of_cost.more_is_better else 1.0
    best = frontier([(sign * point.x, point.y) for point in points])
    drawn = go.Figure()
    drawn.add_scatter(
        x=[points[i].x for i in best], y=[points[i].y for i in best], mode="lines", name="best trade-offs",
        line={"dash": "dot", "color": DENSE["color"], "width": 2}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    for series, marker in looks.items():
        own = [point for point in points if point.series == series]
        spread = [point.spread or (point.y, point.y) for point in own]
        drawn.add_scatter(
            x=[point.x for point in own], y=[point.y for point in own], mode="markers", cliponaxis=False,
            name=plain(series), text=[plain(point.label) for point in own],
            marker={"size": 13 if len(points) < 12 else 10, **marker},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.5, "width": 3,
                "visible": any(point.spread is not None for point in own),
                "array": [high - point.y for point, (_, high) in zip(own, spread, strict=True)],
                "arrayminus": [point.y - low for point, (low, _) in zip(own, spread, strict=True)],
            },
            hovertemplate=f"%{{text}}<br>{of_cost.label}: %{{x:.4g}}<br>{of_loss.label}: %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    drawn.update_xaxes(**_scaled(of_cost, [point.x for point in points]))
    drawn.update_yaxes(**_scaled(of_loss, [point.y for point in points] + ([level[1]] if level is not None else [])))
    if level is not None:
        drawn.add_shape(
            type="line", xref="paper", x0=0, x1=1, y0=level[1], y1=level[1],
            line={"dash": "dash", "color": DENSE["color"], "width": 1},
        )  # fmt: skip
        # On a logarithmic axis a shape lies at a value, an annotation at the logarithm of one.
        drawn.add_annotation(
            xref="paper", x=0, xanchor="left", yanchor="bottom", showarrow=False, text=plain(level[0]),
            y=math.log10(level[1]) if of_loss.log else level[1],
        )  # fmt: skip
    better = "right" if of_cost.more_is_better else "left"
    about = f"Down and to the {better} is better. The dotted line joins the models that no other beats in both."
    if any(point.spread is not None for point in points):
        about += " Bars are the range over seeds."
    rows = [
        (point.label, f"{point.x:.4g}", f"{point.y:.4g}", "yes" if index in best else "no")
        for index, point in enumerate(points)
    ]
    title = f"{of_cost.title} against {of_loss.title}"
    headings = ("model", of_cost.label, of_loss.label, "on the line")
    return Figure(name, title, about, spec(drawn, named=len(looks)), headings, rows)


def layer_map(
    name: str, title: str, about: str, unit: str, values: Sequence[tuple[str, float]]
) -> Figure | None:
    """A map of one number of every layer (name, value): blocks to the right, kinds of layers downwards. None when no
    name has the number of a block in it."""
    placed = [(place, value) for layer, value in values if (place := _place(layer)) is not None]
    if not placed:
        return None
    kinds = list(dict.fromkeys(kind for (kind, _), _ in placed))
    blocks = sorted({block for (_, block), _ in placed})
    grid: list[list[float | None]] = [[None] * len(blocks) for _ in kinds]
    for (kind, block), value in placed:
        grid[kinds.index(kind)][blocks.index(block)] = value
    drawn = go.Figure(
        go.Heatmap(
            z=grid, x=blocks, y=kinds, colorscale=SCALE, xgap=1, ygap=1, colorbar={"thickness": 12},
            hovertemplate="block %{x}<br>%{y}<br>" + unit + " %{z:.4g}<extra></extra>",
        )
    )  # fmt: skip
    drawn.update_xaxes(title="block", showgrid=False)
    drawn.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    rows = [(layer, f"{value:.4f}") for layer, value in values]
    return Figure(name, title, about, spec(drawn, 140 + 28 * len(kinds)), ("layer", unit), rows)


def differences(comparison: TaskComparison, name: str) -> Figure | None:
    """Score minus that of the reference with its interval, for every task and model; None without a reference."""
    drawn = go.Figure()
    rows = []
    shown = 0
    for index, candidate in enumerate(comparison.candidates):
        scores = [score for score in candidate.scores if score.difference is not None and score.metric != "perplexity"]
        gaps = [score.difference for score in scores if score.difference is not None]
        names = [f"{score.task} ({score.metric})" for score in scores]
        shown += len(scores)
        drawn.add_scatter(
            x=[gap.value for gap in gaps], y=names, mode="markers", name=plain(candidate.model), orientation="h",
            offsetgroup=str(index),
            marker={"size": 10, **look(index)},
            error_x={
                "type": "data", "symmetric": False, "array": [gap.high - gap.value for gap in gaps],
                "arrayminus": [gap.value - gap.low for gap in gaps], "thickness": 1.5,
            },
            hovertemplate="%{y}<br>%{x:+.3f}<extra>" + plain(candidate.model) + "</extra>",
        )  # fmt: skip
        rows += [
            (candidate.model, score.task, score.metric, f"{gap.value:+.4f}", f"{gap.low:+.4f} to {gap.high:+.4f}")
            for score, gap in zip(scores, gaps, strict=True)
        ]
    if not shown:
        return None
    drawn.update_layout(showlegend=True, scattermode="group")
    drawn.update_xaxes(title="difference in score", zeroline=True)
    drawn.update_yaxes(autorange="reversed", automargin=True)
    about = "Bars are 95% intervals of the paired difference; one that crosses zero says the sign is not sure."
    headings = ("model", "task", "metric", "difference", "95% interval")
    title = "Tasks: difference from the dense model"
    return Figure(name, title, about, spec(drawn, 120 + 30 * shown, len(comparison.candidates)), headings, rows)


def _scaled(axis: Axis, values: Sequence[float]) -> dict[str, Any]:
    """The settings of an axis that shows ``values``; where it is logarithmic, marks at round numbers."""
    if not axis.log:
        return {"title": axis.label, "rangemode": "tozero" if axis.from_zero else "normal"}
    low, high = min(values), max(values)
    marks = next(
        marks
        for steps in (FINE, (1.0, 2.0, 3.0, 4.0, 6.0, 8.0), (1.0, 2.0, 5.0), (1.0,))
        if len(marks := _round_numbers(low, high, steps)) <= 9 or steps == (1.0,)
    )
    return {"title": axis.label, "type": "log", "tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]}


def _round_numbers(low: float, high: float, steps: Sequence[float]) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [mark for decade in decades for step in steps if low / 1.5 <= (mark := step * 10.0**decade) <= high * 1.5]


def look(index: int) -> dict[str, str]:
    """Colour and symbol of the model or series of that number; no two of the first 36 look alike."""
    return {"color": COLOURS[index % 6], "symbol": SYMBOLS[(index + index // 6) % 6]}


def _place(name: str) -> tuple[str, int] | None:
    """``model.layers.3.mlp.up_proj`` as (``mlp.up_proj``, 3); experts keep their number in the kind."""
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    return None if match is None else (match[2], int(match[1]))


def plain(text: str) -> str:
    """Text that plotly shows as it is, though it reads some HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def spec(figure: Any, height: int = 340, named: int = 0) -> str:
    """The figure as JSON, in colours that the page sets for its theme; ``named`` lines of legend go below."""
    height, below = height + 22 * named, 56 + 22 * named
    figure.update_layout(
        template="none", height=height, margin={"l": 64, "r": 24, "t": 12, "b": below},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "v", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
    )  # fmt: skip
    found = json.loads(figure.to_json())
    # Inside a script element no "<" may start anything.
    return json.dumps({"data": found["data"], "layout": found["layout"]}).replace("<", "\\u003c")


def present(figures: Sequence[Figure | None]) -> list[Figure]:
    """Those that there are."""
    return [figure for figure in figures if figure is not None]
