// Sixteen lanes in two 256-bit registers: AVX2, FMA, F16C. Meanings: scalar.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace rarefy_avx2 {

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };
using Table = F;

static inline F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F set_f(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
static inline F load_f(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store_f(float *p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline F add_f(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F sub_f(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F mul_f(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F fma_f(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F negative_f(F test, F yes, F no) {
  __m256 zero = _mm256_setzero_ps();
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(test.a, zero, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(test.b, zero, _CMP_LT_OQ))};
}
static inline F max_f(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F abs_f(F x) {
  __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline float most_f(F x) {
  __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
static inline float sum_f(F x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
static inline float one_half(uint16_t h) { return _cvtsh_ss(h); }
static inline F load_half(const uint16_t *p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
static inline I load_words(const uint8_t *p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
template <int N> static inline I shl_i(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> static inline I shr_i(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
static inline F load_bfloat(const uint16_t *p) {
  I x = shl_i<16>(load_words((const uint8_t *)p));
  return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
static inline I load_bytes(const uint8_t *p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
static inline F float_of(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
static inline F to_f(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I round_i(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline void store_bytes(int8_t *p, I x) {
  __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
static inline F lower_half(I x) {
  __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(w)), _mm256_cvtph_ps(_mm256_extracti128_si256(w, 1))};
}
static inline F upper_half(I x) { return lower_half(shr_i<16>(x)); }
static inline F upper_bfloat(I x) {
  __m256i high = _mm256_set1_epi32(int(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)), _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
static inline F load_bytes_f(const uint8_t *p) { return to_f(load_bytes(p)); }
static inline __m256 eight_at(const float *x, const int32_t *words) {  // faster than to gather
  uint32_t v[8];
  for (int i = 0; i < 8; ++i) std::memcpy(v + i, x + (words[i] & 0xffff), 4);
  auto two = [&](int i) { return int64_t(v[i] | uint64_t(v[i + 1]) << 32); };
  return _mm256_castsi256_ps(_mm256_set_epi64x(two(6), two(4), two(2), two(0)));
}
static inline F pick_f(const float *x, const int32_t *words) { return {eight_at(x, words), eight_at(x, words + 8)}; }
static inline F below_f(F x, I limit, int32_t at) {
  __m256i place = _mm256_set1_epi32(at);
  return {_mm256_and_ps(x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit.a, place))),
          _mm256_and_ps(x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit.b, place)))};
}

static inline I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline I load_i(const void *p) {
  return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
static inline I raise_i(I x, I by) { return {_mm256_sllv_epi32(x.a, by.a), _mm256_sllv_epi32(x.b, by.b)}; }
static inline I lower_i(I x, int by) { return {_mm256_srai_epi32(x.a, by), _mm256_srai_epi32(x.b, by)}; }
static inline I min_i(I x, I y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
static inline I set_i(int32_t m) { return {_mm256_set1_epi32(m), _mm256_set1_epi32(m)}; }
static inline I and_i(I x, int32_t m) {
  __m256i w = _mm256_set1_epi32(m);
  return {_mm256_and_si256(x.a, w), _mm256_and_si256(x.b, w)};
}
static inline I or_i(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static inline I as_lanes(B x) { return {x.a, x.b}; }
static inline B as_bytes(I x) { return {x.a, x.b}; }

// Once, as in avx512.h.
static inline B load_b(const void *p) {
  __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)p + 1);
  asm("" : "+x"(a), "+x"(b));
  return {a, b};
}
static inline void store_b(void *p, B x) {
  _mm256_storeu_si256((__m256i *)p, x.a);
  _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
static inline B set_b(uint8_t m) { return {_mm256_set1_epi8(char(m)), _mm256_set1_epi8(char(m))}; }
static inline B spread_b(const uint8_t *p) {
  I x = load_bytes(p);
  __m256i four = _mm256_set1_epi32(0x01010101);
  return {_mm256_mullo_epi32(x.a, four), _mm256_mullo_epi32(x.b, four)};
}
static inline B or_b(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int N> static inline B field_b(B x, uint8_t mask) {
  __m256i w = _mm256_set1_epi8(char(mask));
  return {_mm256_and_si256(N ? _mm256_srli_epi16(x.a, N) : x.a, w),
          _mm256_and_si256(N ? _mm256_srli_epi16(x.b, N) : x.b, w)};
}
template <int N> static inline B raise_b(B x) { return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)}; }
static inline B expand_b(const uint8_t *p, uint64_t mask, B other) {
  alignas(32) uint8_t bytes[64];
  store_b(bytes, other);
  for (; mask; mask &= mask - 1) bytes[__builtin_ctzll(mask)] = *p++;
  return load_b(bytes);
}
static inline __m256i nibbles_half(const uint8_t *p) {
  __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
  return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
}
static inline B nibbles_b(const uint8_t *p) { return {nibbles_half(p), nibbles_half(p + 16)}; }
static inline F expand_f32(const float *p, uint32_t mask) {
  alignas(32) float values[16] = {};
  for (; mask; mask &= mask - 1) values[__builtin_ctz(mask)] = *p++;
  return load_f(values);
}
static inline void expand_words(uint16_t *values, const uint16_t *p, uint32_t mask) {
  std::memset(values, 0, 32);
  for (; mask; mask &= mask - 1) values[__builtin_ctz(mask)] = *p++;
}
static inline F expand_half(const uint16_t *p, uint32_t mask) {
  alignas(32) uint16_t values[16];
  expand_words(values, p, mask);
  return load_half(values);
}
static inline F expand_bfloat(const uint16_t *p, uint32_t mask) {
  alignas(32) uint16_t values[16];
  expand_words(values, p, mask);
  return load_bfloat(values);
}

template <bool WIDE> static inline __m256i dot_half(__m256i acc, __m256i u, __m256i x) {
  __m256i one = _mm256_set1_epi16(1);
  // Sums of two products saturate at 16 bits, which codes up to 127 never reach; above, nibbles are summed apart.
  if (!WIDE) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), one));
  __m256i nibble = _mm256_set1_epi8(15);
  __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(u, nibble), x);
  __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(u, 4), nibble), x);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, one));
  return _mm256_add_epi32(acc, _mm256_slli_epi32(_mm256_madd_epi16(high, one), 4));
}
template <bool WIDE> static inline I dot(I acc, B u, int32_t quad) {
  __m256i x = _mm256_set1_epi32(quad);
  return {dot_half<WIDE>(acc.a, u.a, x), dot_half<WIDE>(acc.b, u.b, x)};
}
template <bool WIDE> static inline I dot(I acc, B u, I quads) {
  return {dot_half<WIDE>(acc.a, u.a, quads.a), dot_half<WIDE>(acc.b, u.b, quads.b)};
}
template <int J> static inline F byte_f(B x) { return to_f(and_i(shr_i<8 * J>(as_lanes(x)), 255)); }

static inline B table_b(const uint8_t *p) {
  __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
  return {t, t};
}
static inline B lookup_b(B table, B codes) {
  return {_mm256_shuffle_epi8(table.a, codes.a), _mm256_shuffle_epi8(table.b, codes.b)};
}
constexpr int accumulators = 4;  // sums that stay in registers
constexpr bool cheap_lookup = false;
static inline Table table_f(const float *p) { return load_f(p); }
static inline __m256 lookup_half(Table table, __m256i at) {
  __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // bit 3 becomes the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, at), _mm256_permutevar8x32_ps(table.b, at), upper);
}
static inline F lookup_f(Table table, I at) { return {lookup_half(table, at.a), lookup_half(table, at.b)}; }

static inline void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
static inline void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

}  // namespace rarefy_avx2
