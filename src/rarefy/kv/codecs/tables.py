"""Leaves over tables that all blocks share: of single numbers, normalised in three ways, and of sub-vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy import packing
from rarefy.core.errors import FormatError
from rarefy.kv.codec import Codec, Payload
from rarefy.kv.codecs.sums import norm


class _Table(Codec):
    """Codes into ``lut`` float32 ``[2 ** b]``, ascending. ``decoded``: what codes stand for where that differs from the
    values they were chosen by."""

    def __init__(self, lut: Tensor, tokens: int, channels: int, decoded: Tensor | None = None):
        self.lut, self.tokens, self.channels = lut.float(), tokens, channels
        self.decoded = self.lut if decoded is None else decoded.float()
        self.has_own_values = decoded is not None
        self.num_bits = max(1, (len(lut) - 1).bit_length())

    def _nearest(self, normal: Tensor) -> Tensor:
        """The nearest codes, int64, of the shape of ``normal``."""
        lut = self.beside("lut", normal)
        return torch.searchsorted((lut[1:] + lut[:-1]) / 2, normal.contiguous())

    def _pack(self, codes: Tensor) -> Tensor:
        return packing.pack_bits(codes.to(torch.uint8).flatten(-2), self.num_bits)

    def _values(self, payload: Payload) -> Tensor:
        codes = packing.unpack_bits(payload["codes"], self.num_bits, self.tokens * self.channels)
        values = self.beside("decoded", codes)[codes.to(torch.int32)]
        return values.unflatten(-1, (self.tokens, self.channels))

    def shared(self) -> dict[str, Tensor]:
        return {"lut": self.lut, "decoded": self.decoded} if self.has_own_values else {"lut": self.lut}


class ChannelTable(_Table):
    """``x = center + scale * lut[code]`` with ``center`` and ``scale`` float32 ``[H, D]`` known beforehand."""

    def __init__(self, lut: Tensor, center: Tensor, scale: Tensor, tokens: int = 1, decoded: Tensor | None = None):
        super().__init__(lut, tokens, center.shape[-1], decoded)
        self.center, self.scale = center.float(), scale.float()

    def encode(self, x: Tensor) -> Payload:
        center, scale = self._affine(x)
        return {"codes": self._pack(self._nearest((x - center) / torch.where(scale == 0, 1.0, scale)))}

    def decode(self, payload: Payload) -> Tensor:
        values = self._values(payload)
        center, scale = self._affine(values)
        return values * scale + center

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.beside("center", x)[:, None, None], self.beside("scale", x)[:, None, None]

    def shared(self) -> dict[str, Tensor]:
        return {**super().shared(), "center": self.center, "scale": self.scale}


class RangeTable(_Table):
    """As `ChannelTable`, but each token's own minimum and maximum are mapped to -1 and 1; stored are ``scale`` and
    ``offset`` (the middle), float16 ``[tokens, 1]`` per block."""

    def encode(self, x: Tensor) -> Payload:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale, offset = _half((high - low) / 2), _half((high + low) / 2)
        wide = scale.float()
        codes = self._nearest((x - offset.float()) / torch.where(wide == 0, 1.0, wide))
        return {"codes": self._pack(codes), "scale": scale, "offset": offset}

    def decode(self, payload: Payload) -> Tensor:
        return self._values(payload) * payload["scale"].float() + payload["offset"].float()


class NormTable(_Table):
    """``x = scale * lut[code]``, where the codes are those of the vector brought to norm ``sqrt(channels)`` and the
    stored ``scale``, float16 ``[tokens, 1]`` per block, gives what is decoded the norm that ``x`` had."""

    def encode(self, x: Tensor) -> Payload:
        size = norm(x)
        codes = self._nearest(x * (self.channels**0.5 / size.clamp(min=torch.finfo(torch.float32).tiny)))
        return {"codes": self._pack(codes), "scale": _half(size / norm(self.beside("lut", x)[codes]))}

    def decode(self, payload: Payload) -> Tensor:
        return self._values(payload) * payload["scale"].float()


class ProductTable(Codec):
    """Sub-vectors from codebooks float ``[H, M, K, D / M]``: one code for each of M parts of a head's vector, of the
    entry with the least squared error, in which a channel's counts ``weight`` float32 ``[H, D]`` (None: all the same).

    Scores come from a table of the query's products with every centroid, read once for each key (ADC, Jegou et al.
    2011), as long as the table is smaller than the keys it stands for.
    """

    def __init__(self, codebook: Tensor, tokens: int = 1, weight: Tensor | None = None):
        self.codebook, self.tokens, self.weight = codebook, tokens, weight
        self.heads, self.parts, self.count, self.width = codebook.shape
        self.num_bits = max(1, (self.count - 1).bit_length())
        if self.num_bits > 8:
            raise FormatError(f"A codebook has {self.count} entries, but codes have at most 8 bits; use 256 or fewer.")

    def encode(self, x: Tensor) -> Payload:
        parts = x.unflatten(-1, (self.parts, self.width))
        weighed, half = self.nearness(x)
        codes = torch.stack(
            [
                _products(parts[..., m, :], weighed[:, None, m]).sub_(half[:, None, None, m]).argmax(-1)
                for m in range(self.parts)
            ], -1
        )  # fmt: skip
        return {"codes": packing.pack_bits(codes.to(torch.uint8).flatten(-2), self.num_bits)}

    def nearness(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of entries, beside ``x``: float32 ``[H, M, K, width]``, whose product with a part, less float32
        ``[H, M, K]``, is largest for the entry that it gets."""
        codebook = self.beside("codebook", x).float()
        weighed = codebook
        if self.weight is not None:
            weighed = codebook * self.beside("weight", x).unflatten(-1, (self.parts, 1, self.width))
        return weighed, (codebook * weighed).sum(-1) / 2

    def decode(self, payload: Payload) -> Tensor:
        codes = self._codes(payload)
        codebook = self.beside("codebook", codes).float()
        head = torch.arange(self.heads, device=codes.device)[:, None, None, None]
        return codebook[head, torch.arange(self.parts, device=codes.device), codes].flatten(-2)

    def score(self, query: Tensor, payload: Payload) -> Tensor:
        codes = self._codes(payload).flatten(2, 3)  # [B, H, n, M]
        if codes.shape[2] < self.count:
            return super().score(query, payload)
        parts = query.float().unflatten(-1, (self.parts, self.width))
        table = torch.einsum("bhrmw,hmkw->bhrmk", parts, self.beside("codebook", query).float())
        index = codes.transpose(-1, -2).unsqueeze(2).expand(-1, -1, query.shape[2], -1, -1)
        return table.gather(-1, index).sum(-2)

    def shared(self) -> dict[str, Tensor]:
        return {"codebook": self.codebook} | ({} if self.weight is None else {"weight": self.weight})

    def _codes(self, payload: Payload) -> Tensor:
        """int64 ``[B, H, N, G, M]``."""
        codes = packing.unpack_bits(payload["codes"], self.num_bits, self.tokens * self.parts)
        return codes.to(torch.int64).unflatten(-1, (self.tokens, self.parts))


def _half(numbers: Tensor) -> Tensor:
    """float16, at most its largest number, so that an extreme token is coarse and not infinite."""
    limit = torch.finfo(torch.float16).max
    return numbers.clamp(-limit, limit).to(torch.float16)


def _products(x: Tensor, entries: Tensor) -> Tensor:
    """``x [B, H, N, G, width]`` times all ``entries [H, 1, K, width]`` of a head; of few channels in an order that
    every device can keep."""
    if entries.shape[-1] > 2:
        return x @ entries.mT
    terms = [x[..., n, None] * entries[..., None, :, n] for n in range(entries.shape[-1])]
    return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
