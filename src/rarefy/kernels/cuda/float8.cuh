// Numbers of E4M3 as pairs of 16 bits. Needs HALF and machine.cuh (or the emulator's).

// Bytes 2 `pair` and 2 `pair` + 1 of a word. Shifted, a byte is the number times a power of two, also where it is
// subnormal.
device u32 numbers_of_float8(u32 word, int pair) {
  constexpr u32 GROWN = HALF ? 0x5C005C00u : 0x7B807B80u;  // 2^8 and 2^120, by which exponents differ
  const u32 high = permuted(word, 0, pair ? 0x3424 : 0x1404);
  return fused(chosen(high >> (HALF ? 1 : 4), HALF ? 0x3F803F80u : 0x07F007F0u, high & 0x80008000u), GROWN, 0x80008000u);
}
