// The kernels for one instruction set; this file is compiled for it, and nothing in it runs before it was chosen.
#include "simd/scalar.h"
#include "simd/avx2.h"
#define RAREFY_NS rarefy_avx2
#include "kernels/tiles.h"

namespace rarefy {
const Kernels avx2_kernels = rarefy_avx2::table_of("avx2");
}
