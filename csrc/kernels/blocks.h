// One block of queries of one head over its list; see blocks.h.
//
// Keys lie in panels of 16: step s of a panel is 16 floats, channel s of its keys (PAIRS: channels 2 s and 2 s + 1).
// Values lie by tokens: step s is the channels of token s (PAIRS: those of tokens 2 s and 2 s + 1, one beside the
// other). So both products are the same loop. Four panels are one group, whose scores are there at a time: first all
// rows meet its keys, then all rows meet its values.
#pragma once
#include <cmath>

#include "../internal.h"
#include "blocks_table.h"
#include "convert.h"
#include "heads.h"

namespace RAREFY_NS {

using rarefy::key_blocks;
using rarefy::panel;
using rarefy::panels_of;

constexpr int64_t group_panels = 4, group_keys = group_panels * panel;

// 2^x in 16 lanes to 1e-7; 0 below -126.5. With n = round(x), f = x - n and 2^f = 1 + f p(f), where p is least in
// relative error. NaN stays NaN.
static inline F power_f(F x) {
  x = max_f(set_f(-127.f), x);
  I n = round_i(x);
  F f = sub_f(x, to_f(n)), p = set_f(1.326472022e-3f);
  p = fma_f(p, f, set_f(9.671513139e-3f));
  p = fma_f(p, f, set_f(5.550733766e-2f));
  p = fma_f(p, f, set_f(2.402224207e-1f));
  p = fma_f(p, f, set_f(6.931469776e-1f));
  return mul_f(fma_f(p, f, set_f(1.f)), float_of(shl_i<23>(add_i(n, set_i(127)))));
}

// R rows of `a` times N vectors of each step of `b`, added to the sums.
template <int R, int N>
static inline void multiply(const float *a, int64_t row, const float *const b[N], int64_t next, int64_t steps,
                            F sums[R][N]) {
  for (int64_t s = 0; s < steps; ++s) {
    F x[N];
    for (int n = 0; n < N; ++n) x[n] = load_f(b[n] + s * next);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] = times_one(a + r * row + s, x[n], sums[r][n]);
  }
}

// 16 floats of a head's token, or as many pairs; zero where there is no such token.
static inline void read_token(const rarefy_chosen &c, const void *from, int64_t at, bool there, int64_t steps,
                              float *to) {
  for (int64_t k = 0; k < steps; k += 16) {
    if (!there) store_f(to + k, zero_f());
    else if (PAIRS) store_f(to + k, load_f(reinterpret_cast<const float *>(static_cast<const uint16_t *>(from) + at) + k));
    else store_f(to + k, load_as(from, c.type, at + k));
  }
}

static void pack(const rarefy_chosen &c, int64_t pair, int64_t block, float *keys, float *values) {
  const int64_t steps = PAIRS ? c.width / 2 : c.width, row = pair / c.kv_heads, head = pair % c.kv_heads;
  const int64_t k_head = row * c.key_strides[0] + head * c.key_strides[1];
  const int64_t v_head = row * c.value_strides[0] + head * c.value_strides[1];
  alignas(64) float one[RAREFY_WIDEST], other[RAREFY_WIDEST];
  for (int64_t p = 0; p < panels_of(c); ++p, keys += steps * panel, values += steps * panel)
    for (int64_t t = 0; t < panel; ++t) {
      int64_t within = p * panel + t, token = block * c.block_k + within;
      bool there = within < c.block_k && token < c.keys;
      read_token(c, c.key, k_head + token * c.key_strides[2], there, steps, one);
      for (int64_t s = 0; s < steps; ++s) keys[s * panel + t] = one[s];
      if (!PAIRS) {
        read_token(c, c.value, v_head + token * c.value_strides[2], there, steps, values + t * steps);
      } else if (t % 2) {
        bool before = within - 1 < c.block_k && token - 1 < c.keys;
        read_token(c, c.value, v_head + (token - 1) * c.value_strides[2], before, steps, one);
        read_token(c, c.value, v_head + token * c.value_strides[2], there, steps, other);
        const uint16_t *low = reinterpret_cast<uint16_t *>(one), *high = reinterpret_cast<uint16_t *>(other);
        uint16_t *to = reinterpret_cast<uint16_t *>(values + t / 2 * c.width);
        for (int64_t k = 0; k < c.width; ++k) to[2 * k] = low[k], to[2 * k + 1] = high[k];
      }
    }
}

