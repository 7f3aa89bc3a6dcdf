"""A Llama's step as torch.compile likes it best, for a peer: fused projections, a static cache, all of it in one CUDA
graph. What is compiled is a layer, once; every layer then runs the same kernels. ``quantize`` turns its linear layers
into torchao's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    width: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    eps: float = 1e-5

    @property
    def channels(self) -> int:
        return self.width // self.heads

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        return cls(
            config["hidden_size"], config["intermediate_size"], config["num_attention_heads"],
            config["num_key_value_heads"], config["num_hidden_layers"], config["vocab_size"],
        )  # fmt: skip


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def _layer(shape: Shape, x: Tensor, weights: dict[str, Tensor], at: dict[str, Tensor]) -> Tensor:
    """``x [batch, width]`` after one layer."""
    batch, (heads, kv, channels) = len(x), (shape.heads, shape.kv_heads, shape.channels)
    qkv = F.linear(F.rms_norm(x, (shape.width,), weights["first"], shape.eps), weights["qkv"])
    q, k, v = qkv.split([heads * channels, kv * channels, kv * channels], -1)
    q, k, v = (part.view(batch, -1, 1, channels) for part in (q, k, v))
    q, k = _turned(q, at["cos"], at["sin"]), _turned(k, at["cos"], at["sin"])
    weights["keys"].index_copy_(2, at["position"], k)
    weights["values"].index_copy_(2, at["position"], v)
    keys, values = (weights[name].repeat_interleave(heads // kv, 1) for name in ("keys", "values"))
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=at["seen"])
    x = x + F.linear(mixed.reshape(batch, -1), weights["out"])
    gate, up = F.linear(F.rms_norm(x, (shape.width,), weights["second"], shape.eps), weights["gate_up"]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, weights["down"])


def _head(shape: Shape, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, (shape.width,), norm, shape.eps), weight).argmax(-1)


def decoder(
    shape: Shape, batch: int, positions: int, quantize: Callable[[nn.Module], None] | None, spread: float = 0.02
) -> Callable[[int, int], None]:
    """What writes so many tokens after so many others, greedy, with random weights, replaying a graph for each."""
    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def weight(rows: int, columns: int) -> Tensor:
        linear = nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)
        nn.init.normal_(linear.weight, 0, spread)
        if quantize is not None:
            quantize(nn.Sequential(linear))
        return linear.weight.detach()

    wide, kept = shape.heads * shape.channels, shape.kv_heads * shape.channels
    layers = [
        {
            "qkv": weight(wide + 2 * kept, shape.width), "out": weight(shape.width, wide),
            "gate_up": weight(2 * shape.inner, shape.width), "down": weight(shape.width, shape.inner),
            **{name: torch.ones(shape.width, device=device, dtype=dtype) for name in ("first", "second")},
            **{
                name: torch.zeros(batch, shape.kv_heads, positions, shape.channels, device=device, dtype=dtype)
                for name in ("keys", "values")
            },
        }
        for _ in range(shape.layers)
    ]  # fmt: skip
    head, norm = weight(shape.vocabulary, shape.width), torch.ones(shape.width, device=device, dtype=dtype)
    table = torch.randn(shape.vocabulary, shape.width, device=device, dtype=dtype) * spread
    angles = torch.arange(positions, device=device)[:, None] / 500000.0 ** (
        torch.arange(0, shape.channels, 2, device=device) / shape.channels
    )
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    causal = torch.ones(positions, positions, dtype=torch.bool, device=device).tril()
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    layer, ending = (torch.compile(each, fullgraph=True, dynamic=False) for each in (_layer, _head))

    @torch.inference_mode()
    def step() -> None:
        x = table[tokens]
        at = {"position": position, "cos": cos[position], "sin": sin[position], "seen": causal[position]}
        for weights in layers:
            x = layer(shape, x, weights, at)
        tokens.copy_(ending(shape, x, norm, head))
        position.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def write(count: int, after: int) -> None:
        position.fill_(after)
        for _ in range(count):
            graph.replay()

    write.step = step  # type: ignore[attr-defined]  # whose tensors the graph reads and writes
    return write


def int4(module: nn.Module) -> None:
    """torchao's 4-bit weights in groups of 128, as its tinygemm path packs them."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(module, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
