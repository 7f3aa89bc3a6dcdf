// Y[token][row] for a weight of which a bitmap says what is kept, codes or 16-bit values; a few tokens.
//
// A warp takes a row, a lane one column of every 32: the bits before its own are how many kept weights lie before its
// own. So memory is read in the order in which it lies, and activations wait in shared memory.
//
// Macros: BITS (1, 2, 4, 8: codes; 16: values), VALUES (their type), GROUP (columns of a scale; 0: the whole row),
// SCALE, ZERO (types), CENTER, TOKENS, WARPS, X_HALF (float16 activations, else bfloat16); HALF is 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

enum { NONE = 0, F32 = 1, F16 = 2, BF16 = 3, U8 = 4 };

struct Arguments {
  const void* codes;    // of all rows, a bit stream
  const void* scale;    // [rows][groups]
  const void* zero;     // likewise
  const u32* bitmap;    // [rows][words]
  const i64* row_ptr;   // [rows + 1], where a row's codes start
  const u16* x;         // [tokens][stride]
  u16* y;               // [tokens][rows]
  int rows, columns, words, tokens, stride, groups;
  float multiplier;
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

shared_memory(pool);

constexpr int THREADS = 32 * WARPS;
constexpr int AHEAD = 8;  // words whose weights are loaded before the first is used

template <int TYPE> device float number(const void* base, i64 index) {
  if constexpr (TYPE == F32) return static_cast<const float*>(base)[index];
  else if constexpr (TYPE == F16) return half_value(static_cast<const u16*>(base)[index]);
  else if constexpr (TYPE == BF16) return as_float(u32(static_cast<const u16*>(base)[index]) << 16);
  else if constexpr (TYPE == U8) return float(static_cast<const u8*>(base)[index]);
  else return 0.0f;
}

// A kept weight as it is stored.
device float stored(const Arguments& a, i64 at) {
  if constexpr (BITS == 16) return number<VALUES>(a.codes, at);
  else return float(static_cast<const u8*>(a.codes)[at * BITS / 8] >> at * BITS % 8 & ((1 << BITS) - 1));
}

extern "C" global __launch_bounds__(THREADS) void rarefy_masked(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 below = (1u << lane) - 1;
  u16* tokens = reinterpret_cast<u16*>(pool);  // [TOKENS][32 * words]
  start_later_kernels();
  wait_for_earlier_kernels();
  for (int n = threadIdx.x; n < TOKENS * 32 * a.words; n += THREADS) {
    const int token = n / (32 * a.words), column = n % (32 * a.words);
    tokens[n] = token < a.tokens && column < a.columns ? a.x[i64(token) * a.stride + column] : u16(0);
  }
  block_barrier();
  for (int row = blockIdx.x * WARPS + warp; row < a.rows; row += gridDim.x * WARPS) {
    const u32* bitmap = a.bitmap + i64(row) * a.words;
    i64 start = a.row_ptr[row];
    float sums[TOKENS] = {};
    for (int base = 0; base < a.words; base += AHEAD) {
      const u32 own = lane < AHEAD && base + lane < a.words ? bitmap[base + lane] : 0;
      u32 masks[AHEAD];
      float weights[AHEAD];
#pragma unroll
      for (int n = 0; n < AHEAD; ++n) {
        masks[n] = of_lane(own, n);
        weights[n] = masks[n] >> lane & 1 ? stored(a, start + ones_of(masks[n] & below)) : 0.0f;
        start += ones_of(masks[n]);
      }
#pragma unroll
      for (int n = 0; n < AHEAD; ++n) {
        if (!(masks[n] >> lane & 1)) continue;
        const int column = 32 * (base + n) + lane;
        float weight = weights[n];
        if constexpr (SCALE != NONE) {
          const i64 place = i64(row) * a.groups + (GROUP ? column / (GROUP ? GROUP : 1) : 0);
          weight = (weight - (ZERO == NONE ? float(CENTER) : number<ZERO>(a.zero, place))) * number<SCALE>(a.scale, place);
        }
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
          const u16 bits = tokens[token * 32 * a.words + column];
          sums[token] += weight * (X_HALF ? half_value(bits) : as_float(u32(bits) << 16));
        }
      }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      const float sum = sum_of_warp(sums[token]) * a.multiplier;
      if (lane == 0 && token < a.tokens) a.y[i64(token) * a.rows + row] = rounded<X_HALF>(sum);
    }
  }
}
