"""Attention of a token, run by this processor, against Torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.decoding.cache import Kept, coded
from rarefy.kernels.cuda import attend_token
from rarefy.kernels.cuda.attend_token import Attention, fits
from tests.kernels.cuda import emulation

pytest.importorskip("triton")
from rarefy.kernels.triton.step import CENTRED, PLAIN, Gain, Heads

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no C++ compiler")

CAPACITY = 400


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "launch", lambda self, *given: emulation.attend_token(*given[:3]))


def normed(x: Tensor, gain: Gain | None) -> Tensor:
    if gain is None:
        return x
    x = x / (x.square().mean(-1, keepdim=True) + gain.eps).sqrt()
    return x * (gain.weight.double() + (gain.kind == CENTRED))


def turned(x: Tensor, turn: Tensor) -> Tensor:
    (low, high), (cos, sin) = x.chunk(2, -1), turn
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def check(
    dtype: torch.dtype, heads: int, group: int, channels: int, lengths: list[int], float8: bool = False, **options: Any
) -> None:
    angles = torch.arange(CAPACITY)[:, None] * 0.9 ** torch.arange(channels // 2)
    turns = torch.stack([angles.cos(), angles.sin()], 1).to(dtype)
    layer = Heads(heads * group, heads, channels, 1.5 * channels**-0.5, turns, **options)
    sequences = len(lengths)
    attention = Attention(sequences, heads * group, heads, channels, torch.device("cpu"))
    keys, values = torch.randn(2, sequences, heads, CAPACITY, channels).to(dtype)
    steps = None
    if float8:
        (keys, key_steps), (values, value_steps) = coded(keys), coded(values)
        steps = torch.stack([key_steps, value_steps])
    before = keys.clone(), values.clone()
    wide = torch.randn(sequences, (group + 2) * heads * channels + 8).to(dtype)[:, :-8]  # rows that lie apart
    q, k, v = wide.split([heads * group * channels, heads * channels, heads * channels], 1)
    positions = torch.tensor(lengths, dtype=torch.int32)
    for _ in range(2):  # which leaves the workspace as it was
        out = attention(q, k, v, keys, values, positions, layer, steps)
    precision = 2e-3 if dtype == torch.float16 else 1.2e-2
    for number, length in enumerate(lengths):
        turn = layer.turns[length].double()
        query = turned(normed(q[number].view(heads, group, channels).double(), layer.q_gain), turn)
        key, value = turned(normed(k[number].view(heads, channels).double(), layer.k_gain), turn), v[number]
        kept = Kept(keys[number], values[number], None if steps is None else steps[:, number])
        seen = [each.double() for each in kept.load(length + 1, torch.float32)]
        torch.testing.assert_close(seen[0][:, -1], key, rtol=2 * precision + float8 / 16, atol=precision)
        if float8:
            codes, step = coded(value.view(heads, channels))
            assert torch.equal(values[number, :, length].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(steps[1, number, :, length], step)
        else:
            assert torch.equal(values[number, :, length], value.view(heads, channels))
        others = torch.arange(CAPACITY) != length
        for now, then in zip((keys, values), before, strict=True):
            assert torch.equal(now[number, :, others].view(torch.uint8), then[number, :, others].view(torch.uint8))
        first = 0 if layer.window is None else max(0, length - layer.window + 1)
        scores = query @ seen[0][:, first:].mT * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        wanted = scores.softmax(-1) @ seen[1][:, first:]
        error = (out[number].double() - wanted.flatten()).norm() / wanted.norm()
        assert error < precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[0, 1], [15, 16], [17, 395]])
def test_what_is_cached(dtype: torch.dtype, lengths: list[int]) -> None:
    check(dtype, 2, 4, 64, lengths)


@pytest.mark.parametrize("splits", [2, 5])
def test_blocks_share_tokens(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_token, "LEAST", 1)
    monkeypatch.setattr(attend_token, "FILL", 4 * splits)
    check(torch.bfloat16, 2, 2, 64, [397, 33])


@pytest.mark.parametrize(("group", "channels"), [(1, 128), (8, 128), (3, 64)])
def test_heads_of_other_sizes(group: int, channels: int) -> None:
    check(torch.bfloat16, 1, group, channels, [150])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "channels", "lengths"), [(4, 64, [0, 1, 16]), (2, 128, [35, 394])])
def test_what_is_cached_in_eight_bits(dtype: torch.dtype, group: int, channels: int, lengths: list[int]) -> None:
    check(dtype, 2, group, channels, lengths, float8=True)


def test_eight_bits_in_shared_blocks_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    check(torch.float16, 1, 2, 64, [69, 300], float8=True, window=70, softcap=3.0)
    monkeypatch.setattr(attend_token, "LEAST", 1)
    monkeypatch.setattr(attend_token, "FILL", 20)
    check(torch.bfloat16, 2, 2, 64, [397, 33], float8=True)


def test_many_blocks_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_token, "MANY", 1)
    check(torch.bfloat16, 2, 4, 128, [130])


def test_norms_of_heads_windows_and_caps() -> None:
    q_gain, k_gain = (Gain(torch.rand(64).half() + 0.5, 1e-6, kind) for kind in (PLAIN, CENTRED))
    check(torch.float16, 2, 2, 64, [50, 300], q_gain=q_gain, k_gain=k_gain)
    check(torch.float16, 1, 2, 64, [50, 300], softcap=3.0)
    check(torch.float16, 1, 2, 64, [0, 69, 70, 300], window=70)
    check(torch.float16, 1, 2, 64, [300], window=1)


def test_which_heads_fit() -> None:
    assert fits(torch.bfloat16, 32, 8, 128)
    for given in ((torch.float32, 32, 8, 128), (torch.float16, 9, 3, 80), (torch.float16, 32, 2, 128)):
        assert not fits(*given)
