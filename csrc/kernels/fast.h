// Products with 8-bit activations: codes (or table entries as bytes) times bytes, one flush to floats per block.
#pragma once
#include <initializer_list>

#include "entries.h"

namespace RAREFY_NS {

using rarefy::abreast;
using rarefy::chunk_tokens;
using rarefy::few;
using rarefy::multiplies_bytes;

constexpr int64_t abreast_tiles = accumulators >= 16 ? 2 : 1;  // that share what is read of the activations

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
template <class Source, int PARTS> struct Flush {
  F factor[PARTS ? PARTS : 1], offset;
  bool pairs;  // known of all codes but those of one bit

  inline __attribute__((always_inline)) Flush(const rarefy_term &t, const Params &p, const Parts &parts)
      : pairs(Source::bits == 1 && t.scale_layout == RAREFY_PAIRS) {
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
    if (PARTS == 0 && !pairs) return centred(acc, dots[0], scale, sum);
    F total = mul_f(offset, set_f(sum));
    for (int i = 0; i < (PARTS ? PARTS : 1); ++i) total = fma_f(factor[i], to_f(dots[i]), total);
    return fma_f(total, set_f(scale), acc);
  }
  F centred(F acc, I dots, float scale, float sum) const {
    return fma_f(mul_f(factor[0], set_f(scale)), fma_f(offset, set_f(sum), to_f(dots)), acc);
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
  // Bits alone stay where they are in a byte, and the sums of each place are lowered in the end. Wider codes are lowered
  // one by one, which memory leaves time for.
  constexpr bool raised = Source::bits == 1;
  constexpr int dots = PARTS ? PARTS : 1, levels = raised ? 4 : 1;
  constexpr int chains = HALF || M * dots >= 4 ? 1 : raised ? 2 : 4 / (M * dots);
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
  I sums[M][dots][levels][chains];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < dots; ++i)
      for (int l = 0; l < levels; ++l)
        for (int c = 0; c < chains; ++c) sums[m][i][l][c] = zero_i();
  Corrections<M> corrections(beside, in, tile, first, 0, blocks.count);
  auto flush = [&](int64_t block) __attribute__((always_inline)) {
    Flush<Source, PARTS> f(t, scales(walk.group), parts);
    for (int m = 0; m < M; ++m) {
      I total[dots];
      for (int i = 0; i < dots; ++i) {
        for (int l = 0; l < levels; ++l) {
          I own = sums[m][i][l][0];
          for (int c = 1; c < chains; ++c) own = add_i(own, sums[m][i][l][c]);
          for (int c = 0; c < chains; ++c) sums[m][i][l][c] = zero_i();
          total[i] = l == 0 ? own : add_i(total[i], lower_i(own, l));
        }
      }
      y[m] = f(y[m], total, x_scale[m][block], x_sum[m][block]);
    }
    corrections.some();
  };
  auto step = [&](B w, int64_t unit, int q) __attribute__((always_inline)) {
    int level = q % levels, chain = (raised ? q / 4 : q) % chains;
    for (int i = 0; i < dots; ++i) {
      B u = PARTS ? lookup_b(table[i], w) : w;
      for (int m = 0; m < M; ++m) {
        I &sum = sums[m][i][level][chain];
        sum = dot<Source::wide && PARTS == 0>(sum, u, quad_at(x[m], 8 * unit + q));
      }
    }
  };
  Source source(t, tile, 0);
  source.group(t, tile, 0);
  int64_t per_block = HALF ? 1 : blocks.size / 32;
  for (int64_t u = 0, block = 0; u < units; ++block) {
    int64_t end = u + per_block < units ? u + per_block : units;
    for (; u < end; ++u) {
      B w[8];
      source.template next<raised>(w);
      for (int q = 0; q < 4; ++q) step(w[q], u, q);
      if (HALF) {
        flush(block);
        walk.step();
        if (++block == blocks.count) break;
      }
      for (int q = 4; q < 8; ++q) step(w[q], u, q);
    }
    if (block == blocks.count) break;
    flush(block);
    if (walk.step()) source.group(t, tile, walk.group);
  }
  for (int m = 0; m < M; ++m) store_f(acc[m], y[m]);
  corrections.finish(acc);
}

// Any number of tokens and R tiles, `acc` [R, chunk_tokens]: a panel of 128 columns is decoded once to bytes, then read by
// all tokens, of which M at a time keep their sums in registers.
template <class Source, int PARTS, int R>
static void fast_many(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Parts &parts,
                      int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
  constexpr int dots = PARTS ? PARTS : 1, most = accumulators / (R * dots), M = most < 1 ? 1 : most > 8 ? 8 : most;
  static_assert(R <= 2 && abreast % M == 0, "tokens that lie side by side are multiplied together");
  alignas(64) uint8_t panel[R][dots][32][64];
  int64_t units = rarefy::units_of(t), quads = blocks.size / 4, block = 0, apart = rarefy::code_stride(in);
  Walk walk(rarefy::blocks_per_group(t, blocks.size));
  Scales scales[2] = {{t, tile}, {t, tile + R - 1}};
  Source source[2] = {{t, tile, 0}, {t, tile + R - 1, 0}};
  B table[dots];
  for (int i = 0; i < PARTS; ++i) table[i] = table_b(parts.part[i]);
  for (int64_t u0 = 0; u0 < units; u0 += 4) {
    int64_t panel_units = units - u0 < 4 ? units - u0 : 4;
    for (int r = 0; r < R; ++r)
      for (int64_t u = 0; u < panel_units; ++u) {
        B w[8];
        if (Source::masked) source[r].group(t, tile + r, (u0 + u) * 32 / t.group_size);
        source[r].next(w);
        for (int q = 0; q < 8; ++q)
          for (int i = 0; i < dots; ++i) store_b(panel[r][i][8 * u + q], PARTS ? lookup_b(table[i], w[q]) : w[q]);
      }
    for (int64_t q0 = 0; q0 < 8 * panel_units && block < blocks.count; q0 += quads, ++block, walk.step()) {
      int64_t q1 = q0 + quads < 8 * panel_units ? q0 + quads : 8 * panel_units;
      Flush<Source, PARTS> flush[2] = {{t, scales[0](walk.group), parts}, {t, scales[R - 1](walk.group), parts}};
      // N tokens from m0 on, `step` bytes from quad to quad; nobody looks at those that are beyond the last.
      auto run = [&](auto count, auto step, int64_t m0, const int8_t *x, int64_t at) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value, bytes = decltype(step)::value;
        const float *scale = blocks.scale + at, *sum = blocks.sum + at;
        I sums[R][N][dots];
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < N; ++m)
            for (int i = 0; i < dots; ++i) sums[r][m][i] = zero_i();
        x += bytes * (8 * u0 + q0);
        for (int64_t q = q0; q < q1; ++q, x += bytes)
          for (int i = 0; i < dots; ++i) {
            B u[R];
            for (int r = 0; r < R; ++r) u[r] = load_b(panel[r][i][q]);
            for (int m = 0; m < N; ++m) {
              I quads = set_i(quad_at(x, m));
              for (int r = 0; r < R; ++r)
                sums[r][m][i] = dot<Source::wide && PARTS == 0>(sums[r][m][i], u[r], quads);
            }
          }
        for (int m = 0; m < N; ++m)
          for (int r = 0; r < R; ++r) {
            float *y = acc[r * chunk_tokens + m0 + m];
            if (PARTS == 0 && Source::bits > 1) store_f(y, flush[r].centred(load_f(y), sums[r][m][0], scale[m], sum[m]));
            else store_f(y, flush[r](load_f(y), sums[r][m], scale[m], sum[m]));
          }
      };
      if (in.tokens <= few)
        for (int64_t m = 0; m < tokens; ++m)
          run(Count<1>{}, Count<4>{}, m, blocks.codes + (first + m) * apart, (first + m) * blocks.count + block);
      else
        for (int64_t m = 0; m < tokens; m += M) {
          int64_t row = (first + m) / abreast * abreast, lane = m % abreast;
          run(Count<M>{}, Count<4 * abreast>{}, m, blocks.codes + row * apart + 4 * lane,
              row * blocks.count + block * abreast + lane);
        }
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
                    const rarefy_term *beside, int64_t tile, int64_t last, int64_t first, int64_t tokens,
                    float (*acc)[16]) {
  auto each = [&](auto half) __attribute__((always_inline)) {
    for (; tile < last; ++tile, acc += chunk_tokens)
      fast_of<Source, PARTS, decltype(half)::value>(t, in, blocks, parts, beside, tile, first, tokens, acc);
  };
  if (in.tokens <= few && blocks.size >= 32) return each(Count<false>{});
  if constexpr (PARTS == 0 && !Source::masked)
    if (in.tokens <= few && blocks.size == 16) return each(Count<true>{});
  if constexpr (PARTS <= 1 && abreast_tiles == 2)
    for (; tile + 2 <= last; tile += 2, acc += 2 * chunk_tokens)
      fast_many<Source, PARTS, 2>(t, in, blocks, parts, tile, first, tokens, acc);
  for (; tile < last; ++tile, acc += chunk_tokens)
    fast_many<Source, PARTS, 1>(t, in, blocks, parts, tile, first, tokens, acc);
}

// Whether `fast` does the corrections of another term as well.
static inline bool fast_corrects(const rarefy_term &t, const rarefy_blocks &blocks, int64_t tokens) {
  return tokens <= few && (blocks.size >= 32 || (blocks.size == 16 && t.kind == RAREFY_CODES && !t.table.bytes));
}

// Tiles [tile, last), `acc` [tiles, chunk_tokens].
static inline void fast(const rarefy_term &t, const rarefy_input &in, const rarefy_blocks &blocks, const Parts &parts,
                        const rarefy_term *beside, int64_t tile, int64_t last, int64_t first, int64_t tokens,
                        float (*acc)[16]) {
#define PLAIN(n) case n: return fast_of<Codes<n>, 0>(t, in, blocks, parts, beside, tile, last, first, tokens, acc)
#define TABLE(n, parts_) case n + 16 * parts_: return fast_of<Codes<n>, parts_>(t, in, blocks, parts, beside, tile, last, first, tokens, acc)
#define KEPT(parts_) case parts_: return fast_of<Kept<4>, parts_>(t, in, blocks, parts, beside, tile, last, first, tokens, acc)
  if (t.kind == RAREFY_KEPT) {
    if (t.bits > 4) return fast_of<Kept<8>, 0>(t, in, blocks, parts, beside, tile, last, first, tokens, acc);
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
