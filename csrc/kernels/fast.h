// Products with 8-bit activations: codes (or table entries as bytes) times bytes, one flush to floats per block.
#pragma once
#include <initializer_list>

#include "entries.h"

namespace RAREFY_NS {

constexpr int64_t few = 4;  // tokens up to which codes are multiplied without a panel

// A table of at most 16 entries as sums of small whole numbers: entry = low + sum over i of factor[i] * part[i][code].
// With a scale for each sign, parts are magnitudes, of positive entries first.
struct Parts {
  int count = 0;
  float low = 0, factor[4] = {0, 0, 0, 0};
  bool negative[4] = {false, false, false, false};
  alignas(16) uint8_t part[4][16] = {};
};

// The largest of a quarter, a half and one that all entries are small multiples of.
static inline float whole_step(const float *values, int entries) {
  float step = 0;
  for (float candidate : {.25f, .5f, 1.f}) {
    bool whole = true;
    for (int i = 0; i < entries; ++i) {
      float v = values[i] / candidate;
      whole = whole && v >= -127 && v <= 127 && v == float(int(v));
    }
    if (whole) step = candidate;
  }
  return step;  // 0: they are multiples of none
}

// Whole numbers up to 127 where there is such a step; else up to 127 * 128 + 127, of which `origin` becomes one.
static inline void split_entries(Parts &parts, const float *values, int entries, float step, float origin,
                                 bool negative) {
  float top = 0;
  for (int i = 0; i < entries; ++i) top = values[i] > top ? values[i] : top;
  bool exact = step != 0 && top / step <= 127;
  if (!exact) {
    step = top / 16383;
    if (origin > step) step = origin / float(int(origin / step));
  }
  auto add = [&](float factor, auto digit) {
    for (int i = 0; i < entries; ++i) parts.part[parts.count][i] = uint8_t(digit(int(values[i] / step + .5f)));
    parts.factor[parts.count] = factor;
    parts.negative[parts.count++] = negative;
  };
  if (exact) return add(step, [](int whole) { return whole; });
  add(step * 128, [](int whole) { return whole >> 7; });
  add(step, [](int whole) { return whole & 127; });
}

static inline Parts split_table(const rarefy_term &t) {
  Parts parts;
  if (t.table.bytes == 0) return parts;
  const float *table = static_cast<const float *>(t.table.data);
  int entries = 1 << t.bits;
  float values[16], step = whole_step(table, entries);
  if (t.scale_layout == RAREFY_SIGNED) {
    for (int side = 0; side < 2; ++side) {
      for (int i = 0; i < entries; ++i) {
        float v = side ? -table[i] : table[i];
        values[i] = v > 0 ? v : 0;
      }
      split_entries(parts, values, entries, step, 0, side == 1);
    }
    return parts;
  }
  parts.low = table[0];
  for (int i = 0; i < entries; ++i) parts.low = table[i] < parts.low ? table[i] : parts.low;
  for (int i = 0; i < entries; ++i) values[i] = table[i] - parts.low;
  split_entries(parts, values, entries, step, -parts.low, false);  // so that zero stays zero
  return parts;
}

// What a block adds to y: scale * (dot + offset * sum(x)) for codes, with the offset -zero, where whole zero points cancel
// exactly; otherwise sum over parts of factor * dot, plus offset * sum(x).
template <int PARTS> struct Flush {
  F factor[PARTS ? PARTS : 1], offset;
  bool pairs;

  inline __attribute__((always_inline)) Flush(const rarefy_term &t, const Params &p, const Parts &parts)
      : pairs(t.scale_layout == RAREFY_PAIRS) {
    if constexpr (PARTS == 0) {
      factor[0] = pairs ? sub_f(p.scale, p.zero) : p.scale;
      offset = pairs ? p.zero : sub_f(zero_f(), p.zero);
    } else {
      for (int i = 0; i < PARTS; ++i)
        factor[i] = mul_f(set_f(parts.negative[i] ? -parts.factor[i] : parts.factor[i]),
                          parts.negative[i] ? p.negative : p.scale);
      offset = mul_f(p.scale, set_f(parts.low));
    }
  }
  // `scale` is that of the block of x, `sum` the sum of its codes.
  F operator()(F acc, const I *dots, float scale, float sum) const {
    if (PARTS == 0 && !pairs) {
      F centred = fma_f(offset, set_f(sum), to_f(dots[0]));
      return fma_f(mul_f(factor[0], set_f(scale)), centred, acc);
    }
    F total = mul_f(offset, set_f(sum));
    for (int i = 0; i < (PARTS ? PARTS : 1); ++i) total = fma_f(factor[i], to_f(dots[i]), total);
    return fma_f(total, set_f(scale), acc);
  }
};

static inline int32_t quad_at(const int8_t *codes, int64_t quad) {
  int32_t x;
  __builtin_memcpy(&x, codes + 4 * quad, 4);
  return x;
}

// M tokens from `first` on, codes straight from registers into the dot products. Blocks of 16 columns (HALF), or of
// whole units.
template <class Source, int PARTS, int M, bool HALF>
static void fast_few(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Parts &parts,
                     const rarefy_term *beside, int64_t tile, int64_t first, float (*acc)[16]) {
  constexpr int dots = PARTS ? PARTS : 1, chains = HALF || M * dots >= 4 ? 1 : 4 / (M * dots);
  int64_t units = rarefy::units_of(t);
  Walk walk(rarefy::blocks_per_group(t, blocks.size));
  Scales scales(t, tile);
  B table[dots];
  for (int i = 0; i < PARTS; ++i) table[i] = table_b(parts.part[i]);
  const int8_t *x[M];
  const float *x_scale[M], *x_sum[M];
  F y[M];
  for (int m = 0; m < M; ++m) {
    x[m] = blocks.codes + (first + m) * in.stride;
    x_scale[m] = blocks.scale + (first + m) * blocks.count;
    x_sum[m] = blocks.sum + (first + m) * blocks.count;
    y[m] = load_f(acc[m]);
  }
  I sums[M][dots][chains];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < dots; ++i)
      for (int c = 0; c < chains; ++c) sums[m][i][c] = zero_i();
  Corrections<M> corrections(beside, in, tile, first, 0, blocks.count);
  auto flush = [&](int64_t block) __attribute__((always_inline)) {
    Flush<PARTS> f(t, scales(walk.group), parts);
    for (int m = 0; m < M; ++m) {
      I total[dots];
      for (int i = 0; i < dots; ++i) {
        total[i] = sums[m][i][0];
        for (int c = 1; c < chains; ++c) total[i] = add_i(total[i], sums[m][i][c]);
        for (int c = 0; c < chains; ++c) sums[m][i][c] = zero_i();
      }
      y[m] = f(y[m], total, x_scale[m][block], x_sum[m][block]);
    }
    corrections.some();
  };
  auto step = [&](B w, int64_t quad, int chain) __attribute__((always_inline)) {
    for (int i = 0; i < dots; ++i) {
      B u = PARTS ? lookup_b(table[i], w) : w;
      for (int m = 0; m < M; ++m)
        sums[m][i][chain] = dot<Source::wide && PARTS == 0>(sums[m][i][chain], u, quad_at(x[m], quad));
    }
  };
  Source source(t, tile, 0);
  source.group(t, tile, 0);
  int64_t per_block = HALF ? 1 : blocks.size / 32;
  for (int64_t u = 0, block = 0; u < units; ++block) {
    int64_t end = u + per_block < units ? u + per_block : units;
    for (; u < end; ++u) {
      B w[8];
      source.next(w);
      for (int q = 0; q < 4; ++q) step(w[q], 8 * u + q, q % chains);
      if (HALF) {
        flush(block);
        walk.step();
        if (++block == blocks.count) break;
      }
      for (int q = 4; q < 8; ++q) step(w[q], 8 * u + q, q % chains);
    }
    if (block == blocks.count) break;
    flush(block);
    if (walk.step()) source.group(t, tile, walk.group);
  }
  for (int m = 0; m < M; ++m) store_f(acc[m], y[m]);
  corrections.finish(acc);
}

