"""The kernels of a step against Torch, interpreted where no GPU is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from rarefy.kernels.triton import step
from rarefy.kernels.triton.pick import Picker

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, GROUP, CHANNELS = 2, 3, 24


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """``x [..., channels]`` by cosines and sines ``[..., 2, channels / 2]``."""
    (low, high), (cos, sin) = x.chunk(2, -1), turns.unbind(-2)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@pytest.fixture
def layer() -> step.Heads:
    angles = torch.arange(300)[:, None] * 0.7 ** torch.arange(CHANNELS // 2)
    turns = torch.stack([angles.cos(), angles.sin()], 1).to(DEVICE)
    return step.Heads(HEADS * GROUP, HEADS, CHANNELS, CHANNELS**-0.5, turns)


@pytest.mark.parametrize("lengths", [[0, 1], [64, 65], [200, 3]])
@pytest.mark.parametrize(("splits", "least"), [(1, 1), (4, 1), (4, 2)])
def test_attention_over_what_is_cached(
    layer: step.Heads, lengths: list[int], splits: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "LEAST", least)
    attention = step.Attention(2, HEADS * GROUP, HEADS, CHANNELS, DEVICE)
    attention.splits = splits
    keys, values = random(2, HEADS, 300, CHANNELS), random(2, HEADS, 300, CHANNELS)
    before = keys.clone(), values.clone()
    q, k, v = random(2, 2 * HEADS * GROUP * CHANNELS + 5)[:, : (GROUP + 2) * HEADS * CHANNELS].split(
        [HEADS * GROUP * CHANNELS, HEADS * CHANNELS, HEADS * CHANNELS], 1
    )  # rows that lie apart
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # which leaves the workspace as it was
        out = attention(q, k, v, keys, values, positions, layer)
    for number, length in enumerate(lengths):
        turn = layer.turns[length]
        query = turned(q[number].view(HEADS, GROUP, CHANNELS), turn).double()
        own_key, own_value = turned(k[number].view(HEADS, CHANNELS), turn), v[number].view(HEADS, CHANNELS)
        assert torch.allclose(keys[number, :, length], own_key, atol=1e-6)
        assert torch.equal(values[number, :, length], own_value)
        others = torch.arange(300, device=DEVICE) != length
        assert torch.equal(keys[number, :, others], before[0][number, :, others])
        scores = query @ keys[number, :, : length + 1].double().mT * layer.scale
        wanted = scores.softmax(-1) @ values[number, :, : length + 1].double()
        assert torch.allclose(out[number].double(), wanted.flatten(), atol=1e-6)


def test_a_chunk_is_placed(layer: step.Heads) -> None:
    keys, values = random(HEADS, 300, CHANNELS), random(HEADS, 300, CHANNELS)
    q, k, v = random(5, HEADS * GROUP * CHANNELS), random(5, HEADS * CHANNELS), random(5, HEADS * CHANNELS)
    out = step.place(q, k, v, keys, values, 7, layer)
    turn = layer.turns[7:12, None]
    assert torch.allclose(out, turned(q.view(5, -1, CHANNELS), turn).flatten(1), atol=1e-6)
    assert torch.allclose(keys[:, 7:12], turned(k.view(5, -1, CHANNELS), turn).transpose(0, 1), atol=1e-6)
    assert torch.equal(values[:, 7:12], v.view(5, -1, CHANNELS).transpose(0, 1))


def test_the_token_of_the_largest_logit_the_first_of_equal_ones() -> None:
    vocabulary = 9000
    logits = random(3, vocabulary)
    logits[1, [17, 8999]] = 9.0
    logits[2] = -torch.inf
    logits[2, 4242] = -1.0
    pick = Picker(3, vocabulary, 8, DEVICE)
    tokens = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    positions = torch.tensor([0, 6, 7], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        pick(logits, tokens, positions, draw=False, top_k=False, top_p=False)
        assert tokens.tolist() == [int(logits[0].argmax()), 17, 4242]
    assert positions.tolist() == [2, 8, 9]
    written = pick.written.tolist()
    assert written[0][1:3] == [int(tokens[0])] * 2 and written[1][7] == written[1][0] == 17
    assert written[2][0] == written[2][1] == 4242 and written[2][2] == 0


def allowed(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What Transformers' warpers leave, ``[vocabulary]``."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(torch.empty(0), logits[None].cpu().float())
    if top_k:
        scores = TopKLogitsWarper(top_k)(torch.empty(0), scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(torch.empty(0), scores)
    return scores[0]


def ordered(x: Tensor) -> Tensor:
    """Whole numbers in the order of floats, as the kernel makes them."""
    bits = x.cpu().float().view(torch.int32).long()
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits | 0x80000000)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 5, 1.0), (1.5, 0, 0.6), (0.8, 6, 0.5), (1.0, 1, 1.0), (1.0, 40, 1.0), (2.0, 99, 0.99)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_from_what_the_warpers_leave(
    temperature: float, top_k: int, top_p: float, dtype: torch.dtype
) -> None:
    vocabulary = 40
    logits = random(2, vocabulary, dtype=dtype) * 2
    pick = Picker(2, vocabulary, 4, DEVICE)
    pick.settings.copy_(torch.tensor([1 / temperature, top_k, top_p]))
    tokens = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    positions = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for some in ((True, True), (top_k > 0, top_p < 1)):  # whatever the workspace was used for before
        pick(logits, tokens, positions, draw=True, top_k=some[0], top_p=some[1])
    least = torch.maximum(*(kept.long() % (1 << 32) for kept in (pick._least, pick._bottom)))
    for row, own, token in zip(logits, least.cpu(), tokens.tolist(), strict=True):
        wanted = allowed(row, temperature, top_k, top_p).isfinite()
        assert torch.equal(ordered(row) >= own, wanted) and bool(wanted[token])


def test_draws_have_the_shares_of_the_softmax() -> None:
    draws, logits = 500, torch.tensor([1.0, -1.0, 0.5, 2.0], device=DEVICE)
    pick = Picker(draws, 4, 4, DEVICE)
    pick.settings.fill_(0.8)
    tokens = torch.zeros(draws, dtype=torch.int64, device=DEVICE)
    positions = torch.zeros(draws, dtype=torch.int32, device=DEVICE)
    pick(logits.expand(draws, -1).contiguous(), tokens, positions, draw=True, top_k=False, top_p=False)
    shares = tokens.bincount(minlength=4) / draws
    # Five standard deviations of a share of 500 draws are below 0.112.
    assert float((shares - (logits * 0.8).softmax(-1)).abs().max()) < 0.112
