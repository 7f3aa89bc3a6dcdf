"""The page: everything inside it, nothing of the reader's names run as code, and its data beside it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

pytest.importorskip("plotly")
from rarefy.core.errors import OptionError
from rarefy.evaluation.results import Comparison
from rarefy.reporting import figures
from rarefy.reporting.findings import Findings, read_findings
from rarefy.reporting.page import render, write_report
from tests.reporting.conftest import evaluation

PLOTLY = re.compile(r"<script>(?:(?!</script>).){1000000,}?</script>", re.DOTALL)


def own(html: str) -> str:
    """The page without the drawing library, which mentions many addresses."""
    return PLOTLY.sub("", html, count=1)


def test_the_page_needs_nothing_else(findings: Findings) -> None:
    html = own(render(findings))
    assert len(html) < 200_000
    assert not re.search(r"https?://|//[a-z]|@import|url\(", html)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', html)) == {
        "data:,", "#content", "#summary", "#quality-0", "#efficiency-0", "#caches-0", "#benchmark-0-0", "#benchmark-1",
        "#tasks-0", "#long-0", "#layers", "#differences-0", "#how",
    }  # fmt: skip
    ids = re.findall(r'id="([^"]*)"', html)
    assert len(set(ids)) == len(ids)


def test_it_says_what_was_gained_and_what_it_cost(findings: Findings) -> None:
    html = own(render(findings))
    assert "7.5 times smaller; perplexity up 15.6%, and 78% of its next words stay the same." in html
    for words in ("context 512, 8 windows", "rarefy eval models/int4", "AVX512", "Dense reference = a made-up"):
        assert words in html
    assert "rounded to nearest" in html and "peft" not in html


def test_names_are_text(findings: Findings) -> None:
    html = own(render(findings, title="</title><script>alert(1)</script>"))
    assert "<b>" not in html and "alert(1)</script>" not in html and "&lt;b&gt;bold" in html
    bad = evaluation("</script><script>alert(2)//", 4, 20, 0.2)
    everyone = [*findings.comparisons[0].candidates, bad]
    worse = Findings(comparisons=(Comparison(candidates=everyone, reference=None, passes=1),))
    assert "<script>alert(2)" not in own(render(worse))


def test_the_data_beside_the_page_are_read_back(findings: Findings, tmp_path: Path) -> None:
    page, data = write_report(findings, tmp_path / "deep" / "page.html")
    assert page.is_file() and data == tmp_path / "deep" / "page.json"
    assert read_findings([data]) == findings


def test_every_single_kind_makes_a_page(findings: Findings) -> None:
    for name in ("comparisons", "compressions", "tasks", "long", "differences", "benchmarks", "efficiency", "caches"):
        assert "<h2>" in own(render(Findings(**{name: getattr(findings, name)})))


def test_models_without_a_reference_or_without_a_finite_perplexity(tmp_path: Path) -> None:
    alone = Comparison(candidates=[evaluation("a", 4, math.inf, None)], reference=None, passes=1)
    html = own(render(Findings(comparisons=(alone,))))
    assert "perplexity inf" in html
    write_report(Findings(comparisons=(alone,)), tmp_path / "a.html")
    assert math.isinf(read_findings([tmp_path / "a.json"]).comparisons[0].candidates[0].perplexity)


def test_long_contexts_are_told_task_by_task(findings: Findings) -> None:
    html = own(render(Findings(long=findings.long)))
    for words in ("Likelihood by position", "dense: needles", "int4: needles", "in one conversation", "both ways"):
        assert words in html
    assert "keep 23040 bytes a token" in html and "From 3 texts only" in html
    assert "+0.1000 to +0.1000" in html
    assert html.count('"zmax": 3.1') == 2  # both maps in the same colours


def test_the_reference_is_no_choice_of_bits(findings: Findings) -> None:
    comparison = findings.comparisons[0]
    bits = figures.trade_off(comparison, "bits", "kl", "a")
    size = figures.trade_off(comparison, "size", "perplexity", "b")
    assert bits is not None and size is not None
    assert len(bits.rows) == 3 and len(size.rows) == 4
    assert [row[-1] for row in bits.rows] == ["yes", "yes", "no"]
    one = comparison.model_copy(update={"candidates": comparison.candidates[:1]})
    assert figures.trade_off(one, "bits", "kl", "a") is None


def test_benchmarks_show_every_recipe_by_bits_and_quality(findings: Findings) -> None:
    html = own(render(Findings(benchmarks=findings.benchmarks)))
    assert "At 4.20 bits per weight gptq int4 is the best of 4 ways: perplexity 21.00 (+5.0%)." in html
    assert "up to 2.5 bits" in html and "9,000.00 (450 times dense)" in html
    assert "Far above, and only in the table: rtn int2." in html and "22.00 to 24.00" in html
    assert "by benchmarks/weight_accuracy.py on A processor, torch 2.13.0, transformers 5.23.0, at abc1234." in html
    assert "Speed against peers" in html and "C2 decode" in html
    assert "<h1>Weight accuracy</h1>" in own(render(Findings(benchmarks=findings.benchmarks[:1])))


def test_costs_are_told_with_their_definitions(findings: Findings) -> None:
    html = own(render(Findings(efficiency=findings.efficiency)))
    for words in (
        "The machine reads 10.0 GB/s and multiplies at 100 GFLOP/s", "Time of a token against perplexity",
        "Memory over time", "Energy: modelled; modelled is a stated power", "batch 1, 128 + 32 tokens", "11.2%",
        "Quality: context 512, 4 windows.", "80.0%",
    ):  # fmt: skip
        assert words in html, words
    assert "3.2" in html  # times smaller, times quality kept


def test_caches_are_told_by_bits_and_divergence(findings: Findings) -> None:
    html = own(render(Findings(caches=findings.caches)))
    for words in ("KV caches of SmolLM2", "Bits per number of the cache against divergence", "kivi:num_bits=2"):
        assert words in html
    assert "+0.2000 (+0.1000 to +0.4000)" in html and "chunked, 64 tokens at a time" in html


def test_a_recipe_looks_the_same_in_every_picture(findings: Findings) -> None:
    accuracy = findings.benchmarks[0]
    more = accuracy.model_copy(update={"rows": (*accuracy.rows[4:], *({**row, "model": "b"} for row in accuracy.rows))})
    html = own(render(Findings(benchmarks=(more,))))
    looks = re.findall(r'"marker": {[^}]*"color": "([^"]*)"[^}]*}[^}]*?"name": "gptq"', html)
    assert len(looks) >= 3 and len(set(looks)) == 1


def test_looks_differ_and_marks_are_round() -> None:
    assert len({tuple(figures.look(index).values()) for index in range(36)}) == 36
    for low, high in ((3.1, 9), (0.0016, 13), (46, 92), (1, 1e9), (5, 5)):
        axis = figures._scaled(figures.Axis("a", "b", log=True), [low, high])
        assert 1 <= len(axis["tickvals"]) <= 15 and "1e" not in "".join(axis["ticktext"][:3])


def test_layers_find_their_place() -> None:
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "h.1.attn.c_attn", "lm_head"]
    drawn = figures.layer_map("a", "t", "b", "error", [(name, 0.1) for name in names])
    assert drawn is not None and len(drawn.rows) == 4
    assert '"attn.c_attn"' in drawn.spec and "lm_head" not in drawn.spec
    assert figures.layer_map("a", "t", "b", "error", [("lm_head", 0.1)]) is None


def test_nothing_to_show_and_no_page(findings: Findings, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to report"):
        write_report(Findings(), tmp_path / "a.html")
    with pytest.raises(OptionError, match=r"ends in \.html"):
        write_report(findings, tmp_path / "a.pdf")


def test_quality_by_bits_comes_before_what_was_timed(findings: Findings) -> None:
    html = own(render(findings))
    sections = re.findall(r'<section id="([a-z]*-[^"]*)"', html)
    assert sections.index("benchmark-0-0") < sections.index("efficiency-0") < sections.index("benchmark-1")
