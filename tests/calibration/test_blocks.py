"""Blocks are put on a device and taken off again, read when they are wanted or ahead of that."""

from __future__ import annotations

import torch
from torch import nn

from rarefy.calibration.blocks import Resident
from rarefy.calibration.weights import ModelWeights


def test_a_block_that_was_read_ahead_is_the_same() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 5)])})
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights, reads = ModelWeights(model), list[str]()
    read = weights.read
    weights.read = lambda name: (reads.append(name), read(name))[1]  # type: ignore[method-assign, func-returns-value]
    resident = Resident(model, weights, torch.device("cpu"), torch.float32)
    resident.read_ahead("blocks.1")
    with resident.block("blocks.0"):
        resident.read_ahead("blocks.1")
        assert sorted(resident.held) == ["blocks.0.bias", "blocks.0.weight"]
    reads.clear()
    with resident.block("blocks.1") as block:
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, stored[f"blocks.1.{name}"])
    assert not [name for name in reads if name.startswith("blocks.0")] and not resident.held
    assert torch.equal(model.state_dict()["blocks.1.weight"], stored["blocks.1.weight"])
