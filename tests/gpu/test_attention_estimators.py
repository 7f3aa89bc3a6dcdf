"""Estimators on a GPU, whose kernels look at 16-bit numbers, against the same estimators in torch on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.attention.call import Call
from rarefy.attention.estimators import Estimator, PooledMeans
from rarefy.attention.estimators.gated import Gated
from rarefy.attention.estimators.low_bit import LowBitProducts
from rarefy.attention.estimators.windowed import WindowMeans
from rarefy.attention.gate import BlockGate, Truth
from rarefy.attention.policy import Phase, Policy
from rarefy.attention.reach import Reach
from rarefy.attention.source import Plain
from rarefy.kv.rotary import Rotary
from rarefy.training.gates import lessons

pytestmark = pytest.mark.gpu
MAPS: dict[Phase, int] = {"prefill": 8, "decode": 2}
FREQUENCIES = 1e4 ** (-torch.arange(0, 128, 2) / 128)


def call_of(query: Tensor, key: Tensor, first: Tensor | None) -> Call:
    queries, keys = query.shape[2], key.shape[2]
    rotary = Rotary(FREQUENCIES.to(query.device))
    places = torch.arange(keys - queries, keys, device=query.device)[None]
    reach = Reach(queries, keys, keys - queries, first=first)
    turned: dict[str, Any] = {"angles": rotary.angles(places), "positions": places, "find_rotary": lambda: rotary}
    return Call(query, Plain(key, key), reach, 128**-0.5, **turned)


def gates(maps: int, device: str) -> Estimator:
    gate = BlockGate.new(8, maps, 128, ("max", "min", "mean"), False)
    queries = None if gate.queries is None else gate.queries.to(device)
    return Gated({"prefill": replace(gate, keys=gate.keys.to(device), queries=queries)})


@pytest.mark.parametrize(("queries", "keys", "padded"), [(1000, 1000, False), (512, 2048, False), (640, 640, True)])
@pytest.mark.parametrize(
    "name", ["means", "gate", "gate of a group", "windows", "coarse windows", "low bit", "sampled low bit"]
)
def test_scores_are_those_of_the_host(name: str, queries: int, keys: int, padded: bool) -> None:
    query, key = (torch.randn(2, n, h, 128).bfloat16().transpose(1, 2) for n, h in ((queries, 8), (keys, 2)))
    found = []
    for device in ("cuda", "cpu"):
        make = {
            "means": lambda: PooledMeans(0.0),
            "gate": lambda device=device: gates(8, device), "gate of a group": lambda device=device: gates(2, device),
            "windows": lambda: WindowMeans(32, 16), "coarse windows": lambda: WindowMeans(32, 16, (128, 64)),
            "low bit": lambda: LowBitProducts(sink=64), "sampled low bit": lambda: LowBitProducts(sink=64, every=4),
        }[name]  # fmt: skip
        wide = torch.bfloat16 if device == "cuda" else torch.float32
        first = torch.tensor([0, 77], device=device) if padded else None
        call = call_of(query.to(device, wide), key.to(device, wide), first)
        maps = 8 if name in ("gate", "means") or "low bit" in name else 2
        call = replace(call, mask_heads=maps)
        found.append(make().scores(call, call.reach.blocks(64, 64, torch.device(device))).cpu())
    ours, theirs = found
    real = torch.isfinite(ours) & torch.isfinite(theirs)
    assert torch.equal(ours.isneginf(), theirs.isneginf()) or "gate" in name
    assert float((ours - theirs)[real].abs().mean()) < 0.03 * float(theirs[real].std())


@pytest.mark.parametrize("truth", ["max", "mass"])
def test_lessons_are_those_of_the_host(truth: Truth) -> None:
    query, key = (torch.randn(1, 1000, h, 128).bfloat16().transpose(1, 2) for h in (8, 2))
    new = {phase: BlockGate.new(8, maps, 128, ("max", "min", "mean"), maps == 2) for phase, maps in MAPS.items()}
    found = []
    for device in ("cuda", "cpu"):
        wide = torch.bfloat16 if device == "cuda" else torch.float32
        call = call_of(query.to(device, wide), key.to(device, wide), None)
        learned = lessons(call, new, Policy(), 64, truth)
        gates = {
            phase: BlockGate.of({name: x.to(device) for name, x in gate.tensors("g").items()}, "g", gate.pools)
            for phase, gate in new.items()
        }
        found.append({phase: (own.wanted.cpu(), float(own.loss(gates[phase]))) for phase, own in learned.items()})
    for phase in MAPS:
        (ours, loss), (theirs, expected) = (each[phase] for each in found)
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
        assert loss == pytest.approx(expected, rel=3e-2)
