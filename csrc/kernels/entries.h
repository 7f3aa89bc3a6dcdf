// ENTRIES: single values that correct what another term says, in slices of 16 lanes.
#pragma once
#include "sources.h"

namespace RAREFY_NS {

static inline F entry_values(const rarefy_term &t, I entries) {
  return t.scale_type == RAREFY_F16 ? upper_half(entries) : upper_bfloat(entries);
}

// The slices of one tile, of columns [base, base + 65536).
struct Slices {
  const int32_t *first = nullptr;
  int64_t count = 0;
  const uint16_t *own = nullptr;   // entries of its own row that each lane begins with
  const uint8_t *other = nullptr;  // the row of those that follow

  Slices() {}
  Slices(const rarefy_term &t, int64_t tile, int64_t base) {
    int64_t place = base / 65536 * rarefy::tiles_of(t) + tile;
    const int32_t *starts = static_cast<const int32_t *>(t.pointers.data) + place;
    const uint8_t *lanes = static_cast<const uint8_t *>(t.positions.data) + place * 48;
    first = static_cast<const int32_t *>(t.codes.data) + 16 * int64_t(starts[0]);
    count = starts[1] - starts[0];
    own = reinterpret_cast<const uint16_t *>(lanes), other = lanes + 32;
    prefetch(lanes + 96);
  }
};

// Products of M tokens with a tile's slices, a few at a time: done between the blocks of another term they cost little,
// for that one waits for memory. Without a term there is nothing to do.
template <int M> struct Corrections {
  const rarefy_term *t;
  Slices slices;
  int64_t at = 0, each;
  const float *x;
  int64_t stride;
  I limit;
  F own[M], other[M];

  // `pauses`: how often `some` will be called.
  Corrections(const rarefy_term *term, const rarefy_input &in, int64_t tile, int64_t first, int64_t base, int64_t pauses)
      : t(term), each(0), x(in.x + first * in.stride + base), stride(in.stride), limit(zero_i()) {
    if (!t) return;
    slices = Slices(*t, tile, base), each = rarefy::ceil_div(slices.count, pauses);
    limit = load_words(reinterpret_cast<const uint8_t *>(slices.own));
    for (int m = 0; m < M; ++m) own[m] = other[m] = zero_f();
  }
  inline __attribute__((always_inline)) void one() {
    const int32_t *entries = slices.first + 16 * at;
    prefetch(entries + 16 * slices.count);  // the next tile's
    F all = entry_values(*t, load_i(entries)), mine = below_f(all, limit, int32_t(at)), rest = sub_f(all, mine);
    for (int m = 0; m < M; ++m) {
      F v = pick_f(x + m * stride, entries);
      own[m] = fma_f(mine, v, own[m]), other[m] = fma_f(rest, v, other[m]);
    }
    ++at;
  }
  inline __attribute__((always_inline)) void some() {
    for (int64_t i = 0; i < each && at < slices.count; ++i) one();
  }
  void finish(float (*acc)[16]) {
    if (!t) return;
    while (at < slices.count) one();
    for (int m = 0; m < M; ++m) {
      alignas(64) float sums[16];
      store_f(sums, other[m]);
      store_f(acc[m], add_f(load_f(acc[m]), own[m]));
      for (int lane = 0; lane < 16; ++lane) acc[m][slices.other[lane]] += sums[lane];
    }
  }
};

template <int M>
static void entries_few(const rarefy_term &t, const rarefy_input &in, int64_t tile, int64_t first, float (*acc)[16]) {
  for (int64_t base = 0; base < t.columns; base += 65536)
    Corrections<M>(&t, in, tile, first, base, 1).finish(acc);
}

// For decoding only, where finding them costs little.
static inline void entries_panel(const rarefy_term &t, int64_t tile, int64_t k0, float *panel, bool add) {
  if (!add) __builtin_memset(panel, 0, rarefy::panel_columns * 16 * sizeof(float));
  Slices slices(t, tile, k0);
  for (int64_t s = 0; s < slices.count; ++s) {
    alignas(64) float values[16];
    const int32_t *entries = slices.first + 16 * s;
    store_f(values, entry_values(t, load_i(entries)));
    for (int lane = 0; lane < 16; ++lane) {
      int64_t column = (entries[lane] & 0xffff) - (k0 & 65535);
      int row = s < slices.own[lane] ? lane : slices.other[lane];
      if (column >= 0 && column < rarefy::panel_columns) panel[column * 16 + row] += values[lane];
    }
  }
}

}  // namespace RAREFY_NS
