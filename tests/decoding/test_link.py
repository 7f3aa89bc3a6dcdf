"""Linked operations are those of the program, each once and in an order that computes the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rarefy.decoding.build import build
from rarefy.decoding.fuse import AddNorm, Attention, Fused, Projects, fuse
from rarefy.decoding.link import After, Linked, Step, link
from rarefy.decoding.program import Add, Embed, Gate, Norm, Project
from tests.decoding.models import DECODERS, build_model


def everything(product: Projects, after: After) -> bool:
    return True


def taken_apart(step: Step) -> list[Fused]:
    if not isinstance(step, Linked):
        return [step]
    return [step.product, *([] if step.after is None else [step.after])]


@pytest.mark.parametrize("family", DECODERS)
def test_every_operation_is_there_once_and_in_order(family: str) -> None:
    fused = fuse(build(build_model(family)).operations)
    for takes in (everything, lambda product, after: not isinstance(after, Gate)):
        apart = [part for step in link(fused, takes) for part in taken_apart(step)]
        assert all(ours is wanted for ours, wanted in zip(apart, fused, strict=True))
    assert link(fused, lambda product, after: False) == fused


def test_a_layer_is_five_steps() -> None:
    program = build(build_model("llama"))
    steps = link(fuse(program.operations), everything)
    layer = [Linked, Attention, Linked, Linked, Linked]
    assert [type(step) for step in steps] == [
        Embed, AddNorm, Projects, *layer[1:], *layer * (program.layers - 1), Linked
    ]  # fmt: skip
    for before, step in pairwise(steps):
        after = before.after if isinstance(before, Linked) else None
        assert getattr(step, "normed", None) is (after.norm if isinstance(after, AddNorm) else None)


def test_a_norm_that_is_read_twice_or_elsewhere_stays() -> None:
    program = build(build_model("llama"))
    one, two, three = program.projections()[:3]
    first, add = Project("mixed", "branch", one.linear, "first"), Add("hidden", "branch")
    norm = Norm("hidden", "normed", torch.ones(4), 1e-6)
    second, third = Project("normed", "q", two.linear, "second"), Project("normed", "k", three.linear, "third")
    between = Gate("q", "q", "v", "silu")
    for operations, count in (
        ([first, add, norm, second], 2),
        ([first, add, norm, second, between, third], 0),  # read once more
        ([first, add, norm, second, between, add, norm, third], 2),  # written before that
        ([Project("mixed", "other", one.linear, "first"), add, norm, second], 0),  # another is added
    ):
        steps = link(fuse(operations), everything)
        assert sum(isinstance(step, Linked) for step in steps) == count


def test_halves_of_other_sizes_are_not_gated() -> None:
    narrow, wide = torch.nn.Linear(8, 16), torch.nn.Linear(8, 32)
    gate = Gate("gate", "up", "out", "silu")
    for pair, gated in (((narrow, narrow), True), ((narrow, wide), False), ((torch.nn.Linear(8, 8),) * 2, False)):
        parts = [Project("x", name, linear, name) for name, linear in zip(("gate", "up"), pair, strict=True)]
        assert isinstance(link(fuse([*parts, gate]), everything)[0], Linked) == gated
