"""The page of attention maps: its numbers, and that it draws them and follows its controls in a real browser."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("plotly")
from rarefy.attention.call import Call
from rarefy.attention.estimators import TrueMass
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.policy import Policy
from rarefy.attention.reach import Reach
from rarefy.attention.selectors import TopK
from rarefy.attention.source import Plain
from rarefy.core.errors import OptionError
from rarefy.evaluation.attention import AttentionMaps, examine
from rarefy.reporting.attention import LEAST, write_maps
from tests.reporting.conftest import Browser


@pytest.fixture
def maps() -> AttentionMaps:
    """Two layers of four heads over 100 tokens in blocks of 16."""
    plan = AttentionPlan(TrueMass(), TopK(0.4), Policy(dense_below=0), 16, 16)
    layers = {}
    for layer in (2, 5):
        query, key, value = (torch.randn(1, heads, 100, 8) for heads in (4, 2, 2))
        layers[layer] = examine(plan, Call(3 * query, Plain(key, value), Reach.last(100, 100), 0.3, layer))
    return AttentionMaps("tiny <model>", "oracle:density=0.4", "letters.txt", 100, 16, 16, layers)


def test_what_a_plan_keeps_is_between_nothing_and_the_best(maps: AttentionMaps) -> None:
    for choice in maps.layers.values():
        assert choice.kept.shape == choice.mass.shape == choice.scores.shape == (1, 4, 7, 7)
        assert torch.allclose(choice.mass.sum(-1), torch.ones(1, 4, 7), atol=1e-5)
        assert bool((choice.recall <= choice.best + 1e-6).all()) and bool((choice.recall > 0.3).all())
        assert torch.allclose(choice.density, choice.kept.sum((0, 2, 3)) / 28)
        assert bool((choice.error > 0).all()) and bool((choice.error < 1).all())
    facts = maps.summary()
    expected = torch.stack([choice.recall for choice in maps.layers.values()]).mean()
    assert facts["recall"] == pytest.approx(float(expected)) and facts["tokens"] == 100


def test_the_page_holds_every_map(maps: AttentionMaps, tmp_path: Path) -> None:
    page = write_maps(maps, tmp_path / "deep" / "page.html")
    text = page.read_text("utf-8")
    assert "tiny &lt;model&gt;" in text and "https://" not in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [layer["layer"] for layer in data["layers"]] == [2, 5] and data["least"] == LEAST
    for layer, choice in zip(data["layers"], maps.layers.values(), strict=True):
        selected, true, estimated = (
            torch.tensor(list(base64.b64decode(layer[name]))).view(4, 7, 7)
            for name in ("selected", "true", "estimated")
        )
        assert torch.equal(selected == 255, choice.kept[0])
        for shades in (selected, true, estimated):
            assert torch.equal(shades > 0, choice.some[0])
        shares = torch.exp(torch.log(torch.tensor(LEAST)) * (1 - (true.float() - 1) / 254))
        real = choice.some[0] & (choice.mass[0] > 10 * LEAST)
        assert torch.allclose(shares[real], choice.mass[0][real], rtol=0.03)
    assert text.count("<tr>") == 1 + 8
    with pytest.raises(OptionError, match="not a page"):
        write_maps(maps, tmp_path / "page.txt")


@pytest.mark.parametrize("width", [1200, 360])
def test_a_browser_draws_them_and_follows_the_controls(
    browser: Browser, maps: AttentionMaps, tmp_path: Path, width: int
) -> None:
    page = write_maps(maps, tmp_path / "page.html")
    script = """
      const colours = (name) => {
        const canvas = document.getElementById(name), copy = new OffscreenCanvas(canvas.width, canvas.height);
        const context = copy.getContext("2d", { willReadFrequently: true });
        context.drawImage(canvas, 0, 0);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
        return [...Array(pixels.length / 4).keys()].map((at) => pixels.slice(4 * at, 4 * at + 4).join());
      };
      const drawn = colours("true");
      root.dataset.clear = drawn.filter((colour) => colour === "0,0,0,0").length;
      root.dataset.kinds = new Set(drawn).size;
      root.dataset.read = colours("selected").filter((colour) => colour.startsWith("253,231,37")).length;
      root.dataset.first = document.getElementById("facts").textContent;
      const move = (name, value) => {
        document.getElementById(name).value = value;
        document.getElementById(name).dispatchEvent(new Event("input"));
      };
      move("layer", 1); move("head", 3);
      root.dataset.second = document.getElementById("facts").textContent;
      root.dataset.moved = colours("true").join() !== drawn.join();
      const canvas = document.getElementById("true"), box = canvas.getBoundingClientRect();
      canvas.dispatchEvent(new PointerEvent("pointermove", {
        clientX: box.left + 0.5 * box.width / 7, clientY: box.top + 6.5 * box.height / 7 }));
      root.dataset.told = document.getElementById("readout").textContent;
      root.dataset.overflow = root.scrollWidth - innerWidth;
      root.dataset.named = canvas.getAttribute("aria-label");
    """
    _, console, data = browser.open(page, script, width)
    choice = maps.layers[2]
    assert console == "" and data["maps"] == "yes" and int(data["overflow"]) <= 0
    assert int(data["clear"]) == 21 and int(data["kinds"]) > 10
    assert int(data["read"]) == int(choice.kept[0, 0].sum())
    assert data["first"].startswith(f"Layer 2, head 0: {float(choice.density[0]):.1%} of the blocks")
    assert data["second"].startswith("Layer 5, head 3:") and data["moved"] == "true"
    assert data["named"] == "true map of layer 5, head 3"
    assert data["told"].startswith("Queries 96 to 99, keys 0 to 15: estimated ")
