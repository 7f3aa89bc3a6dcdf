// Attention heads over numbers of any float type, for one instruction set: scores, weights and mixed values.
#pragma once
#include <cmath>

#include "../internal.h"

namespace RAREFY_NS {

// Sixteen floats of `type` from element `at`.
static inline F load_as(const void *data, int32_t type, int64_t at) {
  switch (type) {
    case RAREFY_F16: return load_half(static_cast<const uint16_t *>(data) + at);
    case RAREFY_BF16: return load_bfloat(static_cast<const uint16_t *>(data) + at);
    default: return load_f(static_cast<const float *>(data) + at);
  }
}

static inline float load_one_as(const void *data, int32_t type, int64_t at) {
  switch (type) {
    case RAREFY_F16: return rarefy_scalar::half_to_float(static_cast<const uint16_t *>(data)[at]);
    case RAREFY_BF16: return rarefy_scalar::bfloat_to_float(static_cast<const uint16_t *>(data)[at]);
    default: return static_cast<const float *>(data)[at];
  }
}

// e^x to a few units in the last place; 0 below -87, and e^88 above. With n = round(x / ln 2), r = x - n ln 2 and
// e^r = 1 + r + r^2 p(r), where p is least in relative error on |r| <= ln 2 / 2 (3e-9). NaN stays NaN, being the second
// operand of each maximum.
static inline F exp_f(F x) {
  F top = sub_f(zero_f(), max_f(set_f(-88.f), sub_f(zero_f(), x))), a = max_f(set_f(-87.f), top);
  I n = round_i(mul_f(a, set_f(1.44269504f)));
  F whole = to_f(n), r = fma_f(whole, set_f(-0.693145751953125f), a);
  r = fma_f(whole, set_f(-1.4286068202862268e-6f), r);
  F p = fma_f(set_f(1.381453999e-3f), r, set_f(8.368745116e-3f));
  p = fma_f(p, r, set_f(4.166839079e-2f));
  p = fma_f(p, r, set_f(1.666652040e-1f));
  p = fma_f(p, r, set_f(4.999999343e-1f));
  p = fma_f(mul_f(p, r), r, add_f(r, set_f(1.f)));
  F power = upper_bfloat(shl_i<23>(add_i(n, set_i(127))));  // 2^n by its bits
  return mul_f(p, negative_f(add_f(x, set_f(87.f)), zero_f(), power));
}

static inline void exp_lanes(float *x) { store_f(x, exp_f(load_f(x))); }

// Scores become weights e^(score - top), in place; `row` holds 16 numbers for each 16 of `count` begun, of which those
// beyond become 0. The largest score goes to `top` (0 where all are -infinity), the sum of weights is returned.
static inline float soften(float *row, int64_t count, float &top) {
  int64_t padded = (count + 15) / 16 * 16;
  for (int64_t t = count; t < padded; ++t) row[t] = -INFINITY;
  F most = set_f(-INFINITY);
  for (int64_t t = 0; t < padded; t += 16) most = max_f(most, load_f(row + t));
  top = most_f(most);
  float from = top == -INFINITY ? 0.f : top;
  top = from;
  F total = zero_f();
  for (int64_t t = 0; t < padded; t += 16) {
    for (int i = 0; i < 16; ++i) row[t + i] -= from;
    exp_lanes(row + t);
    total = add_f(total, load_f(row + t));
  }
  return sum_f(total);
}

// Scores of G query heads against keys [0, count): `scores` [G, padded].
template <int G>
static void score(const float *q, int64_t width, const void *keys, int32_t type, int64_t first, int64_t count,
                  float scale, float *scores, int64_t padded) {
  for (int64_t t = 0; t < count; ++t) {
    F sums[G];
    for (int g = 0; g < G; ++g) sums[g] = zero_f();
    for (int64_t k = 0; k < width; k += 16) {
      F key = load_as(keys, type, (first + t) * width + k);
      for (int g = 0; g < G; ++g) sums[g] = fma_f(load_f(q + g * width + k), key, sums[g]);
    }
    for (int g = 0; g < G; ++g) scores[g * padded + t] = sum_f(sums[g]) * scale;
  }
}

// Columns [k, k + 16 * N) of the values, mixed by G rows of weights.
template <int G, int N>
static void mix(const float *weights, int64_t padded, const float *inverse, const void *values, int32_t type,
                int64_t first, int64_t count, int64_t width, int64_t k, float *out) {
  F sums[G][N];
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) sums[g][n] = zero_f();
  for (int64_t t = 0; t < count; ++t) {
    F value[N];
    for (int n = 0; n < N; ++n) value[n] = load_as(values, type, (first + t) * width + k + 16 * n);
    for (int g = 0; g < G; ++g) {
      F weight = set_f(weights[g * padded + t]);
      for (int n = 0; n < N; ++n) sums[g][n] = fma_f(weight, value[n], sums[g][n]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) store_f(out + g * width + k + 16 * n, mul_f(sums[g][n], set_f(inverse[g])));
}

}  // namespace RAREFY_NS
