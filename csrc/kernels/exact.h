// Products with 32-bit activations. A panel is 128 columns of a tile decoded to floats, [128, 16], the same numbers as
// the reference decodes; few tokens skip it and multiply codes as floats, with scale and zero point once a block.
#pragma once
#include "fast.h"

namespace RAREFY_NS {

using rarefy::panel_columns;

// How far the panels of a tile, asked for from left to right, have read into lists without fixed places.
struct Cursor {
  int64_t at[16];
};

static inline F one_value(const rarefy_term &t, const Params &p, F code, F entry) {
  if (t.scale_layout == RAREFY_PAIRS) {
    return add_f(mul_f(code, p.scale), mul_f(sub_f(set_f(1.f), code), p.zero));
  }
  if (t.table.bytes == 0) return mul_f(sub_f(code, p.zero), p.scale);
  if (t.scale_layout == RAREFY_SIGNED) return mul_f(entry, negative_f(entry, p.negative, p.scale));
  return mul_f(entry, p.scale);
}

// What codes of more than four bits stand for. A small float (sign, exponent, mantissa) is a 16-bit one whose bits lie
// lower and whose exponent is counted from elsewhere; entries of other tables are fetched one by one.
struct Wide {
  const float *table = nullptr;
  int32_t sign = 0;  // the code's highest bit; 0: no small float
  I top, shift, up;
  F factor;

