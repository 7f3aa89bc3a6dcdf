// Keys without their rotary position embedding, with the bits that kv/rotary.py gives: no product is fused with a sum.
//
// A thread has eight channels of a token of a head: four and those that they turn with, or eight that do not turn.
//
// Macros: D, WIDTH (channels that turn, the first ones), X, ANGLE (types of keys and of angles); HALF is 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

enum { F32 = 1, F16 = 2, BF16 = 3 };

struct Arguments {
  const void* x;    // [batch][heads][tokens][D], with strides
  const void* cos;  // [batch or 1][tokens][WIDTH], with a stride
  const void* sin;
  float* out;       // [batch][heads][tokens][D]
  i64 batch_stride, head_stride, token_stride, angle_stride;
  int tokens, heads;
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

constexpr int THREADS = 256, UNITS = D / 8, TURNED = WIDTH / 8;  // threads of a token

template <int TYPE> device float number_of(u32 bits) {
  return TYPE == F16 ? half_value(u16(bits)) : as_float(bits << 16);
}
// Four numbers that follow each other.
template <int TYPE> device void load_four(float (&x)[4], const void* base, i64 first) {
  if constexpr (TYPE == F32) {
    const uint4 all = load_once(static_cast<const uint4*>(base) + first / 4, true);
    x[0] = as_float(all.x), x[1] = as_float(all.y), x[2] = as_float(all.z), x[3] = as_float(all.w);
  } else {
    const uint2 all = load_once(static_cast<const uint2*>(base) + first / 4);
    x[0] = number_of<TYPE>(all.x), x[1] = number_of<TYPE>(all.x >> 16);
    x[2] = number_of<TYPE>(all.y), x[3] = number_of<TYPE>(all.y >> 16);
  }
}
device void store_four(float* to, const float (&x)[4]) {
  *reinterpret_cast<uint4*>(to) = {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
}

extern "C" global __launch_bounds__(THREADS) void rarefy_unrotate(const Arguments a) {
  const int number = blockIdx.x * THREADS + threadIdx.x, unit = number % UNITS, token = number / UNITS;
  const int head = blockIdx.y % a.heads, batch = blockIdx.y / a.heads;
  if (token >= a.tokens) return;
  const bool turned = unit < TURNED;
  const int low = turned ? 4 * unit : 8 * unit, high = low + (turned ? WIDTH / 2 : 4);
  const i64 from = batch * a.batch_stride + head * a.head_stride + token * a.token_stride;
  float x[4], y[4];
  load_four<X>(x, a.x, from + low), load_four<X>(y, a.x, from + high);
  if (turned) {
    float angles[2][2][4];  // of both, cosines and sines
    const i64 own = batch * a.angle_stride + i64(token) * WIDTH;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      load_four<ANGLE>(angles[part][0], a.cos, own + (part ? high : low));
      load_four<ANGLE>(angles[part][1], a.sin, own + (part ? high : low));
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float one = x[n], two = y[n];
      const auto back = [](float along, float across, float cosine, float sine) {
        return (along * cosine - across * sine) / (cosine * cosine + sine * sine);
      };
      x[n] = back(one, -two, angles[0][0][n], angles[0][1][n]);
      y[n] = back(two, one, angles[1][0][n], angles[1][1][n]);
    }
  }
  float* to = a.out + (i64(blockIdx.y) * a.tokens + token) * D;
  store_four(to + low, x), store_four(to + high, y);
}