// Any number of tokens: a panel of 128 columns is decoded once to bytes, then read by all of them.
template <class Source, int PARTS>
static void fast_many(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Parts &parts,
                      int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
  constexpr int dots = PARTS ? PARTS : 1, M = dots == 1 ? 8 : dots == 2 ? 4 : 2;
  alignas(64) uint8_t panel[dots][32][64];
  int64_t units = rarefy::units_of(t), quads = blocks.size / 4, block = 0;
  Walk walk(rarefy::blocks_per_group(t, blocks.size));
  Scales scales(t, tile);
  B table[dots];
  for (int i = 0; i < PARTS; ++i) table[i] = table_b(parts.part[i]);
  Source source(t, tile, 0);
  for (int64_t u0 = 0; u0 < units; u0 += 4) {
    int64_t panel_units = units - u0 < 4 ? units - u0 : 4;
    for (int64_t u = 0; u < panel_units; ++u) {
      B w[8];
      if (Source::masked) source.group(t, tile, (u0 + u) * 32 / t.group_size);
      source.next(w);
      for (int q = 0; q < 8; ++q)
        for (int i = 0; i < dots; ++i) store_b(panel[i][8 * u + q], PARTS ? lookup_b(table[i], w[q]) : w[q]);
    }
    for (int64_t q0 = 0; q0 < 8 * panel_units && block < blocks.count; q0 += quads, ++block, walk.step()) {
      int64_t q1 = q0 + quads < 8 * panel_units ? q0 + quads : 8 * panel_units;
      Flush<PARTS> flush(t, scales(walk.group), parts);
      auto run = [&](auto count, int64_t m0) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        I sums[N][dots];
        const int8_t *x = blocks.codes + (first + m0) * in.stride + 32 * u0;
        for (int m = 0; m < N; ++m)
          for (int i = 0; i < dots; ++i) sums[m][i] = zero_i();
        for (int64_t q = q0; q < q1; ++q)
          for (int i = 0; i < dots; ++i) {
            B u = load_b(panel[i][q]);
            for (int m = 0; m < N; ++m)
              sums[m][i] = dot<Source::wide && PARTS == 0>(sums[m][i], u, quad_at(x + m * in.stride, q));
          }
        for (int m = 0; m < N; ++m) {
          int64_t at = (first + m0 + m) * blocks.count + block;
          store_f(acc[m0 + m], flush(load_f(acc[m0 + m]), sums[m], blocks.scale[at], blocks.sum[at]));
        }
      };
      int64_t m = 0;
      for (; m + M <= tokens; m += M) run(Count<M>{}, m);
      for (; m < tokens; ++m) run(Count<1>{}, m);
    }
  }
}

