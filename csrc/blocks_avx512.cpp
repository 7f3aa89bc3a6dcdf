// Attention over listed blocks for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#include "simd/avx512.h"
#define RAREFY_NS rarefy_avx512

namespace RAREFY_NS {
constexpr bool PAIRS = false;
constexpr int tile = 6, at_once = 4;  // rows and vectors of sums that registers hold
static inline F times_one(const float *a, F b, F c) { return fma_f(set_f(*a), b, c); }
static inline void store_weights(float *to, int64_t panel, F x) { store_f(to + panel * 16, x); }
}  // namespace RAREFY_NS

#include "kernels/blocks.h"

namespace rarefy {
const BlocksKernels avx512_blocks = RAREFY_NS::blocks_table;
}
