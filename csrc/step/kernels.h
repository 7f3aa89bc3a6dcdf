// What a step does beside products of weights, for one instruction set; see step.h. Included once for each of them.
#pragma once
#include <cmath>

#include "table.h"

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

// e^x in 16 lanes, to a few units in the last place; 0 below -87. With n = round(x / ln 2), r = x - n ln 2 and
// e^r = 1 + r + r^2 p(r), where p is least in relative error on |r| <= ln 2 / 2 (3e-9).
static inline void exp_lanes(float *x) {
  for (int i = 0; i < 16; ++i) {
    float a = x[i] < 88.f ? x[i] : 88.f;
    float keep = a < -87.f ? 0.f : 1.f;
    a = a < -87.f ? -87.f : a;
    float n = __builtin_rintf(a * 1.44269504f);
    float r = (a - n * 0.693145751953125f) - n * 1.4286068202862268e-6f;
    float p = 1.381453999e-3f;
    p = p * r + 8.368745116e-3f;
    p = p * r + 4.166839079e-2f;
    p = p * r + 1.666652040e-1f;
    p = p * r + 4.999999343e-1f;
    p = p * r * r + r + 1.f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    x[i] = p * power * keep;
  }
}

static void embed(const void *table, int32_t type, int64_t row, int64_t width, float scale, float *out) {
  int64_t at = row * width, k = 0;
  for (; k + 16 <= width; k += 16) store_f(out + k, mul_f(load_as(table, type, at + k), set_f(scale)));
  for (; k < width; ++k) out[k] = load_one_as(table, type, at + k) * scale;
}

static void norm(const float *x, const float *weight, int64_t width, int64_t heads, float eps, float *out) {
  for (int64_t h = 0; h < heads; ++h, x += width, out += width) {
    F sums[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
    int64_t k = 0;
    for (; k + 64 <= width; k += 64)
      for (int i = 0; i < 4; ++i) {
        F a = load_f(x + k + 16 * i);
        sums[i] = fma_f(a, a, sums[i]);
      }
    for (; k + 16 <= width; k += 16) {
      F a = load_f(x + k);
      sums[0] = fma_f(a, a, sums[0]);
    }
    float sum = sum_f(add_f(add_f(sums[0], sums[1]), add_f(sums[2], sums[3])));
    for (int64_t j = k; j < width; ++j) sum += x[j] * x[j];
    float factor = 1.f / std::sqrt(sum / float(width) + eps);
    for (k = 0; k + 16 <= width; k += 16)
      store_f(out + k, mul_f(mul_f(load_f(x + k), set_f(factor)), load_f(weight + k)));
    for (; k < width; ++k) out[k] = x[k] * factor * weight[k];
  }
}

static void rotate(float *x, int64_t width, int64_t heads, const float *cosine, const float *sine) {
  int64_t half = width / 2;
  for (int64_t h = 0; h < heads; ++h, x += width)
    for (int64_t k = 0; k < half; ++k) {
      float low = x[k], high = x[k + half];
      x[k] = low * cosine[k] - high * sine[k];
      x[k + half] = high * cosine[k] + low * sine[k];
    }
}

static void gate(const float *x, const float *y, int64_t width, int32_t activation, float *out) {
  alignas(64) float t[16];
  for (int64_t k = 0; k < width; k += 16) {  // buffers are padded to 16
    if (activation == RAREFY_SILU) {
      for (int i = 0; i < 16; ++i) t[i] = -x[k + i];
      exp_lanes(t);
      for (int i = 0; i < 16; ++i) out[k + i] = x[k + i] / (1.f + t[i]) * y[k + i];
    } else if (activation == RAREFY_GELU_TANH) {
      // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
      for (int i = 0; i < 16; ++i) t[i] = -1.5957691216f * (x[k + i] + 0.044715f * x[k + i] * x[k + i] * x[k + i]);
      exp_lanes(t);
      for (int i = 0; i < 16; ++i) out[k + i] = x[k + i] / (1.f + t[i]) * y[k + i];
    } else if (activation == RAREFY_GELU) {
      for (int i = 0; i < 16; ++i)
        out[k + i] = 0.5f * x[k + i] * (1.f + std::erf(x[k + i] * 0.70710678f)) * y[k + i];
    } else {
      for (int i = 0; i < 16; ++i) out[k + i] = (x[k + i] > 0 ? x[k + i] : 0) * y[k + i];
    }
  }
}

static void add(float *x, const float *y, int64_t width) {
  for (int64_t k = 0; k < width; k += 16) store_f(x + k, add_f(load_f(x + k), load_f(y + k)));
}

static void cap(float *x, int64_t width, float top) {
  for (int64_t k = 0; k < width; ++k) x[k] = top * std::tanh(x[k] / top);
}

// y[token, row] for `rows` rows of a dense weight from `weight` on, and all tokens. M tokens and N rows at a time.
template <int M, int N>
static inline void dense_block(const void *weight, int32_t type, int64_t columns, const float *x, int64_t x_stride,
                               float *y, int64_t y_stride, int64_t row) {
  F sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = zero_f();
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) {
    F a[M];
    for (int m = 0; m < M; ++m) a[m] = load_f(x + m * x_stride + k);
    for (int n = 0; n < N; ++n) {
      F w = load_as(weight, type, (row + n) * columns + k);
      for (int m = 0; m < M; ++m) sums[m][n] = fma_f(a[m], w, sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float sum = sum_f(sums[m][n]);
      for (int64_t j = k; j < columns; ++j)
        sum += x[m * x_stride + j] * load_one_as(weight, type, (row + n) * columns + j);
      y[m * y_stride + row + n] = sum;
    }
}

template <int M>
static inline void dense_rows_of(const void *weight, int32_t type, int64_t columns, const float *x, int64_t x_stride,
                                 float *y, int64_t y_stride, int64_t first, int64_t last) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) dense_block<M, 4>(weight, type, columns, x, x_stride, y, y_stride, row);
  for (; row < last; ++row) dense_block<M, 1>(weight, type, columns, x, x_stride, y, y_stride, row);
}