template <class Source, int PARTS, bool HALF>
static void fast_of(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Parts &parts,
                    const rarefy_term *beside, int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
  for (; tokens >= 4; tokens -= 4, first += 4, acc += 4)
    fast_few<Source, PARTS, 4, HALF>(t, in, blocks, parts, beside, tile, first, acc);
  for (; tokens; --tokens, ++first, ++acc)
    fast_few<Source, PARTS, 1, HALF>(t, in, blocks, parts, beside, tile, first, acc);
}

template <class Source, int PARTS>
static void fast_of(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Parts &parts,
                    const rarefy_term *beside, int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
  if (tokens <= few && blocks.size >= 32)
    return fast_of<Source, PARTS, false>(t, in, blocks, parts, beside, tile, first, tokens, acc);
  if constexpr (PARTS == 0 && !Source::masked)
    if (tokens <= few && blocks.size == 16)
      return fast_of<Source, PARTS, true>(t, in, blocks, parts, beside, tile, first, tokens, acc);
  fast_many<Source, PARTS>(t, in, blocks, parts, tile, first, tokens, acc);
}

// Whether codes and activations can be multiplied as bytes.
static inline bool has_fast(const rarefy_term &t) {
  return rarefy::reads_blocks(t) && (t.table.bytes == 0 || t.bits == 3 || t.bits == 4);
}

// Whether `fast` does the corrections of another term as well.
static inline bool fast_corrects(const rarefy_term &t, const rarefy_blocks &blocks, int64_t tokens) {
  return tokens <= few && (blocks.size >= 32 || (blocks.size == 16 && t.kind == RAREFY_CODES && !t.table.bytes));
}

static inline void fast(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Parts &parts,
                        const rarefy_term *beside, int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
#define PLAIN(n) case n: return fast_of<Codes<n>, 0>(t, in, blocks, parts, beside, tile, first, tokens, acc)
#define TABLE(n, parts_) case n + 16 * parts_: return fast_of<Codes<n>, parts_>(t, in, blocks, parts, beside, tile, first, tokens, acc)
#define KEPT(parts_) case parts_: return fast_of<Kept<4>, parts_>(t, in, blocks, parts, beside, tile, first, tokens, acc)
  if (t.kind == RAREFY_KEPT) {
    if (t.bits > 4) return fast_of<Kept<8>, 0>(t, in, blocks, parts, beside, tile, first, tokens, acc);
    switch (parts.count) { KEPT(0); KEPT(1); KEPT(2); KEPT(4); default: return; }
  }
  switch (t.bits + 16 * parts.count) {
    PLAIN(1); PLAIN(2); PLAIN(3); PLAIN(4); PLAIN(5); PLAIN(6); PLAIN(7); PLAIN(8);
    TABLE(3, 1); TABLE(4, 1); TABLE(3, 2); TABLE(4, 2); TABLE(3, 4); TABLE(4, 4);
    default: return;
  }
#undef PLAIN
#undef TABLE
#undef KEPT
}

}  // namespace RAREFY_NS
