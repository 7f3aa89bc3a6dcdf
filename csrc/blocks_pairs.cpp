// Attention over listed blocks with products of pairs of BF16 numbers (AVX-512 BF16).
#include "simd/scalar.h"
#include "simd/avx512.h"
#define RAREFY_NS rarefy_pairs

namespace RAREFY_NS {
using namespace rarefy_avx512;
constexpr bool PAIRS = true;
constexpr int tile = 6, at_once = 4;  // rows and vectors of sums that registers hold
static inline F times_one(const float *a, F b, F c) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*a)), (__m512bh)_mm512_castps_si512(b));
}
static inline void store_weights(float *to, int64_t panel, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + panel * 8), (__m256i)_mm512_cvtneps_pbh(x));
}
}  // namespace RAREFY_NS

#include "kernels/blocks.h"

namespace rarefy {
const BlocksKernels pairs_blocks = RAREFY_NS::blocks_table;
}
