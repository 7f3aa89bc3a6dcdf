"""Joined operations are those of the program, each once and in an order that computes the same."""

from __future__ import annotations

import pytest
import torch

from rarefy.core.errors import UnsupportedError
from rarefy.decoding.build import build
from rarefy.decoding.fuse import AddNorm, Attention, Fused, Projects, fuse
from rarefy.decoding.program import Add, Attend, Cap, Embed, Gate, Norm, Operation, Project, Rotate
from tests.decoding.models import DECODERS, build_model

LAYER = [Projects, Attention, Projects, AddNorm, Projects, Gate, Projects]


def taken_apart(operation: Fused) -> list[Operation]:
    match operation:
        case AddNorm(norm, add, branch):
            return [part for part in (branch, add, norm) if part is not None]
        case Projects(parts):
            return list(parts)
        case Attention(attend, q_rotate, k_rotate, q_norm, k_norm):
            return [part for part in (q_norm, q_rotate, k_norm, k_rotate, attend) if part is not None]
    return [operation]


@pytest.mark.parametrize("family", DECODERS)
def test_every_operation_is_there_once_and_in_order(family: str) -> None:
    program = build(build_model(family))
    apart = [part for operation in fuse(program.operations) for part in taken_apart(operation)]
    assert len(apart) == len(program.operations)
    assert all(ours is wanted for ours, wanted in zip(apart, program.operations, strict=True))


def test_a_layer_is_seven_operations() -> None:
    program = build(build_model("llama"))
    kinds = [type(operation) for operation in fuse(program.operations)]
    assert kinds == [Embed, AddNorm, *[*LAYER, AddNorm] * program.layers, Projects]
    sizes = [len(operation.parts) for operation in fuse(program.operations) if isinstance(operation, Projects)]
    assert sizes == [*[3, 1, 2, 1] * program.layers, 1]
    sandwich = build(build_model("gemma2"))
    kinds = [type(operation) for operation in fuse(sandwich.operations)]
    assert kinds == [Embed, AddNorm, *[*LAYER, AddNorm] * sandwich.layers, Projects, Cap]


def test_what_is_no_neighbour_stays_apart() -> None:
    program = build(build_model("llama"))
    one, two = (part for part in program.projections()[:2])
    other = Project("elsewhere", "k", two.linear, two.name)
    assert [len(each.parts) for each in fuse([one, other]) if isinstance(each, Projects)] == [1, 1]
    onto = Project("normed", "normed", one.linear, one.name)  # replaces what the next one reads
    assert [len(each.parts) for each in fuse([onto, two]) if isinstance(each, Projects)] == [1, 1]
    norm = Norm("hidden", "normed", torch.ones(4), 1e-6)
    assert fuse([Add("branch", "hidden"), norm]) == (Add("branch", "hidden"), AddNorm(norm))


def test_heads_that_are_not_attended_are_refused() -> None:
    turn = Rotate("q", 2, torch.ones(4), 1.0)
    attend = Attend("q", "k", "v", "mixed", 0, 1.0)
    for operations in ([turn], [attend], [turn, attend], [turn, turn, attend]):
        with pytest.raises(UnsupportedError, match="stands where the GPU's runner knows none"):
            fuse(operations)
