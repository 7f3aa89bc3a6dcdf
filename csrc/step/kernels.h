// What a step does beside products of weights, for one instruction set; see step.h. Included once for each of them.
#pragma once
#include <cmath>

#include "../kernels/heads.h"
#include "table.h"

namespace RAREFY_NS {

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

template <int G>
static void attend_heads(const float *q, int64_t width, const void *keys, const void *values, int32_t type,
                         int64_t first, int64_t last, float scale, float softcap, float *scores, float *out) {
  int64_t count = last - first, padded = (count + 15) / 16 * 16;
  float inverse[G];
  score<G>(q, width, keys, type, first, count, scale, scores, padded);
  for (int g = 0; g < G; ++g) {
    float *row = scores + g * padded, top;
    if (softcap > 0) cap(row, count, softcap);
    inverse[g] = 1.f / soften(row, count, top);
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
