"""What every codec does with keys or values, and what can be done with any payload.

A codec sees *blocks* ``x [B, H, N, G, D]``: batch, KV heads, blocks, tokens of a block, channels. What it stores of
them is a ``Payload``: tensors by dotted name that all begin with ``[B, H or 1, N]``, so that moving a cache to another
batch order, device or length needs to know nothing about codecs. What blocks share (tables, codebooks) is the codec's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.formats.bytes import ByteCount

Payload = dict[str, Tensor]

# The last part of a tensor's name says what its bytes are for.
PURPOSES = {
    "codes": "codes", "scale": "scales", "zero_point": "scales", "offset": "scales", "indices": "indices",
    "values": "values", "lowrank_a": "values", "lowrank_b": "values", "exact": "exact",
}  # fmt: skip


class Codec(ABC):
    """Codes of keys or values. ``tokens`` is the number of tokens G that are encoded together, once and for all.

    ``encode`` must treat every block and every row of the batch on its own, so that neither how tokens arrive nor their
    neighbours change what is stored.
    """

    tokens: int = 1

    @abstractmethod
    def encode(self, x: Tensor) -> Payload:
        """Codes of ``x`` float32 ``[B, H, N, G, D]``."""

    @abstractmethod
    def decode(self, payload: Payload) -> Tensor:
        """What codes stand for, float32 ``[B, H, N, G, D]``."""

    def score(self, query: Tensor, payload: Payload) -> Tensor:
        """``query [B, H, R, D]`` times coded keys, float32 ``[B, H, R, N * G]``: neither scaled nor masked."""
        return torch.matmul(query.float(), self.decode(payload).flatten(2, 3).transpose(-1, -2))

    def mix(self, weights: Tensor, payload: Payload) -> Tensor:
        """``weights [B, H, R, N * G]`` times coded values, float32 ``[B, H, R, D]``."""
        return torch.matmul(weights.float(), self.decode(payload).flatten(2, 3))

    def shared(self) -> dict[str, Tensor]:
        """Tensors that all blocks read, by name."""
        return {}

    def beside(self, name: str, x: Tensor) -> Tensor:
        """The codec's own tensor ``name`` on the device of ``x``, where it then stays."""
        tensor: Tensor = getattr(self, name)
        if tensor.device != x.device:
            tensor = tensor.to(x.device)
            setattr(self, name, tensor)
        return tensor


def nbytes(payload: Payload) -> ByteCount:
    """Bytes of a payload's tensors by what they say. Raises FormatError for a tensor of unknown purpose."""
    sizes: dict[str, int] = {}
    for name, tensor in payload.items():
        purpose = PURPOSES.get(name.rpartition(".")[2])
        if purpose is None:
            raise FormatError(f"What the bytes of tensor '{name}' are for is not known; one of {', '.join(PURPOSES)}.")
        sizes[purpose] = sizes.get(purpose, 0) + tensor.numel() * tensor.element_size()
    return ByteCount(**sizes)


def apply(function: Callable[[Tensor], Tensor], payload: Payload) -> Payload:
    """``function`` of every tensor."""
    return {name: function(tensor) for name, tensor in payload.items()}


def join(payloads: list[Payload]) -> Payload:
    """Blocks of several payloads in a row."""
    first = payloads[0]
    return first if len(payloads) == 1 else {name: torch.cat([part[name] for part in payloads], 2) for name in first}


def cut(payload: Payload, first: int, last: int | None = None) -> Payload:
    """Blocks ``[first, last)`` (None: to the end) of a payload, where they lie."""
    return apply(lambda tensor: tensor[:, :, first:last], payload)


def blocks_of(payload: Payload) -> int:
    """Number of blocks of a payload."""
    return next(iter(payload.values())).shape[2]


def prefixed(prefix: str, payload: Mapping[str, Tensor]) -> Payload:
    """A part's tensors under the part's name."""
    return {f"{prefix}.{name}": tensor for name, tensor in payload.items()}


def part_of(payload: Payload, prefix: str) -> Payload:
    """Inverse of `prefixed`: the tensors of one part."""
    lead = prefix + "."
    return {name.removeprefix(lead): tensor for name, tensor in payload.items() if name.startswith(lead)}