// What one thread works in, for so many rows; without memory it only counts.
struct Work {
  int64_t rows, steps, used = 0;
  float *query, *scores, *weights, *sums, *top, *total, *fade;
  int32_t *low, *high;

  Work(const rarefy_chosen &c, float *memory)
      : rows((c.block_q + tile - 1) / tile * tile), steps(PAIRS ? c.width / 2 : c.width) {
    auto take = [&](int64_t count) {
      float *own = memory ? memory + used : nullptr;
      used += (count + 15) / 16 * 16;
      return own;
    };
    query = take(rows * steps), scores = take(rows * group_keys), weights = take(rows * group_keys);
    sums = take(rows * c.width), top = take(rows), total = take(rows), fade = take(rows);
    low = reinterpret_cast<int32_t *>(take(rows)), high = reinterpret_cast<int32_t *>(take(rows));
  }
};

static int64_t floats(const rarefy_chosen &c) { return Work(c, nullptr).used; }

// Panels of a group: where they lie, and keys [first, last) of them.
struct Group {
  int64_t count = 0;
  const float *keys[group_panels], *values[group_panels];
  int64_t first[group_panels], last[group_panels];
};

// Scores of `tile` rows from `r` on against all panels of a group.
static inline void score(const Group &g, const Work &w, int64_t r) {
  const float *query = w.query + r * w.steps;
  float *scores = w.scores + r * group_keys;
  for (int64_t p = 0; p < group_panels; p += at_once) {
    if (p >= g.count) return;
    const float *from[at_once];
    for (int n = 0; n < at_once; ++n) from[n] = g.keys[p + n < g.count ? p + n : p];
    F sums[tile][at_once];
    for (int i = 0; i < tile; ++i)
      for (int n = 0; n < at_once; ++n) sums[i][n] = zero_f();
    multiply<tile, at_once>(query, w.steps, from, panel, w.steps, sums);
    for (int i = 0; i < tile; ++i)
      for (int n = 0; n < at_once; ++n) store_f(scores + i * group_keys + (p + n) * panel, sums[i][n]);
  }
}

// Scores of a row become weights, relative to the largest number so far; `unit` is what a score is worth in log 2.
static inline void soften_row(const Group &g, const Work &w, int64_t r, float unit, bool whole) {
  float *scores = w.scores + r * group_keys, *weights = w.weights + r * (PAIRS ? group_keys / 2 : group_keys);
  F most = set_f(-INFINITY);
  for (int64_t p = 0; p < g.count; ++p) {
    F x = mul_f(load_f(scores + p * panel), set_f(unit));
    store_f(scores + p * panel, x);
    if (!whole) {
      int64_t first = w.low[r] - g.first[p], last = (w.high[r] < g.last[p] ? w.high[r] : g.last[p]) - g.first[p];
      for (int64_t t = 0; t < panel; ++t)
        if (t < first || t >= last) scores[p * panel + t] = -INFINITY;
      x = load_f(scores + p * panel);
    }
    most = max_f(most, x);
  }
  float highest = most_f(most);
  // A row with a number that is none has to show it.
  float peak = w.top[r] > highest ? w.top[r] : highest, from = peak == -INFINITY ? 0.f : peak;
  F total = zero_f();
  for (int64_t p = 0; p < g.count; ++p) {
    F x = power_f(sub_f(load_f(scores + p * panel), set_f(from)));
    total = add_f(total, x);
    store_weights(weights, p, x);
  }
  w.fade[r] = w.top[r] == -INFINITY ? 0.f : std::exp2(w.top[r] - from);
  w.total[r] = w.total[r] * w.fade[r] + sum_f(total);
  w.top[r] = peak;
}

// Values of a group join the sums of `tile` rows from `r` on: channels [k, k + 16 N).
template <int N> static inline void mix_rows(const Group &g, const Work &w, int64_t width, int64_t r, int64_t k) {
  const int64_t row = PAIRS ? group_keys / 2 : group_keys, steps = PAIRS ? panel / 2 : panel;
  float *sums = w.sums + r * width + k;
  F mixed[tile][N];
  for (int i = 0; i < tile; ++i)
    for (int n = 0; n < N; ++n) mixed[i][n] = mul_f(load_f(sums + i * width + 16 * n), set_f(w.fade[r + i]));
  for (int64_t p = 0; p < g.count; ++p) {
    const float *from[N];
    for (int n = 0; n < N; ++n) from[n] = g.values[p] + k + 16 * n;
    multiply<tile, N>(w.weights + r * row + p * steps, row, from, width, steps, mixed);
  }
  for (int i = 0; i < tile; ++i)
    for (int n = 0; n < N; ++n) store_f(sums + i * width + 16 * n, mixed[i][n]);
}

