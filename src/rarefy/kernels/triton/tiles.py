"""How a Triton program gets numbers out of coded keys and values.

Codes are bit streams of ``packing.pack_bits``, read in *chunks* of a few codes. The codes at one *slot* of all chunks
of a tile are one operand of a tensor-core product, so that no code ever changes its lane: a chunk stays where it was
loaded, and its slots are taken out of it one after another. A uniform code becomes the float16 ``1 + code / 2 ** bits``
by two bit operations for two codes.
"""

# Tuples in Triton know addition only, and may grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """A pointer to memory that torch allocated, hence aligned."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def load_chunks(address, base, inner, phase, shifts, BITS: tl.constexpr, PER: tl.constexpr):
    """Chunks ``base + inner`` of a stream, each of ``PER`` codes in the low bits of an integer. ``phase``: the number
    of a chunk among the four that fill three words, where codes have 3 bits."""
    WIDTH: tl.constexpr = BITS * PER
    if WIDTH == 32:
        return tl.load(pointer(address, tl.int32) + base + inner)
    elif WIDTH == 16:
        return tl.load(pointer(address, tl.int16) + base + inner)
    elif WIDTH == 8:
        return tl.load(pointer(address, tl.int8) + base + inner).to(tl.int32)
    else:
        words = pointer(address, tl.int32) + base // 4 * 3
        # Shifts are loaded, since numbers that a program computes would not move to where products want them.
        shift = tl.load(shifts + phase)
        low = tl.load(words + inner * 3 // 4).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        high = tl.load(words + (inner * 3 + 2) // 4) << 1
        return low.to(tl.int32, bitcast=True) | (high << (31 - shift))


@triton.jit
def load_entries(address, base, inner, part, codebook, word, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels ``2 * word`` and the next of the entries that codes ``base + inner`` of ``part`` name, as int32."""
    if BITS == 8:
        codes = tl.load(pointer(address, tl.uint8) + base + inner).to(tl.int32)
    else:
        words = pointer(address, tl.int32) + base * BITS // 32  # base is a multiple of 32
        bit = inner * BITS
        shift = bit % 32
        low = tl.load(words + bit // 32).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        high = tl.load(words + (bit + BITS - 1) // 32) << 1
        codes = (low.to(tl.int32, bitcast=True) | (high << (31 - shift))) & ((1 << BITS) - 1)
    return tl.load(codebook + ((part << BITS) + codes) * (WIDTH // 2) + word)


@triton.constexpr_function
def _two_halves(slot: int, bits: int, width: int) -> str:
    """Instructions that make two float16 ``1 + code / 2 ** bits`` of the codes at ``slot`` of two chunks."""
    up, place = 10 - bits, slot * bits
    mask = ((1 << bits) - 1) << up
    if width == 16:
        words = "mov.b32 t, $1;"
    else:
        words = f"prmt.b32 t, $1, $2, {0x5410 if place + bits <= 16 else 0x7632};"
        place %= 16
    move = f"shr.b32 t, t, {place - up};" if place > up else f"shl.b32 t, t, {up - place};"
    return f"{{ .reg .b32 t; {words} {move} lop3.b32 $0, t, {mask << 16 | mask}, {0x3C003C00}, 0xea; }}"


@triton.jit
def halves(chunks, SLOT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """float16 ``1 + code / 2 ** BITS`` of the codes at ``SLOT``; ``PAIRS``: two at once, with instructions of a GPU."""
    STRADDLES: tl.constexpr = WIDTH != 16 and (SLOT * BITS) // 16 != ((SLOT + 1) * BITS - 1) // 16
    if PAIRS and not STRADDLES:
        if WIDTH == 16:
            return tl.inline_asm_elementwise(
                _two_halves(SLOT, BITS, WIDTH), "=r,r", [chunks], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _two_halves(SLOT, BITS, WIDTH), "=r,r,r", [chunks], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        up = _codes(chunks, SLOT, BITS) << (10 - BITS)
        return (up | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _two_entries(slot: int, bits: int, width: int) -> str:
    """Instructions that look up the codes at ``slot`` of two chunks in a table of up to 16 float16, which lies in eight
    words: four of lower and four of upper bytes. Three bits of a code choose one of eight bytes, the fourth between two
    such choices."""
    place, table = slot * bits, 2 if width == 16 else 3
    if width == 16:
        both = f"shr.b32 a, $1, {place}; shr.b32 b, $1, {place + 16};"
    else:
        both = f"shr.b32 a, $1, {place}; shr.b32 b, $2, {place};"
    word = [f"${table + 2 * number}" for number in range(8)]
    both += f" and.b32 a, a, {(1 << bits) - 1}; and.b32 b, b, {(1 << bits) - 1}; shl.b32 b, b, 4; or.b32 a, a, b;"
    if bits < 4:
        chosen = f"prmt.b32 l, {word[0]}, {word[1]}, a; prmt.b32 h, {word[4]}, {word[5]}, a;"
    else:
        chosen = (
            f"and.b32 b, a, {0x77}; and.b32 m, a, {0x88}; shr.b32 m, m, 1; prmt.b32 m, 0, {0xFFFFFFFF}, m;"
            f" prmt.b32 l, {word[0]}, {word[1]}, b; prmt.b32 c, {word[2]}, {word[3]}, b; lop3.b32 l, m, c, l, 0xca;"
            f" prmt.b32 h, {word[4]}, {word[5]}, b; prmt.b32 c, {word[6]}, {word[7]}, b; lop3.b32 h, m, c, h, 0xca;"
        )
    return f"{{ .reg .b32 a, b, c, h, l, m; {both} {chosen} prmt.b32 $0, l, h, {0x5140}; }}"


@triton.constexpr_function
def _registers(count: int) -> str:
    return "=r" + ",r" * count


@triton.jit
def load_table(lut, KIND: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr):
    """What `numbers` looks codes up in: eight words in registers, or where the table is."""
    if KIND == 3 and PAIRS and BITS <= 4:
        one = tl.zeros((1, 1), tl.int32)
        words = ()
        for number in tl.static_range(8):
            words = words + (tl.load(lut + number + one),)
        return words
    else:
        return lut


@triton.jit
def _codes(chunks, SLOT: tl.constexpr, BITS: tl.constexpr):
    return (chunks.to(tl.int32) >> (SLOT * BITS)) & ((1 << BITS) - 1)


@triton.jit
def numbers(chunks, lut, SLOT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
            PAIRS: tl.constexpr):  # fmt: skip
    """float16 of the codes at ``SLOT``, without their scales; ``lut`` as `load_table` gave it."""
    if KIND == 0:
        return chunks
    elif KIND == 3 and PAIRS and BITS <= 4:
        return tl.inline_asm_elementwise(
            _two_entries(SLOT, BITS, BITS * PER), _registers(17 if BITS * PER == 16 else 18),
            [chunks, lut[0], lut[1], lut[2], lut[3], lut[4], lut[5], lut[6], lut[7]],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif KIND == 3:
        return tl.load(lut + _codes(chunks, SLOT, BITS)).to(tl.float16)
    elif KIND == 4:
        return (chunks[SLOT // 2] >> (SLOT % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return halves(chunks, SLOT, BITS, BITS * PER, PAIRS)
