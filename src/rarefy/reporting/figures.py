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
    """A number of an evaluation as an axis; ``of`` gives None where it was not measured."""

    title: str
    label: str
    of: Callable[[Evaluation], float | None]
    more_is_better: bool = False
    from_zero: bool = False


def _bits(evaluation: Evaluation) -> float | None:
    return None if evaluation.bits_per_weight is None else evaluation.bits_per_weight["total"]


AXES = {
    "bits": Axis("Bits per weight", "bits per compressed weight", _bits),
    "size": Axis("Size", "MB of the whole model", lambda each: each.stored_bytes and each.stored_bytes / 1e6),
    "speed": Axis("Speed", "tokens per second", lambda each: each.tokens_per_second, more_is_better=True),
    # The reference, which has no divergence, diverges from itself by nothing.
    "kl": Axis("divergence", "KL from dense (nats per token)", lambda each: each.kl or 0.0, from_zero=True),
    "perplexity": Axis("perplexity", "perplexity", lambda each: each.perplexity),
}


def trade_off(comparison: Comparison, cost: str, loss: str, name: str) -> Figure | None:
    """Every model as a point, ``cost`` against ``loss`` (keys of AXES), with the line of those that nobody beats.

    The dense reference takes part but for bits, which it would stretch beyond reading. None when fewer than two models
    have both numbers.
    """
    dense = comparison.reference
    everyone = [*([dense] if dense is not None and cost != "bits" else []), *comparison.candidates]
    of_cost, of_loss = AXES[cost], AXES[loss]
    points = [
        (each, x, y)
        for each in everyone
        if (x := of_cost.of(each)) is not None and (y := of_loss.of(each)) is not None and math.isfinite(y)
    ]
    if len(points) < 2:
        return None
    sign = -1.0 if of_cost.more_is_better else 1.0
    best = frontier([(sign * x, y) for _, x, y in points])
    drawn = go.Figure()
    drawn.add_scatter(
        x=[points[i][1] for i in best], y=[points[i][2] for i in best], mode="lines", name="best trade-offs",
        line={"dash": "dot", "color": COLOURS[-1], "width": 2}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    for each, x, y in points:
        label = plain(each.model) + (" (dense)" if each is dense else "")
        drawn.add_scatter(
            x=[x], y=[y], mode="markers", name=label, cliponaxis=False,
            marker={"size": 13, **_marker(comparison, each)},
            hovertemplate=f"{label}<br>{of_cost.label}: %{{x:.4g}}<br>{of_loss.label}: %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    drawn.update_xaxes(title=of_cost.label)
    drawn.update_yaxes(title=of_loss.label, rangemode="tozero" if of_loss.from_zero else "normal")
    better = "right" if of_cost.more_is_better else "left"
    rows = [
        (each.model, f"{x:.4g}", f"{y:.4g}", "yes" if index in best else "no")
        for index, (each, x, y) in enumerate(points)
    ]
    return Figure(
        name, f"{of_cost.title} against {of_loss.title}",
        f"Down and to the {better} is better. The dotted line joins the models that no other beats in both.",
        spec(drawn, named=len(points)), ("model", of_cost.label, of_loss.label, "on the line"), rows,
    )  # fmt: skip


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
            marker={"size": 10, "color": COLOURS[index % 6], "symbol": SYMBOLS[index % 6]},
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
    drawn.update_xaxes(title="score minus that of the dense model", zeroline=True)
    drawn.update_yaxes(autorange="reversed", automargin=True)
    about = "Bars are 95% intervals of the paired difference; one that crosses zero says the sign is not sure."
    headings = ("model", "task", "metric", "difference", "95% interval")
    title = "Tasks: difference from the dense model"
    return Figure(name, title, about, spec(drawn, 120 + 30 * shown, len(comparison.candidates)), headings, rows)


def _marker(comparison: Comparison, evaluation: Evaluation) -> dict[str, str]:
    """The colour and symbol that a model has in every picture of a comparison; the reference is grey."""
    if evaluation is comparison.reference:
        return {"color": COLOURS[-1], "symbol": SYMBOLS[-1]}
    index = next(i for i, each in enumerate(comparison.candidates) if each is evaluation)
    return {"color": COLOURS[index % 6], "symbol": SYMBOLS[index % 6]}


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