static void attend(const rarefy_chosen &c, int64_t batch, int64_t head, int64_t block, const float *keys,
                   const float *values, float *memory) {
  const Work w(c, memory);
  const int64_t begin = block * c.block_q, count = c.queries - begin < c.block_q ? c.queries - begin : c.block_q;
  const int64_t from = batch * c.query_strides[0] + head * c.query_strides[1];
  for (int64_t r = 0; r < w.rows; ++r) {
    read_token(c, c.query, from + (begin + r) * c.query_strides[2], r < count, w.steps, w.query + r * w.steps);
    w.low[r] = r < count ? c.low[batch * c.queries + begin + r] : 0;
    w.high[r] = r < count ? c.high[batch * c.queries + begin + r] : 0;
    w.top[r] = -INFINITY, w.total[r] = 0, w.fade[r] = 0;
  }
  __builtin_memset(w.sums, 0, size_t(w.rows * c.width) * 4);
  const int64_t rows = (c.queries + c.block_q - 1) / c.block_q, each = panels_of(c), size = w.steps * panel;
  const int64_t line = (batch * c.lists + head / (c.heads / c.lists)) * rows + block;
  const int64_t base = (batch * c.kv_heads + head / (c.heads / c.kv_heads)) * key_blocks(c) * each;
  const int32_t *list = c.columns + c.start[line];
  const float unit = c.scale * 1.44269504f;
  for (int64_t at = 0; at < c.count[line] * each; at += group_panels) {
    Group g;
    for (; g.count < group_panels && at + g.count < c.count[line] * each; ++g.count) {
      int64_t column = list[(at + g.count) / each], p = (at + g.count) % each, n = g.count;
      g.keys[n] = keys + (base + column * each + p) * size, g.values[n] = values + (base + column * each + p) * size;
      g.first[n] = column * c.block_k + p * panel;
      g.last[n] = (column + 1) * c.block_k < g.first[n] + panel ? (column + 1) * c.block_k : g.first[n] + panel;
    }
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t r = 0; r < w.rows; r += tile) {
        int32_t low_most = 0, low_least = INT32_MAX, high_most = 0, high_least = INT32_MAX;
        for (int64_t i = r; i < r + tile && i < count; ++i) {
          low_most = w.low[i] > low_most ? w.low[i] : low_most, low_least = w.low[i] < low_least ? w.low[i] : low_least;
          high_most = w.high[i] > high_most ? w.high[i] : high_most;
          high_least = w.high[i] < high_least ? w.high[i] : high_least;
        }
        bool some = false, whole = true;
        for (int64_t n = 0; n < g.count; ++n) {
          some |= g.first[n] < high_most && g.last[n] > low_least;
          whole &= g.first[n] >= low_most && g.first[n] + panel <= high_least && g.last[n] - g.first[n] == panel;
        }
        if (!some) continue;
        if (pass) {
          int64_t k = 0;
          for (; k + 16 * at_once <= c.width; k += 16 * at_once) mix_rows<at_once>(g, w, c.width, r, k);
          for (; k < c.width; k += 16) mix_rows<1>(g, w, c.width, r, k);
        } else {
          score(g, w, r);
          for (int64_t i = r; i < r + tile; ++i) soften_row(g, w, i, unit, whole && i < count);
        }
      }
  }
  for (int64_t r = 0; r < count; ++r) {
    float total = w.total[r], inverse = total == 0 ? 0 : 1 / total, *sums = w.sums + r * c.width;
    for (int64_t k = 0; k < c.width; k += 16) store_f(sums + k, mul_f(load_f(sums + k), set_f(inverse)));
    int64_t to = batch * c.out_strides[0] + head * c.out_strides[1] + (begin + r) * c.out_strides[2];
    convert(sums, static_cast<char *>(c.out) + to * (c.type == RAREFY_F32 ? 4 : 2), c.type, c.width);
    c.lse[(batch * c.heads + head) * c.queries + begin + r] =
        total == 0 ? -INFINITY : (w.top[r] + std::log2(total)) * 0.693147181f;
  }
}

constexpr rarefy::BlocksKernels blocks_table = {PAIRS, floats, pack, attend};

}  // namespace RAREFY_NS
