"""The page: findings in, one HTML file out that needs nothing but a browser."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from pathlib import Path

from rarefy.calibration.report import CompressionReport, by_reason
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.core.files import write_text
from rarefy.core.memory import human
from rarefy.evaluation.results import Comparison, Evaluation
from rarefy.reporting.benchmarks import title as title_of
from rarefy.reporting.findings import Findings

try:
    import jinja2
    from plotly.offline import get_plotlyjs

    from rarefy.reporting import caches, efficiency, figures, long, measured
    from rarefy.reporting.figures import Figure, present
    from rarefy.reporting.parts import Card, Section, Table
except ImportError as failure:
    raise UnsupportedError(
        f"Reports are drawn by plotly, which cannot be imported here ({failure}); run: pip install plotly jinja2"
    ) from None


def write_report(findings: Findings, out: Path, title: str = "") -> tuple[Path, Path]:
    """Write ``findings`` as the page ``out`` and, beside it, as JSON that ``read_findings`` reads; the two paths.

    Raises OptionError when there is nothing to show or ``out`` is not an .html file.
    """
    if findings.empty:
        raise OptionError("There is nothing to report; name results written by compress, eval or compare with --json.")
    check_page(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".json")
    write_text(beside, findings_json(findings))
    write_text(out, render(findings, title))
    return out, beside


def check_page(out: Path) -> None:
    """Raise OptionError unless ``out`` is called like a page."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--out '{out}' is not a page; name a file that ends in .html.")


def findings_json(findings: Findings) -> str:
    """Findings as the JSON of a result of their own kind."""
    return json.dumps({"kind": "findings", **json.loads(findings.model_dump_json())}, indent=1) + "\n"


def render(findings: Findings, title: str = "") -> str:
    """The page as text."""
    judged, timed = measured.sections(findings.benchmarks)
    sections = [
        *_quality(findings), *judged, *efficiency.sections(findings.efficiency), *caches.sections(findings.caches),
        *timed, *_tasks(findings), *_long(findings), *_layers(findings), *_differences(findings),
    ]  # fmt: skip
    cards = [card for comparison in findings.comparisons for card in _cards(comparison, findings)]
    cards += measured.cards(findings.benchmarks)
    return templates().get_template("page.html").render(
        title=title or _title(findings), cards=cards, sections=sections, runs=findings.runs, notes=findings.notes,
        dense=_dense(findings), style=asset("style.css"), script=asset("page.js"), plotly=_plotly(),
        draws=any(section.figures for section in sections),
    )  # fmt: skip