  Wide() {}
  explicit Wide(const rarefy_term &t) : table(static_cast<const float *>(t.table.data)) {
    if (t.bits <= 4 || t.table.bytes == 0) return;
    int32_t half = 1 << (t.bits - 1), largest = half - 1;
    while (largest > 1 && table[largest - 1] == table[half - 1]) --largest;  // codes that a format has for no number
    for (int32_t lift = 7; lift <= 8; ++lift) {  // four or five bits of exponent, or two before three of mantissa
      float scale = table[1] / rarefy_scalar::half_to_float(uint16_t(1 << lift));
      bool same = true;
      for (int32_t code = 0; same && code < half; ++code) {
        int32_t own = code < largest ? code : largest;
        float value = rarefy_scalar::half_to_float(uint16_t(own << lift)) * scale;
        same = table[code] == value && table[half + code] == -value;
      }
      if (!same) continue;
      sign = half, top = set_i(largest), shift = set_i(lift), up = set_i(16 - t.bits), factor = set_f(scale);
      return;
    }
  }
  template <int J> F at(B w) const {
    if (sign == 0) return one_by_one(w, J);
    I code = and_i(shr_i<8 * J>(as_lanes(w)), 255);
    I magnitude = raise_i(min_i(and_i(code, sign - 1), top), shift);
    return mul_f(lower_half(or_i(magnitude, raise_i(and_i(code, sign), up))), factor);
  }
  __attribute__((noinline)) F one_by_one(B w, int j) const {
    alignas(64) uint8_t codes[64];
    alignas(64) float entries[16];
    store_b(codes, w);
    for (int r = 0; r < 16; ++r) entries[r] = table[codes[4 * r + j]];
    return load_f(entries);
  }
};

static inline void put(float *panel, F value, bool add) { store_f(panel, add ? add_f(load_f(panel), value) : value); }

template <class Source>
static void codes_panel(const rarefy_term &t, const Wide &wide, int64_t tile, int64_t k0, float *panel, bool add,
                        Cursor &cursor) {
  Source source(t, tile, cursor.at[0]);
  source.seek(k0 / 32);
  const uint8_t *start = source.p;
  constexpr bool small = Source::bits <= 4;
  bool tabled = t.table.bytes != 0;
  float own[16] = {};
  if (tabled && small) __builtin_memcpy(own, t.table.data, sizeof(float) << t.bits);
  Table table = table_f(own);
  int64_t units = rarefy::units_of(t) - k0 / 32 < 4 ? rarefy::units_of(t) - k0 / 32 : 4, border = k0;
  Scales scales(t, tile);
  Params p{};
  for (int64_t u = 0; u < units; ++u) {
    B w[8];
    if (Source::masked) source.group(t, tile, (k0 + 32 * u) / t.group_size);
    source.next(w);
    for (int q = 0; q < 8; ++q) {
      int64_t column = k0 + 32 * u + 4 * q;
      if (column >= border && column < t.columns) {
        int64_t group = column / t.group_size;
        p = scales(group);
        border = (group + 1) * t.group_size;
      }
      float *to = panel + (32 * u + 4 * q) * 16;
      auto each = [&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        F code = byte_f<J>(w[q]), entry = code;
        if (tabled) entry = small ? lookup_f(table, shr_i<8 * J>(as_lanes(w[q]))) : wide.template at<J>(w[q]);
        put(to + 16 * J, one_value(t, p, code, entry), add);
      };
      each(Count<0>{}), each(Count<1>{}), each(Count<2>{}), each(Count<3>{});
    }
  }
  cursor.at[0] += source.p - start;
  if (!add) __builtin_memset(panel + units * 512, 0, size_t(4 - units) * 512 * sizeof(float));
}

static inline void codes_panel(const rarefy_term &t, const Wide &wide, int64_t tile, int64_t k0, float *panel,
                               bool add, Cursor &cursor) {
#define PANEL(n) case n: return codes_panel<Codes<n>>(t, wide, tile, k0, panel, add, cursor)
  if (t.kind == RAREFY_KEPT) {
    if (t.bits > 4) return codes_panel<Kept<8>>(t, wide, tile, k0, panel, add, cursor);
    return codes_panel<Kept<4>>(t, wide, tile, k0, panel, add, cursor);
  }
  switch (t.bits) { PANEL(1); PANEL(2); PANEL(3); PANEL(4); PANEL(5); PANEL(6); PANEL(7); PANEL(8); default: return; }
#undef PANEL
}

// PARTS 0: codes as floats; 1: entries of a table; 2: its positive and negative entries apart. HALF as in fast_few.
template <class Source, int PARTS, int M, bool HALF>
static void exact_few(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Wide &wide,
                      const rarefy_term *beside, int64_t tile, int64_t first, float (*acc)[16]) {
  constexpr int dots = PARTS ? PARTS : 1, chains = M * dots >= 4 ? 1 : 4 / (M * dots);
  int64_t units = rarefy::units_of(t);
  Walk walk(rarefy::blocks_per_group(t, blocks.size));
  Scales scales(t, tile);
  float tables[2][16] = {};
  // Where a lookup costs less than the conversion of an integer, codes are looked up too.
  constexpr bool small = Source::bits <= 4, by_table = small && (PARTS > 0 || cheap_lookup);
  for (int i = 0; !PARTS && i < 16; ++i) tables[0][i] = float(i);
  for (int i = 0; PARTS && small && i < 1 << t.bits; ++i) {
    float entry = static_cast<const float *>(t.table.data)[i];
    tables[PARTS == 2 && entry < 0][i] = entry;
  }
  Table first_table = table_f(tables[0]), second_table = table_f(tables[1]);
  const float *x[M], *x_sum[M];
  F y[M], sums[M][dots][chains], zero = zero_f();
  for (int m = 0; m < M; ++m) {
    x[m] = in.x + (first + m) * in.stride;
    x_sum[m] = blocks.sum + (first + m) * blocks.count;
    y[m] = load_f(acc[m]);
    for (int i = 0; i < dots; ++i)
      for (int c = 0; c < chains; ++c) sums[m][i][c] = zero_f();
  }
  bool pairs = t.scale_layout == RAREFY_PAIRS;
  Corrections<M> corrections(beside, in, tile, first, 0, blocks.count);
  auto flush = [&](int64_t block) __attribute__((always_inline)) {
    Params p = scales(walk.group);
    F factor[2] = {pairs ? sub_f(p.scale, p.zero) : p.scale, p.negative};
    for (int m = 0; m < M; ++m) {
      F sum = set_f(x_sum[m][block]);
      for (int i = 0; i < dots; ++i) {
        F total = sums[m][i][0];
        for (int c = 1; c < chains; ++c) total = add_f(total, sums[m][i][c]);
        for (int c = 0; c < chains; ++c) sums[m][i][c] = zero_f();
        if (!PARTS && !Source::masked && !pairs) total = sub_f(total, mul_f(p.zero, sum));
        y[m] = fma_f(factor[i], total, y[m]);
      }
      if (pairs) y[m] = fma_f(p.zero, sum, y[m]);
    }
    corrections.some();
  };
  auto step = [&](B w, int64_t quad) __attribute__((always_inline)) {
    auto each = [&](auto j) __attribute__((always_inline)) {
      constexpr int J = decltype(j)::value;
      auto use = [&](int part, F v) __attribute__((always_inline)) {
        for (int m = 0; m < M; ++m)
          sums[m][part][J % chains] = fma_f(v, set_f(x[m][4 * quad + J]), sums[m][part][J % chains]);
      };
      if constexpr (PARTS > 0 && !small) {
        F v = wide.template at<J>(w), positive = max_f(v, zero_f());
        use(0, dots == 2 ? positive : v);
        if (dots == 2) use(1, sub_f(v, positive));
        return;
      }
      I code = shr_i<8 * J>(as_lanes(w));
      F v = by_table ? lookup_f(first_table, code) : byte_f<J>(w);
      if (Source::masked && !PARTS) v = sub_f(v, zero);  // what is not kept is exactly zero
      use(0, v);
      if (dots == 2) use(1, lookup_f(second_table, code));
    };
    each(Count<0>{}), each(Count<1>{}), each(Count<2>{}), each(Count<3>{});
  };
  Source source(t, tile, 0);
  auto enter = [&] {
    source.group(t, tile, walk.group);
    if constexpr (Source::masked) zero = byte_f<0>(source.zero);
  };
  enter();
  int64_t per_block = HALF ? 1 : blocks.size / 32;
  for (int64_t u = 0, block = 0; u < units; ++block) {
    int64_t end = u + per_block < units ? u + per_block : units;
    for (; u < end; ++u) {
      B w[8];
      source.next(w);
      for (int q = 0; q < 4; ++q) step(w[q], 8 * u + q);
      if (HALF) {
        flush(block);
        walk.step();
        if (++block == blocks.count) break;
      }
      for (int q = 4; q < 8; ++q) step(w[q], 8 * u + q);
    }
    if (block == blocks.count) break;
    flush(block);
    if (walk.step()) enter();
  }
  for (int m = 0; m < M; ++m) store_f(acc[m], y[m]);
  corrections.finish(acc);
}

template <class Source, int PARTS, bool HALF>
static void exact_of(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Wide &wide,
                     const rarefy_term *beside, int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
  for (; tokens >= 4; tokens -= 4, first += 4, acc += 4)
    exact_few<Source, PARTS, 4, HALF>(t, in, blocks, wide, beside, tile, first, acc);
  for (; tokens; --tokens, ++first, ++acc) exact_few<Source, PARTS, 1, HALF>(t, in, blocks, wide, beside, tile, first, acc);
}

template <class Source, int PARTS>
static void exact_of(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Wide &wide,
                     const rarefy_term *beside, int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
  if constexpr (PARTS == 0 && !Source::masked)
    if (blocks.size == 16) return exact_of<Source, PARTS, true>(t, in, blocks, wide, beside, tile, first, tokens, acc);
  exact_of<Source, PARTS, false>(t, in, blocks, wide, beside, tile, first, tokens, acc);
}

static inline void exact_codes(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks,
                               const Wide &wide, const rarefy_term *beside, int64_t tile, int64_t first,
                               int64_t tokens, float (*acc)[16]) {
  int parts = t.table.bytes == 0 ? 0 : t.scale_layout == RAREFY_SIGNED ? 2 : 1;
#define CASE(n, parts_) case n + 16 * parts_: return exact_of<Codes<n>, parts_>(t, in, blocks, wide, beside, tile, first, tokens, acc)
#define KEPT(parts_) case 256 + 16 * parts_: return exact_of<Kept<4>, parts_>(t, in, blocks, wide, beside, tile, first, tokens, acc); \
  case 257 + 16 * parts_: return exact_of<Kept<8>, parts_>(t, in, blocks, wide, beside, tile, first, tokens, acc)
  int source = t.kind == RAREFY_KEPT ? 256 + (t.bits > 4) : t.bits;
  switch (source + 16 * parts) {
    KEPT(0); KEPT(1); KEPT(2);
    CASE(1, 0); CASE(2, 0); CASE(3, 0); CASE(4, 0); CASE(5, 0); CASE(6, 0); CASE(7, 0); CASE(8, 0);
    CASE(3, 1); CASE(4, 1); CASE(5, 1); CASE(6, 1); CASE(7, 1); CASE(8, 1);
    CASE(3, 2); CASE(4, 2); CASE(6, 2); CASE(8, 2);
    default: return;
  }
#undef CASE
#undef KEPT
}

// acc[token] += panel * x for 128 columns from k0 on.
static inline void multiply_panel(const float *panel, const rarefy_input &in, int64_t k0, int64_t first,
                                  int64_t tokens, float (*acc)[16]) {
  auto run = [&](auto count, int64_t m0) __attribute__((always_inline)) {
    constexpr int N = decltype(count)::value;
    F y[N];
    const float *x[N];
    for (int m = 0; m < N; ++m) {
      x[m] = in.x + (first + m0 + m) * in.stride + k0;
      y[m] = load_f(acc[m0 + m]);
    }
    for (int k = 0; k < panel_columns; ++k) {
      F w = load_f(panel + 16 * k);
      for (int m = 0; m < N; ++m) y[m] = fma_f(w, set_f(x[m][k]), y[m]);
    }
    for (int m = 0; m < N; ++m) store_f(acc[m0 + m], y[m]);
  };
  int64_t m = 0;
  for (; m + 8 <= tokens; m += 8) run(Count<8>{}, m);
  for (; m + 2 <= tokens; m += 2) run(Count<2>{}, m);
  if (m < tokens) run(Count<1>{}, m);
}

}  // namespace RAREFY_NS
