"""The page of attention maps: for any layer and head what the estimator said, what was selected, and what is true."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from rarefy.core.environment import Run
from rarefy.core.files import write_text
from rarefy.evaluation.attention import AttentionMaps, Choice
from rarefy.reporting.page import asset, check_page, templates

# The least share that has a colour of its own; smaller ones look alike.
LEAST = 1e-4
HEADINGS = ("layer, head", "density", "mass kept", "most that as few could keep", "output error")


def write_maps(maps: AttentionMaps, out: Path, run: Run | None = None) -> Path:
    """Write ``maps`` as the page ``out``. Raises OptionError unless it is an .html file."""
    check_page(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(maps, run))
    return out


def render(maps: AttentionMaps, run: Run | None = None) -> str:
    """The page as text."""
    rows = [
        (
            f"{layer}, {head}",
            *(f"{float(number[head]):.1%}" for number in (choice.density, choice.recall, choice.best)),
            f"{float(choice.error[head]):.3f}",
        )
        for layer, choice in maps.layers.items()
        for head in range(len(choice.density))
    ]
    data = {
        "block": [maps.block_q, maps.block_k], "tokens": maps.tokens, "least": LEAST,
        "layers": [_layer(number, choice) for number, choice in maps.layers.items()],
    }  # fmt: skip
    return templates().get_template("attention.html").render(
        maps=maps, summary=maps.summary(), headings=HEADINGS, rows=rows, run=run, style=asset("style.css"),
        script=asset("page.js"), drawing=asset("attention.js"), data=json.dumps(data),
    )  # fmt: skip


def _layer(number: int, choice: Choice) -> dict[str, object]:
    """One layer for the script: maps as bytes, ``[heads, rows, columns]`` in base64."""
    some = choice.some[0]
    finite = choice.scores[0].clamp(max=torch.finfo(torch.float32).max).masked_fill(~some, -torch.inf)
    estimated = finite.softmax(-1).nan_to_num()
    heads, rows, columns = some.shape
    return {
        "layer": number, "heads": heads, "rows": rows, "columns": columns,
        "estimated": _bytes(_shades(estimated, some)), "true": _bytes(_shades(choice.mass[0], some)),
        "selected": _bytes(torch.where(some, torch.where(choice.kept[0], 255, 1), 0).to(torch.uint8)),
        **{
            name: [round(value, 4) for value in numbers.tolist()]
            for name, numbers in (
                ("density", choice.density), ("recall", choice.recall), ("best", choice.best), ("error", choice.error),
            )
        },
    }  # fmt: skip


def _shades(shares: Tensor, some: Tensor) -> Tensor:
    """0 out of reach, else 1 (``LEAST`` or less) to 255 (all of it), by the logarithm."""
    depth = 1 - shares.clamp(LEAST, 1).log() / math.log(LEAST)
    return torch.where(some, 1 + torch.round(254 * depth), 0).to(torch.uint8)


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode("ascii")
