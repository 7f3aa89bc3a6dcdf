// How codes become the left operands of tensor-core products: bits taken out of words where they were loaded.

constexpr int words_of(int bits, int codes) { return bits == 3 && codes == 16 ? 2 : bits * codes / 32; }
constexpr int shift_of(int bits, int n) { return n * bits % 8; }
constexpr int distance_of(int bits) { return bits == 3 ? 8 : 16 / bits; }  // between codes that one word gives at once
constexpr int first_of(int bits, int pair) {
  return pair / distance_of(bits) * 2 * distance_of(bits) + pair % distance_of(bits);
}
constexpr u32 mask_of(int bits, int n) { return ((1u << bits) - 1) << shift_of(bits, n) | ((1u << bits) - 1) << (16 + shift_of(bits, n)); }

// Bytes before 16 codes, in whole words.
device int bytes_of_16(int bits, int number) { return bits == 3 ? number * 3 / 2 * 4 : 2 * bits * number; }
// 16 codes. Of 3 bits, words are the first and the last 32 of 48 bits.
template <int BITS> device void load_16(u32* words, const u8* from) {
  if constexpr (BITS == 8) {
    const uint4 all = load_once(reinterpret_cast<const uint4*>(from));
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  } else if constexpr (BITS == 4) {
    const uint2 all = load_once(reinterpret_cast<const uint2*>(from));
    words[0] = all.x, words[1] = all.y;
  } else if constexpr (BITS == 2) {
    words[0] = load_once(reinterpret_cast<const u32*>(from));
  } else {
    const u32* at = reinterpret_cast<const u32*>(from);
    words[0] = load_near(at), words[1] = load_near(at + 1);
  }
}
// Loaded words as the rest reads them.
template <int BITS> device void settle_16(u32* words, int number) {
  if constexpr (BITS == 3) {
    const u32 middle = funnel(words[0], words[1], 16);
    const bool odd = number & 1;
    const u32 first = odd ? middle : words[0], last = odd ? words[1] : middle;
    words[0] = first, words[1] = last;
  }
}
// 32 codes.
template <int BITS> device void load_32(u32* words, const u8* from) {
  if constexpr (BITS == 8) {
    load_16<8>(words, from), load_16<8>(words + 4, from + 16);
  } else if constexpr (BITS == 4) {
    load_16<8>(words, from);
  } else if constexpr (BITS == 2) {
    load_16<4>(words, from);
  } else {
#pragma unroll
    for (int n = 0; n < 3; ++n) words[n] = load_near(reinterpret_cast<const u32*>(from) + n);
  }
}

