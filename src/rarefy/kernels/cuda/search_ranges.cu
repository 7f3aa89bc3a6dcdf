// For each group of even steps the factor on its range with the least sum of importance * |error| ** norm.
//
// A warp has a group of a row. Macros: HALF is 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

enum { F32 = 1, F16 = 2, BF16 = 3 };     // types of scales and of real zeros
enum { MIDDLE = 0, WHOLE = 1, REAL = 2 };  // zeros: at the middle code, at a stored code, anywhere

constexpr int MOST = 128;  // factors

struct Arguments {
  const float* weight;      // [rows][columns]
  const float* importance;  // likewise, null: all count alike
  float* found;             // [rows][groups]
  i64 rows, columns, group_size;
  int factors, levels, zero, type;
  float finest, norm;
  float factor[MOST], step[MOST];  // step: factor * 2 / (levels - 1)
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int HELD = 8;  // weights of a lane in registers: groups of up to 256

device float other(float value, int distance) { return as_float(of_lane(bits_of(value), (threadIdx.x % 32) ^ distance)); }
device float stored(float value, int type) {
  return type == F16 ? half_value(rounded<true>(value)) : type == BF16 ? as_float(u32(rounded<false>(value)) << 16) : value;
}

extern "C" global void __launch_bounds__(THREADS) rarefy_search_ranges(const Arguments a) {
  const int lane = threadIdx.x % 32;
  const i64 groups = (a.columns + a.group_size - 1) / a.group_size, group = blockIdx.x;
  const i64 row = i64(blockIdx.y) * WARPS + threadIdx.x / 32, line = row < a.rows ? row : a.rows - 1;
  const i64 first = group * a.group_size;
  const i64 size = a.columns - first < a.group_size ? a.columns - first : a.group_size;
  const float* const weight = a.weight + line * a.columns + first;
  const float* const importance = a.importance ? a.importance + line * a.columns + first : nullptr;
  float values[HELD], counts[HELD], low = weight[0], high = weight[0], mass = 0.0f;
#pragma unroll
  for (int n = 0; n < HELD; ++n) {
    const i64 column = 32 * n + lane;
    const bool real = column < size;
    values[n] = real ? weight[column] : weight[0];
    counts[n] = !real ? 0.0f : importance ? importance[column] : 1.0f;
    low = fminf(low, values[n]), high = fmaxf(high, values[n]), mass += counts[n];
  }
  for (i64 column = 32 * HELD + lane; column < size; column += 32) {
    low = fminf(low, weight[column]), high = fmaxf(high, weight[column]);
    mass += importance ? importance[column] : 1.0f;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    low = fminf(low, other(low, distance)), high = fmaxf(high, other(high, distance));
    mass += other(mass, distance);
  }
  const bool alike = mass == 0.0f;
  const bool constant = low == high && low != 0.0f;
  const float middle = float(a.levels / 2), last = float(a.levels - 1);
  float least = 0.0f, best = 0.0f;
  for (int tried = 0; tried < a.factors; ++tried) {
    float scale, zero = middle;
    if (a.zero == MIDDLE) {
      scale = constant ? fabsf(high) : fmaxf(fabsf(low), fabsf(high)) * a.step[tried];
    } else {
      const float bottom = (a.zero == WHOLE ? fminf(low, 0.0f) : low) * a.factor[tried];
      const float top = (a.zero == WHOLE ? fmaxf(high, 0.0f) : high) * a.factor[tried];
      scale = fmaxf((top - bottom) / last, fmaxf(fabsf(bottom), fabsf(top)) * a.finest);
      zero = scale == 0.0f ? middle : -bottom / scale;
      if (constant) scale = fmaxf(fabsf(low), fabsf(high)), zero = high < 0.0f ? 1.0f : 0.0f;
      zero = a.zero == WHOLE ? fminf(fmaxf(rintf(zero), 0.0f), last) : stored(zero, a.type);
    }
    scale = stored(scale, a.type);
    float error = 0.0f;
    const auto add = [&](float value, float count) {
      const float steps = scale == 0.0f ? 0.0f : value / scale;
      const float code = fminf(fmaxf(rintf(steps + zero), 0.0f), last);
      error += powf(fabsf(value - (code - zero) * scale), a.norm) * count;
    };
#pragma unroll
    for (int n = 0; n < HELD; ++n)
      if (32 * n + lane < size) add(values[n], alike ? 1.0f : counts[n]);
    for (i64 column = 32 * HELD + lane; column < size; column += 32)
      add(weight[column], alike || !importance ? 1.0f : importance[column]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) error += other(error, distance);
    if (tried == 0 || error < least) least = error, best = a.factor[tried];
  }
  if (lane == 0 && row < a.rows) a.found[row * groups + group] = best;
}
