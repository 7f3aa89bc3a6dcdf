// The kernels for one instruction set; this file is compiled for it, and nothing in it runs before it was chosen.
#include "simd/scalar.h"
#include "simd/avx512.h"
#define RAREFY_NS rarefy_avx512
#include "kernels/tiles.h"

namespace rarefy {
const Kernels avx512_kernels = rarefy_avx512::table_of("avx512");
}