static void dense(const void *weight, int32_t type, int64_t columns, const float *x, int64_t x_stride, float *y,
                  int64_t y_stride, int64_t first, int64_t last, int64_t tokens) {
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4)
    dense_rows_of<4>(weight, type, columns, x + m * x_stride, x_stride, y + m * y_stride, y_stride, first, last);
  for (; m < tokens; ++m)
    dense_rows_of<1>(weight, type, columns, x + m * x_stride, x_stride, y + m * y_stride, y_stride, first, last);
}

// One head's keys or values of a token into the cache.
static void store(const float *x, void *row, int32_t type, int64_t width) {
  if (type == RAREFY_F32) {
    __builtin_memcpy(row, x, size_t(width) * 4);
    return;
  }
  uint16_t *to = static_cast<uint16_t *>(row);
  for (int64_t k = 0; k < width; ++k) to[k] = rarefy_scalar::to_half(x[k]);
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

template <int G>
static void attend_heads(const float *q, int64_t width, const void *keys, const void *values, int32_t type,
                         int64_t first, int64_t last, float scale, float softcap, float *scores, float *out) {
  int64_t count = last - first, padded = (count + 15) / 16 * 16;
  float inverse[G];
  score<G>(q, width, keys, type, first, count, scale, scores, padded);
  for (int g = 0; g < G; ++g) {
    float *row = scores + g * padded, top = -INFINITY, total = 0;
    if (softcap > 0) cap(row, count, softcap);
    for (int64_t t = 0; t < count; ++t) top = row[t] > top ? row[t] : top;
    for (int64_t t = count; t < padded; ++t) row[t] = -INFINITY;
    for (int64_t t = 0; t < padded; t += 16) {
      for (int i = 0; i < 16; ++i) row[t + i] -= top;
      exp_lanes(row + t);
    }
    for (int64_t t = 0; t < count; ++t) total += row[t];
    inverse[g] = 1.f / total;
  }
  int64_t k = 0;
  for (; k + 64 <= width; k += 64) mix<G, 4>(scores, padded, inverse, values, type, first, count, width, k, out);
  for (; k < width; k += 16) mix<G, 1>(scores, padded, inverse, values, type, first, count, width, k, out);
}

// Attention of `group` query heads that share keys and values: rows [first, last) of both, `width` wide (a multiple of
// 16). `scores`: [group, padded] memory, padded being last - first rounded up to 16.
static void attend(const float *q, int64_t group, int64_t width, const void *keys, const void *values, int32_t type,
                   int64_t first, int64_t last, float scale, float softcap, float *scores, float *out) {
  while (group > 0) {
    auto heads = group >= 4   ? attend_heads<4>
                 : group == 3 ? attend_heads<3>
                 : group == 2 ? attend_heads<2>
                              : attend_heads<1>;
    int64_t taken = group >= 4 ? 4 : group;
    heads(q, width, keys, values, type, first, last, scale, softcap, scores, out);
    group -= taken, q += taken * width, out += taken * width;
  }
}

static constexpr rarefy::StepKernels step_table = {embed, norm, rotate, gate, add, cap, dense, store, attend};

}  // namespace RAREFY_NS
