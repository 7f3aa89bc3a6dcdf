"""What one step of a decoder computes, as a list of operations over named buffers.

A program is the same for one token and for a chunk of M of them: a buffer is ``[M, width]``, and only ``Rotate`` and
``Attend`` look at positions. Weights are not copied: operations hold the model's own modules and tensors, so whatever
happens to those happens to the program. ``decoding/build.py`` makes programs, ``decoding/interpreter.py`` is what every
other executor is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Embed:
    """``out = table[tokens] * scale``, the product rounded to the table's dtype; ``table`` [vocabulary, width]."""

    out: str
    table: nn.Embedding
    scale: float = 1.0


@dataclass(frozen=True)
class Norm:
    """``out = x / rms(x) * weight`` over the last of ``[heads, width / heads]``, in float32 within.

    ``centred``: the factor is ``1 + weight``, and the result is rounded to the activations' dtype after it, not before.
    """

    x: str
    out: str
    weight: Tensor
    eps: float
    centred: bool = False
    heads: int = 1


@dataclass(frozen=True)
class Project:
    """``out = x @ weight.T + bias`` by a dense or a compressed linear layer called ``name`` in the model."""

    x: str
    out: str
    linear: nn.Linear
    name: str


@dataclass(frozen=True)
class Rotate:
    """Rotary embedding of ``[heads, head_dim]`` in place.

    Channels ``i`` and ``i + head_dim / 2`` turn by ``position * inv_freq[i]``; cosine and sine are multiplied by
    ``scaling``. ``inv_freq`` float32 ``[head_dim / 2]``.
    """

    x: str
    heads: int
    inv_freq: Tensor
    scaling: float


@dataclass(frozen=True)
class Attend:
    """Store ``k`` and ``v`` in the cache of ``layer``, then ``out = softmax(cap(q @ k.T * scale)) @ v`` per head.

    Causal; ``window``: only the last so many positions, the token's own among them; ``softcap``: c * tanh(. / c).
    """

    q: str
    k: str
    v: str
    out: str
    layer: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Gate:
    """``out = activation(gate) * up``."""

    gate: str
    up: str
    out: str
    activation: Activation


@dataclass(frozen=True)
class Add:
    """``x += y``."""

    x: str
    y: str


@dataclass(frozen=True)
class Cap:
    """``x = cap * tanh(x / cap)`` in place."""

    x: str
    cap: float


Operation: TypeAlias = Embed | Norm | Project | Rotate | Attend | Gate | Add | Cap


@dataclass(frozen=True)
class Program:
    """``step`` turns tokens into the residual stream ``hidden``, ``head`` turns that into ``logits``.

    They are apart since only the last token of a prompt needs logits. ``buffers``: name -> width. The cache has
    ``layers`` layers of ``kv_heads`` heads of ``head_dim`` numbers; ``positions`` is how many tokens the model takes.
    """

    step: tuple[Operation, ...]
    head: tuple[Operation, ...]
    buffers: Mapping[str, int]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.step + self.head

    def projections(self) -> tuple[Project, ...]:
        """All linear layers in the order they run."""
        return tuple(operation for operation in self.operations if isinstance(operation, Project))
