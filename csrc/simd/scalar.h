// Sixteen lanes in plain C++, for every x86-64 processor. What each function means is told here; the other headers of
// this folder do the same with wider registers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace rarefy_scalar {

struct F { float v[16]; };     // 16 floats, one per row of a tile
struct I { int32_t v[16]; };   // 16 integers, or 64 bytes seen as 16 lanes
struct B { uint8_t v[64]; };   // 64 bytes: byte 4 * row + j is column j of a quad of columns
using Table = F;               // 16 floats to look up

#define LANES for (int i = 0; i < 16; ++i)
#define BYTES for (int i = 0; i < 64; ++i)

static inline F zero_f() { return F{}; }
static inline F set_f(float a) { F r; LANES r.v[i] = a; return r; }
static inline F load_f(const float *p) { F r; std::memcpy(&r, p, 64); return r; }
static inline void store_f(float *p, F a) { std::memcpy(p, &a, 64); }
static inline F add_f(F a, F b) { LANES a.v[i] += b.v[i]; return a; }
static inline F sub_f(F a, F b) { LANES a.v[i] -= b.v[i]; return a; }
static inline F mul_f(F a, F b) { LANES a.v[i] *= b.v[i]; return a; }
static inline F fma_f(F a, F b, F c) { LANES c.v[i] += a.v[i] * b.v[i]; return c; }
static inline F negative_f(F test, F yes, F no) { LANES no.v[i] = test.v[i] < 0 ? yes.v[i] : no.v[i]; return no; }
static inline F max_f(F a, F b) { LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline F abs_f(F a) { LANES a.v[i] = std::fabs(a.v[i]); return a; }
static inline float most_f(F a) { float s = a.v[0]; LANES s = a.v[i] > s ? a.v[i] : s; return s; }
static inline float sum_f(F a) { float s = 0; LANES s += a.v[i]; return s; }

static inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) bits = sign | ((rest << 13) + 0x38000000);
  else {
    float f = float(rest) * 5.9604644775390625e-8f;  // subnormal: rest * 2^-24
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline float bfloat_to_float(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// To the nearest half, ties to even.
static inline uint16_t to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);  // NaN
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the lowest bits
    float magnitude;
    std::memcpy(&magnitude, &rest, 4);
    magnitude += .5f;
    std::memcpy(&rest, &magnitude, 4);
    return uint16_t(sign | (rest - 0x3f000000));
  }
  return uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
static inline float one_half(uint16_t h) { return half_to_float(h); }
static inline F load_half(const uint16_t *p) { F r; LANES r.v[i] = half_to_float(p[i]); return r; }
static inline F load_bfloat(const uint16_t *p) { F r; LANES r.v[i] = bfloat_to_float(p[i]); return r; }
static inline F load_bytes_f(const uint8_t *p) { F r; LANES r.v[i] = p[i]; return r; }
// What lies at the places that the lower halves of 16 words name.
static inline F pick_f(const float *x, const int32_t *words) { F r; LANES r.v[i] = x[words[i] & 0xffff]; return r; }
// `a` in lanes whose limit is above `at`, elsewhere zero.
static inline F below_f(F a, I limit, int32_t at) { LANES if (at >= limit.v[i]) a.v[i] = 0; return a; }