def templates() -> jinja2.Environment:
    """The templates of pages, by the names of their files."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(asset), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def asset(name: str) -> str:
    """A template, style or script of pages."""
    return (files("rarefy.reporting") / "assets" / name).read_text("utf-8")


@functools.cache
def _plotly() -> str:
    return str(get_plotlyjs())


def _title(findings: Findings) -> str:
    dense = _dense(findings)
    if dense is not None:
        return f"{dense.model}, compressed"
    if findings.compressions:
        return f"{findings.compressions[0].model}, compressed"
    names = dict.fromkeys(benchmark.name for benchmark in findings.benchmarks)
    return title_of(next(iter(names))) if len(names) == 1 else "Results"


def _dense(findings: Findings) -> Evaluation | None:
    return next((each.reference for each in findings.comparisons if each.reference is not None), None)


def _cards(comparison: Comparison, findings: Findings) -> list[Card]:
    dense = comparison.reference
    cards = []
    for each in comparison.candidates:
        facts = []
        full = dense.stored_bytes if dense is not None and dense.stored_bytes else each.dense_bytes
        smaller = full / each.stored_bytes if full and each.stored_bytes else None
        if each.stored_bytes:
            facts.append(("whole model", human(each.stored_bytes) + (f" of {human(full)}" if full else "")))
        if each.bits_per_weight:
            facts.append(("bits per compressed weight", f"{each.bits_per_weight['total']:.2f}"))
        before = f" (dense {dense.perplexity:.2f})" if dense is not None else ""
        facts.append(("perplexity", f"{each.perplexity:.2f}{before}"))
        if each.kl is not None:
            facts.append(("KL from dense", f"{each.kl:.3f} nats per token"))
        if each.top1_agreement is not None:
            facts.append(("same next token as dense", f"{each.top1_agreement:.1%}"))
        speed = f"{each.tokens_per_second:.0f} tokens/s"
        if dense is not None:
            speed += f" (dense {dense.tokens_per_second:.0f})"
        facts.append(("speed while evaluating", speed))
        report = findings.compression_of(each.model)
        if report is not None:
            facts.append(("recipe", f"{report.recipe}, took {report.seconds:.0f} s"))
        cards.append(Card(each.model, _gist(each, dense, smaller), facts))
    return cards


def _gist(each: Evaluation, dense: Evaluation | None, smaller: float | None) -> str:
    """The gain and the cost in one sentence."""
    gained = f"{smaller:.1f} times smaller" if smaller and smaller > 1 else "Not smaller"
    if dense is None:
        return f"{gained}; perplexity {each.perplexity:.2f}."
    change = each.perplexity / dense.perplexity - 1
    cost = f"perplexity {'up' if change >= 0 else 'down'} {abs(change):.1%}"
    kept = f", and {each.top1_agreement:.0%} of its next words stay the same" if each.top1_agreement is not None else ""
    return f"{gained}; {cost}{kept}."


def _quality(findings: Findings) -> list[Section]:
    sections = []
    for number, comparison in enumerate(findings.comparisons):
        everyone = [*([comparison.reference] if comparison.reference else []), *comparison.candidates]
        against = "kl" if comparison.reference is not None else "perplexity"
        kinds = [("bits", against), ("size", "perplexity"), ("speed", against)]
        drawn = [figures.trade_off(comparison, *kind, f"plot-trade-{number}-{kind[0]}") for kind in kinds]
        rows = [_quality_row(each, each is comparison.reference) for each in everyone]
        headings = ("model", "MB", "bits/weight", "perplexity", "KL (nats)", "same token", "tokens/s", "peak memory")
        protocol = everyone[0].protocol.describe()
        notes = [f"Measured on {everyone[0].tokens} predicted tokens: {protocol}."]
        title = "Quality and size" + (f" ({number + 1})" if len(findings.comparisons) > 1 else "")
        table = Table("Every model under this protocol", headings, rows)
        sections.append(Section(f"quality-{number}", title, present(drawn), [table], notes))
    return sections


def _quality_row(each: Evaluation, reference: bool) -> tuple[str, ...]:
    return (
        each.model + (" (dense reference)" if reference else ""),
        "-" if each.stored_bytes is None else f"{each.stored_bytes / 1e6:.1f}",
        "-" if not each.bits_per_weight else f"{each.bits_per_weight['total']:.3f}",
        f"{each.perplexity:.3f}",
        "-" if each.kl is None else f"{each.kl:.4f}",
        "-" if each.top1_agreement is None else f"{each.top1_agreement:.2%}",
        f"{each.tokens_per_second:.0f}",
        human(each.peak_bytes),
    )


def _error_map(report: CompressionReport, name: str) -> Figure | None:
    label = _label(report)
    observed = [(layer.name, layer.output_error) for layer in report.layers if layer.output_error is not None]
    if len(observed) == len(report.layers):
        about = "How far each layer's outputs on the calibration data are from the dense layer's, relative to these."
        return figures.layer_map(name, f"{label}: error of each layer", about, "relative output error", observed)
    about = "How far each stored weight is from the dense one, relative to it (Frobenius norm)."
    stored = [(layer.name, layer.relative_error) for layer in report.layers]
    return figures.layer_map(name, f"{label}: error of each layer", about, "relative error", stored)


def _bits_map(report: CompressionReport, name: str) -> Figure | None:
    bits = [(layer.name, layer.bits_per_weight) for layer in report.layers]
    if len({round(value, 3) for _, value in bits}) < 2:
        return None
    about = "Achieved bits of each layer, counted from what is stored."
    return figures.layer_map(name, f"{_label(report)}: bits of each layer", about, "bits per weight", bits)


def _label(report: CompressionReport) -> str:
    return Path(report.out).name if report.out else report.recipe


def _layers(findings: Findings) -> list[Section]:
    drawn: list[Figure | None] = []
    notes = []
    for number, report in enumerate(findings.compressions):
        drawn += [_error_map(report, f"plot-layers-{number}-error"), _bits_map(report, f"plot-layers-{number}-bits")]
        notes += [f"Fallback in {_label(report)}: {note}" for note in by_reason(report.layers)]
    if not findings.compressions:
        return []
    rows = [
        (
            _label(report), report.recipe, str(len(report.layers)),
            f"{report.bits_per_weight['total']:.3f}", human(report.stored_bytes),
            f"{report.dense_bytes / report.stored_bytes:.2f}", f"{_mean_error(report):.4f}", f"{report.seconds:.1f}",
            human(report.peak_bytes),
        )
        for report in findings.compressions
    ]  # fmt: skip
    headings = (
        "compressed model", "recipe", "layers", "bits/weight", "stored", "times smaller", "mean error", "seconds",
        "peak memory",
    )  # fmt: skip
    table = Table("What each compression did", headings, rows)
    return [Section("layers", "Layer by layer", present(drawn), [table], notes)]


def _mean_error(report: CompressionReport) -> float:
    return sum(layer.relative_error for layer in report.layers) / max(1, len(report.layers))


def _tasks(findings: Findings) -> list[Section]:
    sections = []
    for number, comparison in enumerate(findings.tasks):
        everyone = [*([comparison.reference] if comparison.reference else []), *comparison.candidates]
        rows = []
        for each in everyone:
            for score in each.scores:
                gap = score.difference
                rows.append(
                    (
                        each.model + (" (dense reference)" if each is comparison.reference else ""), score.task,
                        score.metric, f"{score.value:.4f}", "-" if gap is None else f"{gap.value:+.4f}",
                        "-" if gap is None else f"{gap.low:+.4f} to {gap.high:+.4f}", str(score.examples),
                    )
                )  # fmt: skip
        headings = ("model", "task", "metric", "score", "difference", "95% interval", "examples")
        first = everyone[0]
        note = f"Scored by lm-eval on examples from {first.data}, in {first.dtype}"
        note += "." if first.limit is None else f", the first {first.limit} of each task."
        drawn = present([figures.differences(comparison, f"plot-tasks-{number}")])
        title = "Tasks" + (f" ({number + 1})" if len(findings.tasks) > 1 else "")
        sections.append(Section(f"tasks-{number}", title, drawn, [Table("Every score", headings, rows)], [note]))
    return sections


def _long(findings: Findings) -> list[Section]:
    sections = []
    for number, comparison in enumerate(findings.long):
        drawn = present(long.figures_of(comparison, number))
        table = Table("Every task", long.HEADINGS, long.rows_of(comparison))
        title = "Long contexts" + (f" ({number + 1})" if len(findings.long) > 1 else "")
        sections.append(Section(f"long-{number}", title, drawn, [table], long.notes_of(comparison)))
    return sections


def _differences(findings: Findings) -> list[Section]:
    sections = []
    for number, pair in enumerate(findings.differences):
        apart = [(layer.name, layer.difference) for layer in pair.layers if layer.difference is not None]
        about = f"How far the weights of {pair.second} are from those of {pair.first}, relative to these."
        title = f"{pair.second} against {pair.first}"
        drawn = present([figures.layer_map(f"plot-apart-{number}", title, about, "relative difference", apart)])
        rows = [
            (
                layer.name, layer.first, layer.second, f"{layer.first_bits:.3f}", f"{layer.second_bits:.3f}",
                "-" if layer.difference is None else f"{layer.difference:.4f}",
            )
            for layer in pair.layers
        ]  # fmt: skip
        headings = ("layer", pair.first, pair.second, "bits", "bits", "difference")
        table = Table("How each layer is stored in both", headings, rows)
        sections.append(Section(f"differences-{number}", "Two models, layer by layer", drawn, [table], []))
    return sections
