"""Small integers in machine words, exactly and both ways. Tensors only; no scales, no grids, no modules.

Layouts (all little-endian, all along the last dimension, "input dimension fastest"):

=============  =======================================  ====================================================
layout         stored tensor for ``[..., n]`` codes     one word holds
=============  =======================================  ====================================================
bit stream     int32 ``[..., ceil(n / 32), b]``         32 codes in ``b`` words: code ``j`` is bits
                                                        ``[j * b, (j + 1) * b)`` of that ``32 * b``-bit run
planes         int32 ``[b, ..., ceil(n / 32)]``         bit ``p`` of 32 codes; bit ``j`` is column ``j``
bitmap         int32 ``[..., ceil(n / 32)]``            32 flags (the one-plane case)
radix 3        uint8 ``[..., ceil(n / 5)]``             5 ternary codes, first code least significant
radix 5        int64 ``[..., ceil(n / 27)]``            27 five-level codes, first code least significant
uint16         uint8 ``[..., n, 2]``                    one number below 65536
=============  =======================================  ====================================================

Words are signed types that carry unsigned bit patterns, because every backend can move, gather and broadcast
int32, while unsigned words are second-class in torch. The unused end of the last word is zero.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from rarefy.core.errors import FormatError, UnsupportedError

WORD = 32
# radix -> (codes per word, word dtype); the largest word 5**27 - 1 still fits a signed 64-bit integer.
RADIX = {3: (5, torch.uint8), 5: (27, torch.int64)}

if sys.byteorder != "little":
    raise UnsupportedError("rarefy's packed words are little-endian; big-endian machines are not supported.")


def words(count: int) -> int:
    """Number of 32-code words that hold ``count`` codes."""
    return -(-count // WORD)


def radix_words(count: int, radix: int) -> int:
    """Number of words that hold ``count`` codes of a mixed-radix layout."""
    return -(-count // RADIX[radix][0])


def pack_bits(codes: Tensor, num_bits: int) -> Tensor:
    """Pack integer ``codes [..., n]`` in ``[0, 2**num_bits)`` into a bit stream, int32 ``[..., words, num_bits]``.

    Raises FormatError, as every ``pack_`` function does, when a code is out of range or not of an integer dtype.
    """
    _check_bits(num_bits)
    _check_range(codes, 1 << num_bits)
    lead, size = codes.shape[:-1], words(codes.shape[-1])
    if codes.numel() == 0:
        return codes.new_zeros(*lead, size, num_bits, dtype=torch.int32)
    octets = _pad_last(codes.to(torch.uint8), size * WORD).unflatten(-1, (-1, 8))
    if num_bits == 8:
        stream = octets
    else:
        # b bytes hold 8 codes for every b, so 64-bit arithmetic covers all widths without straddling cases.
        shifts = torch.arange(0, 8 * num_bits, num_bits, device=codes.device)
        run = (octets.to(torch.int64) << shifts).sum(-1, keepdim=True)
        stream = (run >> torch.arange(0, 8 * num_bits, 8, device=codes.device)) & 0xFF
    return stream.to(torch.uint8).reshape(*lead, size, 4 * num_bits).view(torch.int32)


def unpack_bits(stream: Tensor, num_bits: int, count: int) -> Tensor:
    """Inverse of ``pack_bits``: the first ``count`` codes, uint8 ``[..., count]``."""
    _check_bits(num_bits)
    if stream.numel() == 0:
        return stream.new_zeros(*stream.shape[:-2], count, dtype=torch.uint8)
    octets = stream.flatten(-2).contiguous().view(torch.uint8)
    if num_bits == 8:
        return octets[..., :count]
    mask = (1 << num_bits) - 1
    if 8 % num_bits == 0:
        digits = [(octets >> shift) & mask for shift in range(0, 8, num_bits)]
    else:
        # 8 codes fill num_bits bytes, and each lies within two neighbouring ones; bits beyond a byte fall away.
        parts = octets.unflatten(-1, (-1, num_bits)).unbind(-1)
        digits = []
        for index in range(8):
            byte, shift = divmod(index * num_bits, 8)
            code = parts[byte] >> shift
            if shift + num_bits > 8:
                code = code | (parts[byte + 1] << (8 - shift))
            digits.append(code & mask)
    return torch.stack(digits, -1).flatten(-2)[..., :count]


def pack_planes(codes: Tensor, num_bits: int) -> Tensor:
    """Pack ``codes [..., n]`` into bit planes, int32 ``[num_bits, ..., words]``; plane ``p`` holds bit ``p``."""
    _check_bits(num_bits)
    _check_range(codes, 1 << num_bits)
    return torch.stack([pack_bitmap((codes >> plane) & 1) for plane in range(num_bits)])


def unpack_planes(planes: Tensor, num_bits: int, count: int) -> Tensor:
    """Inverse of ``pack_planes``: uint8 ``[..., count]``."""
    codes = unpack_bitmap(planes[0], count).to(torch.uint8)
    for plane in range(1, num_bits):
        codes = codes | (unpack_bitmap(planes[plane], count).to(torch.uint8) << plane)
    return codes


def pack_bitmap(flags: Tensor) -> Tensor:
    """Pack ``flags [..., n]`` (bool or 0/1) into int32 ``[..., words]``; bit ``j`` of a word is its column ``j``."""
    return pack_bits(flags, 1).squeeze(-1)


def unpack_bitmap(bitmap: Tensor, count: int) -> Tensor:
    """Inverse of ``pack_bitmap``: bool ``[..., count]``."""
    return unpack_bits(bitmap.unsqueeze(-1), 1, count).bool()


def pack_radix(codes: Tensor, radix: int) -> Tensor:
    """Pack ``codes [..., n]`` with values in ``[0, radix)`` into mixed-radix words ``[..., radix_words]``."""
    _check_range(codes, radix)
    per_word, dtype = RADIX[radix]
    size = radix_words(codes.shape[-1], radix)
    parts = _pad_last(codes, size * per_word).to(torch.int64).unflatten(-1, (size, per_word))
    powers = torch.tensor([radix**index for index in range(per_word)], device=codes.device)
    return (parts * powers).sum(-1).to(dtype)


def unpack_radix(packed: Tensor, radix: int, count: int) -> Tensor:
    """Inverse of ``pack_radix``: uint8 ``[..., count]``."""
    per_word, dtype = RADIX[radix]
    if dtype == torch.uint8:  # few enough words for a table of their digits
        table = _digits(torch.arange(radix**per_word, device=packed.device), radix, per_word)
        return table[packed.to(torch.int32)].flatten(-2)[..., :count]
    return _digits(packed.to(torch.int64), radix, per_word).flatten(-2)[..., :count]


def _digits(numbers: Tensor, radix: int, count: int) -> Tensor:
    digits = []
    for _ in range(count):
        digits.append((numbers % radix).to(torch.uint8))
        numbers = torch.div(numbers, radix, rounding_mode="floor")
    return torch.stack(digits, -1)


def pack_uint16(numbers: Tensor) -> Tensor:
    """Store ``numbers [..., n]`` in ``[0, 65536)`` as their two bytes, uint8 ``[..., n, 2]``."""
    _check_range(numbers, 1 << 16)
    wide = numbers.to(torch.int32)
    return torch.stack([wide & 0xFF, wide >> 8], -1).to(torch.uint8)


def unpack_uint16(octets: Tensor) -> Tensor:
    """Inverse of ``pack_uint16``: int64 ``[..., n]``."""
    wide = octets.to(torch.int64)
    return wide[..., 0] | (wide[..., 1] << 8)


def pack_entries(values: Tensor, columns: Tensor) -> Tensor:
    """One int32 word per sparse entry ``[n]``: the 16-bit float of ``values`` above the column number, below 65536."""
    if values.dtype not in (torch.float16, torch.bfloat16):
        raise FormatError(f"Sparse entries are {values.dtype}, but a word holds a 16-bit float; convert them first.")
    _check_range(columns, 1 << 16)
    return (values.contiguous().view(torch.int16).to(torch.int32) << 16) | columns.to(torch.int32)


def unpack_entries(entries: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of ``pack_entries``: values of the 16-bit float ``dtype``, and int64 columns."""
    values = (entries >> 16).to(torch.int16).view(dtype)
    return values, (entries & 0xFFFF).to(torch.int64)


def _check_bits(num_bits: int) -> None:
    if not 1 <= num_bits <= 8:
        raise FormatError(f"num_bits is {num_bits}; bit streams hold 1 to 8 bits.")


def _check_range(codes: Tensor, limit: int) -> None:
    if codes.is_floating_point():
        raise FormatError(f"Codes are {codes.dtype}, but packed codes are whole numbers; round them to integers first.")
    if codes.numel() == 0 or codes.dtype == torch.bool:
        return
    low, high = torch.aminmax(codes)
    if int(low) < 0 or int(high) >= limit:
        raise FormatError(f"Codes span [{int(low)}, {int(high)}], but this layout holds 0 to {limit - 1}.")


def _pad_last(codes: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, size - codes.shape[-1])) if codes.shape[-1] != size else codes
