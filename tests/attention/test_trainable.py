"""Attention over blocks with a backward pass: the reference's result, and gradients that finite differences confirm."""

from __future__ import annotations

import pytest
import torch

from rarefy.attention.block_map import BlockMap
from rarefy.attention.executors import Reference, Trainable, choose
from rarefy.attention.executors.trainable import trainable_attention
from rarefy.attention.reach import Reach
from rarefy.attention.source import Plain
from rarefy.core.errors import UnsupportedError
from tests.attention.maps import REACHES, oracle, tensors, token_mask


def random_map(reach: Reach, maps: int, block_q: int, block_k: int) -> BlockMap:
    blocks = reach.blocks(block_q, block_k)
    return BlockMap.from_mask(torch.rand(2, maps, blocks.rows, blocks.columns) < 0.4, reach, blocks)


@pytest.mark.parametrize("name", REACHES)
@pytest.mark.parametrize("maps", [1, 2, 4])
def test_the_result_is_that_of_the_reference(name: str, maps: int) -> None:
    reach = REACHES[name]()
    query, key, value = tensors(reach)
    chosen = random_map(reach, maps, 16, 8)
    found, lse = trainable_attention(query, key, value, chosen, 0.3)
    expected, expected_lse = Reference().run(query, Plain(key, value), chosen, 0.3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize(("maps", "block_q", "queries", "keys"), [(2, 4, 13, 13), (4, 1, 5, 13), (1, 8, 12, 20)])
def test_gradients_are_right_in_double_precision(maps: int, block_q: int, queries: int, keys: int) -> None:
    reach = Reach(queries, keys, keys - queries, first=torch.tensor([0, 3]))
    chosen = random_map(reach, maps, block_q, 4)
    given = [tensor.double().requires_grad_() for tensor in tensors(reach, channels=3)]
    assert torch.autograd.gradcheck(lambda q, k, v: trainable_attention(q, k, v, chosen, 0.5)[0], given)


def test_gradients_are_those_of_masked_softmax_and_reach_chosen_blocks_only() -> None:
    reach = Reach.last(64, 64)
    blocks = reach.blocks(16, 16)
    keep = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    keep[..., 0] = keep[:, :, range(4), range(4)] = True
    keep[:, :, :, 2] = False  # nobody reads block 2, not even its own queries, which still see block 0
    chosen = BlockMap.from_mask(keep, reach, blocks)
    query, key, value = (tensor.requires_grad_() for tensor in tensors(reach))
    weight = torch.randn(2, 4, 64, 8)
    (trainable_attention(query, key, value, chosen, 0.3)[0] * weight).sum().backward()
    grads = [tensor.grad.clone() for tensor in (query, key, value) if tensor.grad is not None]
    assert len(grads) == 3
    tokens = chosen.per_head(4).dense().repeat_interleave(16, 2).repeat_interleave(16, 3) & token_mask(reach, 2, 4)
    twins = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    (oracle(*twins, tokens, 0.3)[0] * weight).sum().backward()
    for grad, twin in zip(grads, twins, strict=True):
        assert twin.grad is not None and torch.allclose(grad, twin.grad.float(), atol=1e-4)
    assert float(grads[1][:, :, 32:48].abs().max()) == 0.0 and float(grads[2][:, :, 32:48].abs().max()) == 0.0


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.attention.executors import trainable

    reach = Reach.last(70, 70)
    query, key, value = (tensor.requires_grad_() for tensor in tensors(reach))
    chosen = random_map(reach, 4, 16, 8)
    results = []
    for limit in (1 << 23, 1):
        monkeypatch.setattr(trainable, "GATHERED_AT_ONCE", limit)
        for tensor in (query, key, value):
            tensor.grad = None
        output, _ = trainable_attention(query, key, value, chosen, 0.3)
        output.square().sum().backward()
        results.append([output, query.grad, key.grad, value.grad])
    for whole, pieces in zip(*results, strict=True):
        assert torch.allclose(whole, pieces, atol=1e-5)


def test_it_is_taken_where_gradients_are_wanted_and_says_what_it_cannot() -> None:
    reach = Reach.last(32, 32)
    query, key, value = tensors(reach)
    chosen, source = random_map(reach, 4, 16, 8), Plain(key, value)
    assert choose("auto", query.requires_grad_(), source, chosen).name == "trainable"
    assert choose("auto", query.detach(), source, chosen).name != "trainable"
    with pytest.raises(UnsupportedError, match="softcap"):
        Trainable().run(query, source, chosen, 0.3, softcap=5.0)
    mask = torch.ones(2, 4, 32, 32, dtype=torch.bool)
    by_head = random_map(Reach(32, 32, 0, mask=mask), 4, 16, 8)
    with pytest.raises(UnsupportedError, match="differs between heads"):
        Trainable().run(query, source, by_head, 0.3)