static inline I zero_i() { return I{}; }
static inline I add_i(I a, I b) { LANES a.v[i] += b.v[i]; return a; }
static inline I round_i(F a) { I r; LANES r.v[i] = int32_t(__builtin_rintf(a.v[i])); return r; }
static inline void store_bytes(int8_t *p, I a) { LANES p[i] = int8_t(a.v[i]); }  // of small integers
// The 16-bit floats in the lower or upper halves of the lanes; the first wants the upper halves zero.
static inline F lower_half(I a) { F r; LANES r.v[i] = half_to_float(uint16_t(a.v[i])); return r; }
static inline F upper_half(I a) { F r; LANES r.v[i] = half_to_float(uint16_t(uint32_t(a.v[i]) >> 16)); return r; }
static inline F upper_bfloat(I a) { F r; LANES r.v[i] = bfloat_to_float(uint16_t(uint32_t(a.v[i]) >> 16)); return r; }
// The floats that have these bits.
static inline F float_of(I a) { F r; std::memcpy(&r, &a, 64); return r; }
static inline F to_f(I a) { F r; LANES r.v[i] = float(a.v[i]); return r; }
static inline I load_i(const void *p) { I r; std::memcpy(&r, p, 64); return r; }
static inline I load_words(const uint8_t *p) { I r; LANES r.v[i] = p[2 * i] | p[2 * i + 1] << 8; return r; }
static inline I load_bytes(const uint8_t *p) { I r; LANES r.v[i] = p[i]; return r; }
template <int N> static inline I shr_i(I a) { LANES a.v[i] = int32_t(uint32_t(a.v[i]) >> N); return a; }
template <int N> static inline I shl_i(I a) { LANES a.v[i] = int32_t(uint32_t(a.v[i]) << N); return a; }
static inline I raise_i(I a, I by) { LANES a.v[i] = int32_t(uint32_t(a.v[i]) << by.v[i]); return a; }
static inline I lower_i(I a, int by) { LANES a.v[i] >>= by; return a; }  // keeps the sign
static inline I min_i(I a, I b) { LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline I set_i(int32_t a) { I r; LANES r.v[i] = a; return r; }
static inline I and_i(I a, int32_t b) { LANES a.v[i] &= b; return a; }
static inline I or_i(I a, I b) { LANES a.v[i] |= b.v[i]; return a; }
static inline I as_lanes(B a) { I r; std::memcpy(&r, &a, 64); return r; }
static inline B as_bytes(I a) { B r; std::memcpy(&r, &a, 64); return r; }

static inline B load_b(const void *p) { B r; std::memcpy(&r, p, 64); return r; }
static inline void store_b(void *p, B a) { std::memcpy(p, &a, 64); }
static inline B set_b(uint8_t a) { B r; std::memset(&r, a, 64); return r; }
// The bytes of 16 rows, each four times.
static inline B spread_b(const uint8_t *p) { B r; BYTES r.v[i] = p[i / 4]; return r; }
static inline B or_b(B a, B b) { BYTES a.v[i] |= b.v[i]; return a; }
// (byte >> N) & mask, of bytes whose bits below N are wanted by nobody.
template <int N> static inline B field_b(B a, uint8_t mask) { BYTES a.v[i] = (a.v[i] >> N) & mask; return a; }
template <int N> static inline B raise_b(B a) { BYTES a.v[i] = uint8_t(a.v[i] << N); return a; }  // bits that leave a byte are wanted by nobody
// The bytes at `p`, in order, where the mask is set; elsewhere those of `other`. May read 64 bytes.
static inline B expand_b(const uint8_t *p, uint64_t mask, B other) {
  BYTES if (mask >> i & 1) other.v[i] = *p++;
  return other;
}
// The nibbles at `p` as 64 bytes. Reads 32 bytes, or one more when it starts with the high one.
static inline B nibbles_b(const uint8_t *p) { B r; BYTES r.v[i] = (p[i / 2] >> 4 * (i % 2)) & 15; return r; }
static inline F expand_f32(const float *p, uint32_t mask) { F r; LANES r.v[i] = mask >> i & 1 ? *p++ : 0; return r; }
static inline F expand_half(const uint16_t *p, uint32_t mask) {
  F r; LANES r.v[i] = mask >> i & 1 ? half_to_float(*p++) : 0; return r;
}
static inline F expand_bfloat(const uint16_t *p, uint32_t mask) {
  F r; LANES r.v[i] = mask >> i & 1 ? bfloat_to_float(*p++) : 0; return r;
}

// acc[row] += sum over j of u[4 * row + j] * x[j], with signed bytes x. Codes above 127 need WIDE.
template <bool WIDE> static inline I dot(I acc, B u, int32_t quad) {
  int8_t x[4];
  std::memcpy(x, &quad, 4);
  LANES acc.v[i] += u.v[4 * i] * x[0] + u.v[4 * i + 1] * x[1] + u.v[4 * i + 2] * x[2] + u.v[4 * i + 3] * x[3];
  return acc;
}
// Of a quad in all lanes.
template <bool WIDE> static inline I dot(I acc, B u, I quads) { return dot<WIDE>(acc, u, quads.v[0]); }
template <int J> static inline F byte_f(B a) { F r; LANES r.v[i] = a.v[4 * i + J]; return r; }

static inline B table_b(const uint8_t *p) { B r; BYTES r.v[i] = p[i % 16]; return r; }
static inline B lookup_b(B table, B codes) { BYTES codes.v[i] = table.v[codes.v[i]]; return codes; }
constexpr int accumulators = 4;  // sums that stay in registers
constexpr bool cheap_lookup = false;  // against converting a byte
static inline Table table_f(const float *p) { return load_f(p); }
// Only the lowest four bits of a lane count.
static inline F lookup_f(Table table, I at) { F r; LANES r.v[i] = table.v[at.v[i] & 15]; return r; }

static inline void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
static inline void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }  // not into the nearest cache

#undef LANES
#undef BYTES
}  // namespace rarefy_scalar
