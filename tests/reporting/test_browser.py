"""The page as people open it: from a file, on a screen and on a phone, in light and dark, with a keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("plotly")
from rarefy.reporting.findings import Findings
from rarefy.reporting.page import write_report
from tests.reporting.conftest import Browser

MEASURE = """
  const luminance = (colour) => {
    const channels = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2];
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = getComputedStyle(document.body).backgroundColor;
  const worst = ["p", ".note", "dt", "nav a", "summary", "caption", ".card p"].map((name) =>
    contrast(getComputedStyle(document.querySelector(name)).color, ground));
  root.dataset.contrast = Math.min(...worst);
  root.dataset.overflow = root.scrollWidth - innerWidth;
  root.dataset.plots = document.querySelectorAll(".plot .main-svg").length;
  root.dataset.ink = document.querySelector(".plot .xtick text").style.fill;
  root.dataset.text = getComputedStyle(document.body).color;
"""
DARK = 'const theme = document.getElementById("theme"); theme.click(); theme.click();'


@pytest.fixture
def page(findings: Findings, tmp_path: Path) -> Path:
    return write_report(findings, tmp_path / "page.html")[0]


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("theme", ["auto", "dark"])
def test_it_is_readable_everywhere(browser: Browser, page: Path, width: int, theme: str) -> None:
    script = (DARK if theme == "dark" else "") + MEASURE
    _, console, data = browser.open(page, script, width)
    assert console == "" and data["theme"] == theme
    assert int(data["overflow"]) <= 0, "the page is wider than the screen"
    assert int(data["plots"]) >= 8, "not every picture was drawn"
    assert float(data["contrast"]) >= 4.5, "some text is hard to read"
    if theme == "auto":  # the pictures follow a change of theme a moment later
        assert data["ink"] == data["text"]


def test_a_keyboard_reaches_and_works_everything(browser: Browser, page: Path) -> None:
    script = """
      const stops = [...document.querySelectorAll("a[href], button, summary, [tabindex='0']")];
      root.dataset.reached = stops.every((stop) => { stop.focus(); return document.activeElement === stop; }) ||
        stops.filter((stop) => { stop.focus(); return document.activeElement !== stop; }).every((stop) =>
          stop.closest("details:not([open])"));
      root.dataset.first = stops[0].textContent;
      const table = document.querySelector("#quality-0 > .scroll table");
      const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.slice(0, 4)).join();
      const heading = table.querySelectorAll("thead button")[3];
      heading.click(); root.dataset.rising = names() + heading.parentNode.getAttribute("aria-sort");
      heading.click(); root.dataset.falling = names() + heading.parentNode.getAttribute("aria-sort");
    """
    _, console, data = browser.open(page, script)
    assert console == "" and data["reached"] == "true" and data["first"] == "Skip to the results"
    assert data["rising"] == "SmolL,int4,a <b,int3".replace("SmolL", "Smol") + "ascending"
    assert data["falling"] == "int3,a <b,int4,Smol" + "descending"


def test_a_picture_of_it_can_be_taken(browser: Browser, page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    html, _, _ = browser.open(page, picture=picture)
    assert picture.stat().st_size > 50_000 and "<h1>SmolLM2-135M-Instruct, compressed</h1>" in html
