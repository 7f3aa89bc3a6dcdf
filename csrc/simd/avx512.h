// Sixteen lanes in one 512-bit register: AVX-512 F, BW, DQ, VL, VNNI, VBMI and VBMI2. Meanings: scalar.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace rarefy_avx512 {

using F = __m512;
struct I { __m512i v; };
struct B { __m512i v; };
using Table = __m512;

static inline F zero_f() { return _mm512_setzero_ps(); }
static inline F set_f(float a) { return _mm512_set1_ps(a); }
static inline F load_f(const float *p) { return _mm512_loadu_ps(p); }
static inline void store_f(float *p, F a) { _mm512_storeu_ps(p, a); }
static inline F add_f(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub_f(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul_f(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F fma_f(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F negative_f(F test, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_LT_OQ), no, yes);
}
static inline F max_f(F a, F b) { return _mm512_max_ps(a, b); }
static inline F abs_f(F a) { return _mm512_abs_ps(a); }
static inline float most_f(F a) { return _mm512_reduce_max_ps(a); }
static inline float sum_f(F a) { return _mm512_reduce_add_ps(a); }
static inline __m512 widen_bfloat(__m256i a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
static inline float one_half(uint16_t h) { return _cvtsh_ss(h); }
static inline F load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline F load_bfloat(const uint16_t *p) { return widen_bfloat(_mm256_loadu_si256((const __m256i *)p)); }
static inline F load_bytes_f(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline __m128i four_at(const float *x, const int32_t *words) {
  uint32_t v[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(v + i, x + (words[i] & 0xffff), 4);
  return _mm_set_epi64x(int64_t(v[2] | uint64_t(v[3]) << 32), int64_t(v[0] | uint64_t(v[1]) << 32));
}
static inline F pick_f(const float *x, const int32_t *words) {  // faster than to gather
  __m256i low = _mm256_set_m128i(four_at(x, words + 4), four_at(x, words));
  __m256i high = _mm256_set_m128i(four_at(x, words + 12), four_at(x, words + 8));
  return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

static inline I zero_i() { return {_mm512_setzero_si512()}; }
static inline I add_i(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I round_i(F a) { return {_mm512_cvtps_epi32(a)}; }
static inline void store_bytes(int8_t *p, I a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a.v)); }
static inline F upper_half(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16))); }
static inline F upper_bfloat(I a) {
  return _mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(int(0xffff0000))));
}
static inline F lower_half(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v)); }
static inline F float_of(I a) { return _mm512_castsi512_ps(a.v); }
static inline F to_f(I a) { return _mm512_cvtepi32_ps(a.v); }
static inline I load_i(const void *p) { return {_mm512_loadu_si512(p)}; }
static inline I load_words(const uint8_t *p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p))};
}
static inline I load_bytes(const uint8_t *p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))}; }
static inline F below_f(F a, I limit, int32_t at) {
  return _mm512_maskz_mov_ps(_mm512_cmpgt_epi32_mask(limit.v, _mm512_set1_epi32(at)), a);
}
template <int N> static inline I shr_i(I a) { return {_mm512_srli_epi32(a.v, N)}; }
template <int N> static inline I shl_i(I a) { return {_mm512_slli_epi32(a.v, N)}; }
static inline I raise_i(I a, I by) { return {_mm512_sllv_epi32(a.v, by.v)}; }
static inline I lower_i(I a, int by) { return {_mm512_srai_epi32(a.v, by)}; }
static inline I min_i(I a, I b) { return {_mm512_min_epi32(a.v, b.v)}; }
static inline I set_i(int32_t a) { return {_mm512_set1_epi32(a)}; }
static inline I and_i(I a, int32_t b) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(b))}; }
static inline I or_i(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
static inline I as_lanes(B a) { return {a.v}; }
static inline B as_bytes(I a) { return {a.v}; }

// Once: compilers would rather read memory again for every use, and loads are what there is least of.
static inline B load_b(const void *p) {
  __m512i a = _mm512_loadu_si512(p);
  asm("" : "+v"(a));
  return {a};
}
static inline void store_b(void *p, B a) { _mm512_storeu_si512(p, a.v); }
static inline B set_b(uint8_t a) { return {_mm512_set1_epi8(char(a))}; }
static inline B spread_b(const uint8_t *p) {
  __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
  return {_mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101))};
}
static inline B or_b(B a, B b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> static inline B field_b(B a, uint8_t mask) {
  __m512i moved = N ? _mm512_srli_epi16(a.v, N) : a.v;
  return {_mm512_and_si512(moved, _mm512_set1_epi8(char(mask)))};
}
template <int N> static inline B raise_b(B a) { return {_mm512_slli_epi16(a.v, N)}; }
static inline B expand_b(const uint8_t *p, uint64_t mask, B other) {
  return {_mm512_mask_expand_epi8(other.v, mask, _mm512_loadu_si512(p))};
}
static inline B nibbles_b(const uint8_t *p) {
  __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
  wide = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
  return {_mm512_and_si512(wide, _mm512_set1_epi8(15))};
}
static inline F expand_f32(const float *p, uint32_t mask) {
  return _mm512_maskz_expand_ps(__mmask16(mask), _mm512_loadu_ps(p));
}
static inline F expand_half(const uint16_t *p, uint32_t mask) {
  return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(__mmask16(mask), _mm256_loadu_si256((const __m256i *)p)));
}
static inline F expand_bfloat(const uint16_t *p, uint32_t mask) {
  return widen_bfloat(_mm256_maskz_expand_epi16(__mmask16(mask), _mm256_loadu_si256((const __m256i *)p)));
}

template <bool WIDE> static inline I dot(I acc, B u, int32_t quad) {
  return {_mm512_dpbusd_epi32(acc.v, u.v, _mm512_set1_epi32(quad))};
}
// Of a quad in all lanes; in place, which compilers undo with a copy of every sum.
template <bool WIDE> static inline I dot(I acc, B u, I quads) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(quads.v));
  return acc;
}
template <int J> static inline F byte_f(B a) {
  __m512i lane = J ? _mm512_srli_epi32(a.v, 8 * J) : a.v;
  if (J < 3) lane = _mm512_and_si512(lane, _mm512_set1_epi32(255));
  return _mm512_cvtepi32_ps(lane);
}

static inline B table_b(const uint8_t *p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p))};
}
static inline B lookup_b(B table, B codes) { return {_mm512_shuffle_epi8(table.v, codes.v)}; }
constexpr int accumulators = 16;  // sums that stay in registers
constexpr bool cheap_lookup = true;
static inline Table table_f(const float *p) { return _mm512_loadu_ps(p); }
static inline F lookup_f(Table table, I at) { return _mm512_permutexvar_ps(at.v, table); }

static inline void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
static inline void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

}  // namespace rarefy_avx512
