// Where the bytes of codes come from: 16 rows x 32 columns at a time, as 8 quads of columns.
#pragma once
#include "params.h"

namespace RAREFY_NS {

constexpr int64_t far = 8192;  // bytes ahead of use that codes are called for, measured: a tenth faster than 2048

template <int N> struct Count { static constexpr int value = N; };

// Planes of 4, 2 and 1 bits, together BITS; byte 4 * row + column of quad q, for all q of a unit.
template <int BITS> static inline void unpack(const uint8_t *p, B w[8]) {
  if constexpr (BITS == 8) {
    for (int q = 0; q < 8; ++q) w[q] = load_b(p + 64 * q);
    return;
  }
  constexpr int four = BITS & 4, two = BITS & 2, one = BITS & 1;
  if constexpr (four != 0) {
    for (int i = 0; i < 4; ++i) {
      B both = load_b(p + 64 * i);
      w[2 * i] = field_b<0>(both, 15);
      w[2 * i + 1] = field_b<4>(both, 15);
    }
    p += 256;
  }
  if constexpr (two != 0) {
    for (int i = 0; i < 2; ++i) {
      B all = load_b(p + 64 * i);
      // Two bits that belong above four others are raised there, instead of down and up again.
      if constexpr (four != 0) {
        w[4 * i] = or_b(w[4 * i], field_b<0>(raise_b<4>(all), 48));
        w[4 * i + 1] = or_b(w[4 * i + 1], field_b<0>(raise_b<2>(all), 48));
        w[4 * i + 2] = or_b(w[4 * i + 2], field_b<0>(all, 48));
        w[4 * i + 3] = or_b(w[4 * i + 3], field_b<2>(all, 48));
      } else {
        w[4 * i] = field_b<0>(all, 3);
        w[4 * i + 1] = field_b<2>(all, 3);
        w[4 * i + 2] = field_b<4>(all, 3);
        w[4 * i + 3] = field_b<6>(all, 3);
      }
    }
    p += 128;
  }
  if constexpr (one != 0) {
    B all = load_b(p);
    auto add = [&](auto q) __attribute__((always_inline)) {
      constexpr int Q = decltype(q)::value, place = BITS - 1;  // of this bit in a code
      B bit;
      if constexpr (Q < place) bit = field_b<0>(raise_b<place - Q>(all), 1 << place);
      else bit = field_b<Q - place>(all, 1 << place);
      w[Q] = BITS == 1 ? bit : or_b(w[Q], bit);
    };
    add(Count<0>{}), add(Count<1>{}), add(Count<2>{}), add(Count<3>{});
    add(Count<4>{}), add(Count<5>{}), add(Count<6>{}), add(Count<7>{});
  }
}

// Codes of one bit where they lie within four bits, which saves moving each: quad q is 2^(q % 4) times the code.
static inline void unpack_raised(const uint8_t *p, B w[8]) {
  B all = load_b(p);
  for (int j = 0; j < 4; ++j) w[j] = field_b<0>(all, uint8_t(1 << j)), w[4 + j] = field_b<4>(all, uint8_t(1 << j));
}

template <int BITS> struct Codes {
  static constexpr bool wide = BITS == 8, masked = false;
  static constexpr int bits = BITS;
  const uint8_t *p;

  Codes(const rarefy_term &t, int64_t tile, int64_t)
      : p(static_cast<const uint8_t *>(t.codes.data) + tile * rarefy::units_of(t) * 64 * BITS) {}
  // Skip to a unit.
  void seek(int64_t unit) { p += unit * 64 * BITS; }
  void group(const rarefy_term &, int64_t, int64_t) {}
  template <bool RAISED = false> void next(B w[8]) {
    for (int line = 0; line < BITS; ++line) prefetch_far(p + far + 64 * line);
    if constexpr (RAISED) unpack_raised(p, w);
    else unpack<BITS>(p, w);
    p += 64 * BITS;
  }
};

// Codes at the set bits of a mask; the others read as the zero point of their group, which stands for 0.
template <int BITS> struct Kept {
  static constexpr bool wide = BITS == 8, masked = true;
  static constexpr int bits = BITS;
  const uint8_t *p;
  const uint64_t *mask;
  B zero;

  // `cursor`: bytes of this tile that earlier units took.
  Kept(const rarefy_term &t, int64_t tile, int64_t cursor)
      : p(static_cast<const uint8_t *>(t.codes.data) + static_cast<const int64_t *>(t.pointers.data)[tile] + cursor),
        mask(static_cast<const uint64_t *>(t.positions.data) + tile * rarefy::units_of(t) * 8),
        zero(set_b(uint8_t(t.zero))) {}
  void seek(int64_t unit) { mask += unit * 8; }
  void group(const rarefy_term &t, int64_t tile, int64_t group) {
    if (t.zero_type == RAREFY_U8)
      zero = spread_b(static_cast<const uint8_t *>(t.zero_point.data) + (tile * rarefy::groups_of(t) + group) * 16);
  }
  template <bool = false> void next(B w[8]) {
    for (int q = 0; q < 8; ++q) {
      uint64_t kept = *mask++;
      int64_t count = __builtin_popcountll(kept);
      if constexpr (BITS > 4) {
        w[q] = expand_b(p, kept, zero);
        p += count;
      } else {
        alignas(64) uint8_t bytes[64];
        store_b(bytes, nibbles_b(p));
        w[q] = expand_b(bytes, kept, zero);
        p += (count + 1) / 2;
      }
    }
    prefetch_far(p + far / 2), prefetch_far(p + far / 2 + 64), prefetch_far(mask + far / 16);
  }
};

}  // namespace RAREFY_NS
