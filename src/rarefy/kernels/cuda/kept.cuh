// What masked.cu and groups.cu share: a weight of which a bitmap says what is kept, and its numbers.
//
// Macros: TOKENS, WARPS, X_HALF (float16 activations, else bfloat16); HALF likewise where tensor cores multiply, else 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

enum { NONE = 0, F32 = 1, F16 = 2, BF16 = 3, U8 = 4 };

struct Arguments {
  const void* codes;    // of all rows, a bit stream; or [chunks][4][16 bytes], see groups.cu
  const void* scale;    // [rows][groups], or [chunks][groups of a chunk]
  const void* zero;     // likewise
  const u32* bitmap;    // [rows][words]
  const void* places;   // [chunks][8] bytes, see groups.cu
  const u16* bases;     // [chunks], or null
  const void* row_ptr;  // [rows + 1], where a row's codes start (i64), or its chunks (u32; null: `groups` of each row)
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

// A number as it is stored, and what that means: who loads ahead turns it into a number only where it is used.
template <int TYPE> device u32 raw(const void* base, i64 index) {
  if constexpr (TYPE == F32) return static_cast<const u32*>(base)[index];
  else if constexpr (TYPE == F16 || TYPE == BF16) return static_cast<const u16*>(base)[index];
  else if constexpr (TYPE == U8) return static_cast<const u8*>(base)[index];
  else return 0;
}
template <int TYPE> device float meant(u32 bits) {
  if constexpr (TYPE == F32) return as_float(bits);
  else if constexpr (TYPE == F16) return half_value(u16(bits));
  else if constexpr (TYPE == BF16) return as_float(bits << 16);
  else if constexpr (TYPE == U8) return float(bits);
  else return 0.0f;
}
template <int TYPE> device float number(const void* base, i64 index) { return meant<TYPE>(raw<TYPE>(base, index)); }

// The sum over this lane and those before.
device u32 sum_until(u32 value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 other = of_lane(value, lane < distance ? lane : lane - distance);
    value += lane < distance ? 0 : other;
  }
  return value;
}
device float activation(u16 bits) { return X_HALF ? half_value(bits) : as_float(u32(bits) << 16); }