// Code `n` of two pieces of 16, among the bits of others, where it is in the halves of a word.
template <int BITS> device u32 in_place(const u32* a, const u32* b, int n) {
  const int bit = n * BITS, word = BITS == 3 ? bit >= 24 : bit / 32, at = BITS == 3 ? bit - 16 * word : bit % 32;
  const u32 low = at / 8, high = low < 3 ? low + 1 : 3;
  return permuted(a[word], b[word], low | high << 4 | (4 + low) << 8 | (4 + high) << 12);
}
// Without the others: times 2^(shift - 24) as float16.
template <int BITS> device u32 both(const u32* a, const u32* b, int n) { return in_place<BITS>(a, b, n) & mask_of(BITS, n); }
// Codes `first_of(pair)` and `distance_of` further on of one piece of 32.
template <int BITS> device u32 apart(const u32* words, int pair) {
  const int n = first_of(BITS, pair), bit = n * BITS, word = BITS == 3 ? (n < 16 ? 0 : 1) : bit / 32;
  const u32 one = (bit - 32 * word) / 8, two = one + distance_of(BITS) * BITS / 8, top = BITS == 3 ? 7 : 3;
  const u32 bytes = one | (one < top ? one + 1 : top) << 4 | two << 8 | (two < top ? two + 1 : top) << 12;
  return permuted(words[word], BITS == 3 ? words[word + 1] : words[word], bytes) & mask_of(BITS, n);
}
// The word that a table has for the two codes at `bit`.
template <int BITS> device u32 looked_up(const u8* table, const u32* words, int bit, u32 own) {
  constexpr u32 MASK = ((1u << 2 * BITS) - 1) << 8;
  const int word = bit / 32, at = bit % 32;
  u32 row;
  if (BITS == 4) row = permuted(words[word], own, 0x5504u | at / 8 << 4);
  else if (at + 2 * BITS > 32) row = chosen(funnel(words[word], words[word + 1], at) << 8, MASK, own);
  else row = chosen(at >= 8 ? words[word] >> (at - 8) : words[word] << (8 - at), MASK, own);
  return *reinterpret_cast<const u32*>(table + row);
}
// A codebook of two channels of each of 64 parts of a vector: all entries of a part lie in one bank, and two parts share
// one. A lane has two sets of so many neighbouring parts, and in each they are in neighbouring banks.
constexpr int K_PARTS = 8, V_PARTS = 4;
template <int PARTS> device int place_of_part(int part) {
  return part / PARTS % 2 * 32 + part / (2 * PARTS) * PARTS + part % PARTS;
}
// Entries of the parts of one set, which bytes of `words` name: first that of part `turn`, which differs among lanes that
// have the same parts, then of part `turn ^ 1`, and so on; then in order. `bank`: that of the first, times four.
template <int PARTS> device void look_up(u32* to, const u8* table, const u32* words, int set, u32 turn, u32 bank) {
  constexpr int WORDS = PARTS / 4;
  const u32 *own = words + WORDS * set, order = 0x3210u ^ 0x1111u * turn;
  u32 codes[WORDS];
#pragma unroll
  for (int n = 0; n < WORDS; ++n) codes[n] = permuted(own[0], own[WORDS - 1], order ^ 0x4444u * n);
#pragma unroll
  for (int n = 0; n < PARTS; ++n) {
    const u32 at = permuted(codes[n / 4], bank ^ 4 * n, 0x5504u | n % 4 << 4);  // 256 * code + the bank
    to[n] = *reinterpret_cast<const u32*>(table + 128 * set + at);
  }
#pragma unroll
  for (int bit = 1; bit < PARTS; bit *= 2)
#pragma unroll
    for (int n = 0; n < PARTS; ++n)
      if ((n & bit) == 0) {
        const u32 first = to[n], second = to[n + bit];
        to[n] = turn & bit ? second : first, to[n + bit] = turn & bit ? first : second;
      }
}
constexpr u32 evens_of(int bits, int word) {
  u32 mask = 0;
  for (int bit = 0; bit < 32; ++bit) mask |= u32((32 * word + bit) % (2 * bits) < bits) << bit;
  return mask;
}
// Codes of two pieces of 16 side by side: even ones, then odd ones.
template <int BITS> device void interleaved(u32* even, u32* odd, const u32* a, const u32* b) {
  constexpr int WORDS = words_of(BITS, 16);
  constexpr u32 FIRST = evens_of(BITS, 0), SECOND = evens_of(BITS, 1);
#pragma unroll
  for (int n = 0; n < WORDS; ++n) {
    const u32 mask = n == 0 ? FIRST : SECOND;
    const u32 under = n == 0 ? b[n] << BITS : funnel(b[n - 1], b[n], 32 - BITS);
    const u32 over = n + 1 < WORDS ? funnel(a[n], a[n + 1], BITS) : a[n] >> BITS;
    even[n] = (a[n] & mask) | (under & ~mask);
    odd[n] = (over & mask) | (b[n] & ~mask);
  }
}
// Codes of 3 bits as one stream.
template <int BITS> device void stream_16(u32* words) {
  if constexpr (BITS == 3) words[1] >>= 16;
}
// Steps as `stepped` takes them: 1024 of one are at most the largest float16, above that they stay as they are.
device u32 small_steps(u32 steps) { return lesser(fused(steps, 0x2C002C00u, 0), 0x53E053E0u); }
// Likewise, times their steps.
template <int BITS> device u32 stepped(const u32* a, const u32* b, int n, u32 steps) {
  const u32 shift = shift_of(BITS, n), magic = (25 - shift) << 10;  // a number whose last bit is 2^-shift
  const u32 above = chosen(in_place<BITS>(a, b, n), mask_of(BITS, n), magic * 0x10001u);
  return fused(above, steps, fused(steps, (0x8000u | magic) * 0x10001u, 0));
}
