"""What was measured of executors: which is the fastest where, and up to which density it beats dense attention.

The table beside this file is written by ``benchmarks/attention_table.py`` from committed results, never by hand.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from rarefy.attention.policy import Phase
from rarefy.core.config import StrictModel, parse
from rarefy.core.errors import CheckpointError

TABLE = Path(__file__).with_name("measured.json")


class Measured(StrictModel):
    """For passes of ``phase`` on ``device`` over at least ``tokens`` keys (of all rows of the batch together in
    decoding): ``executors`` from the fastest on, each with the density above which dense attention is faster than a
    plan by pooled means; and ``estimators`` by their labels, with the part of those densities that is lost by what they
    take beyond pooled means. ``source``: the results that say so."""

    device: str
    phase: Phase
    tokens: int
    executors: dict[str, float]
    estimators: dict[str, float] = {}
    source: str = ""


DEFAULT = Measured(
    device="",
    phase="prefill",
    tokens=0,
    executors={"fa4": 0.8, "triton": 0.5, "native": 1.0, "cpu": 0.6, "reference": 0.6},
)


def device_key(device: torch.device) -> str:
    """``cpu``, or ``cuda`` with the first number of its compute capability."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_capability(device)[0]}"


def measured(device: torch.device, phase: Phase, tokens: int) -> Measured:
    """What is known of such passes; `DEFAULT` where nothing is."""
    return _best(device_key(device), phase, tokens.bit_length())


@functools.lru_cache(maxsize=256)
def _best(device: str, phase: Phase, bits: int) -> Measured:
    fitting = [each for each in _entries() if (each.device, each.phase) == (device, phase)]
    below = [each for each in fitting if each.tokens.bit_length() <= bits]
    if below:
        return max(below, key=lambda each: each.tokens)
    # Shorter than anything measured, where there is less to gain.
    return min(fitting, key=lambda each: each.tokens, default=DEFAULT)


@functools.cache
def _entries() -> tuple[Measured, ...]:
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text("utf-8"))
    return tuple(parse(Measured, row, f"'{TABLE.name}'", CheckpointError, stored=True) for row in rows)
