"""The part of a report on long contexts: maps of needles, curves by position, and every task."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from rarefy.evaluation.long.position import ENOUGH
from rarefy.evaluation.long.results import LongComparison, LongEvaluation, gain, summarize
from rarefy.reporting.figures import DENSE, SCALE, Figure, look, plain, spec

HEADINGS = (
    "model", "task", "asked", "exact", "NLL", "change", "95% interval", "KL from dense", "95% interval", "answers",
)  # fmt: skip


def needle_map(evaluation: LongEvaluation, name: str, worst: float | None = None) -> Figure | None:
    """How hard numbers hidden at each depth of each length were to tell; None without needles. ``worst``: the NLL where
    colours end, so that maps of several models can be compared."""
    cells = _cells(evaluation)
    if not cells:
        return None
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    grid: list[list[float | None]] = [
        [_mean([nll for nll, _ in cells[length, depth]]) if (length, depth) in cells else None for length in lengths]
        for depth in depths
    ]
    labels = [f"{depth:.0%}" for depth in depths]
    drawn = go.Figure(
        go.Heatmap(
            z=grid, x=[str(length) for length in lengths], y=labels, colorscale=SCALE, reversescale=True, xgap=2,
            ygap=2, colorbar={"thickness": 12}, zmin=None if worst is None else 0, zmax=worst,
            hovertemplate="%{x} tokens, depth %{y}<br>NLL %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    drawn.update_xaxes(title="tokens of the context", type="category", showgrid=False)
    drawn.update_yaxes(title="depth of the needle", autorange="reversed", type="category", showgrid=False)
    rows = [
        (
            str(length), f"{depth:.0%}", f"{_mean([nll for nll, _ in found]):.3f}",
            f"{_mean([float(exact) for _, exact in found]):.0%}", str(len(found)),
        )
        for (length, depth), found in sorted(cells.items())
    ]  # fmt: skip
    about = "NLL of the hidden number when it is asked for, in nats per token: the lower, the better it is remembered."
    headings = ("tokens", "depth", "NLL", "exact", "answers")
    return Figure(name, f"{evaluation.model}: needles", about, spec(drawn, 320), headings, rows)


def _cells(evaluation: LongEvaluation) -> dict[tuple[int, float], list[tuple[float, bool]]]:
    """NLL and exactness of every needle by length and depth, asked one by one."""
    cells: dict[tuple[int, float], list[tuple[float, bool]]] = {}
    for answer in evaluation.answers:
        if answer.task == "needle" and answer.mode == "multi_request" and answer.depth is not None:
            # The name of a session starts with the length that was asked for; the context is a little shorter.
            place = int(answer.session.split("-")[0]), round(answer.depth, 3)
            cells.setdefault(place, []).append((answer.nll, answer.exact))
    return cells


def position_plot(comparison: LongComparison, name: str) -> Figure | None:
    """Likelihood by position of every model, with the power law through the reference's; None without any."""
    everyone = [*([comparison.reference] if comparison.reference else []), *comparison.candidates]
    drawn = go.Figure()
    rows = []
    for index, evaluation in enumerate(everyone):
        curve = evaluation.positions
        if curve is None:
            continue
        middles = [(start * stop) ** 0.5 for start, stop in curve.bins]
        dense = evaluation is comparison.reference
        # The first candidate looks the same with a reference before it and without one.
        style = DENSE if dense else look(index - (comparison.reference is not None))
        drawn.add_scatter(
            x=middles, y=curve.nll, mode="lines+markers", name=plain(evaluation.model),
            marker={"size": 8, **style}, line={"color": style["color"]},
            hovertemplate="position %{x:.0f}<br>NLL %{y:.3f}<extra>" + plain(evaluation.model) + "</extra>",
        )  # fmt: skip
        if dense and curve.fit is not None:
            law = curve.fit
            drawn.add_scatter(
                x=middles, y=[law.alpha * x**law.beta + law.gamma for x in middles], mode="lines", hoverinfo="skip",
                line={"dash": "dot", "color": DENSE["color"]},
                name=f"{law.alpha:.3g} x^{law.beta:.2f} + {law.gamma:.3g}",
            )  # fmt: skip
        against = comparison.reference.positions if comparison.reference is not None and not dense else None
        changes = [None] * len(curve.bins) if against is None else curve.change(against)
        for (start, stop), nll, change in zip(curve.bins, curve.nll, changes, strict=True):
            told = "-" if change is None else f"{change.value:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
            rows.append((evaluation.model, f"{start} to {stop}", f"{nll:.4f}", told))
    if not rows:
        return None
    edges = sorted({start for each in everyone if each.positions is not None for start, _ in each.positions.bins})
    shown = edges[:: -(-len(edges) // 6)]
    drawn.update_xaxes(title="position (tokens)", type="log", tickvals=shown, ticktext=[str(edge) for edge in shown])
    drawn.update_yaxes(title="NLL (nats per token)")
    drawn.update_layout(showlegend=True)
    about = (
        "How well each next token is predicted the more text came before it. A gap that widens to the right means that "
        "errors pile up in the cache."
    )
    documents = next(len(each.positions.by_document) for each in everyone if each.positions is not None)
    if documents < ENOUGH:
        about += f" From {documents} texts only, fewer than the {ENOUGH} that a curve to publish needs."
    headings = ("model", "positions", "NLL", "change from dense (95% interval)")
    return Figure(name, "Likelihood by position", about, spec(drawn, named=len(everyone) + 1), headings, rows)


def figures_of(comparison: LongComparison, number: int) -> list[Figure | None]:
    """All pictures of one comparison."""
    everyone = [*([comparison.reference] if comparison.reference else []), *comparison.candidates]
    hardest = [_mean([nll for nll, _ in found]) for each in everyone for found in _cells(each).values()]
    worst = max(hardest, default=None)
    maps = [needle_map(each, f"plot-needles-{number}-{index}", worst) for index, each in enumerate(everyone)]
    return [*maps, position_plot(comparison, f"plot-positions-{number}")]


def rows_of(comparison: LongComparison) -> list[Sequence[str]]:
    """A row for each task and way of asking of each model."""
    rows: list[Sequence[str]] = []
    everyone = [*([comparison.reference] if comparison.reference else []), *comparison.candidates]
    for evaluation in everyone:
        dense = evaluation is comparison.reference
        for each in summarize(evaluation, None if dense else comparison.reference):
            change, kl = each.nll_change, each.kl
            rows.append(
                (
                    evaluation.model + (" (dense reference)" if dense else ""), each.task, ASKED[each.mode],
                    f"{each.accuracy:.1%}", f"{each.nll:.3f}", "-" if change is None else f"{change.value:+.4f}",
                    "-" if change is None else f"{change.low:+.4f} to {change.high:+.4f}",
                    "-" if kl is None else f"{kl.value:.4f}",
                    "-" if kl is None else f"{kl.low:.4f} to {kl.high:.4f}", str(each.answers),
                )
            )  # fmt: skip
    return rows


ASKED = {"multi_turn": "in one conversation", "multi_request": "one by one", "both": "both ways"}


def notes_of(comparison: LongComparison) -> list[str]:
    """What else is to be said: the protocol, what was learned of a language, what the stages cost."""
    everyone = [*([comparison.reference] if comparison.reference else []), *comparison.candidates]
    notes = [f"{everyone[0].protocol.describe()}."]
    notes[0] = notes[0][0].upper() + notes[0][1:]
    for each in everyone:
        learned = gain(each)
        if learned is not None:
            notes.append(f"{each.model}: the book of a made-up language saves {learned:.3f} nats a token.")
        if each.stages is not None:
            stages = each.stages
            notes.append(
                f"{each.model}: contexts are encoded at {stages.prefill_tokens_per_second:.0f} tokens/s and keep "
                f"{stages.cache_bytes_per_token:.0f} bytes a token; a question takes "
                f"{1000 * stages.step_seconds:.0f} ms, a copy of the cache {1000 * stages.load_seconds:.0f} ms."
            )
    return notes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
