// The kernels for one instruction set; this file is compiled for it, and nothing in it runs before it was chosen.
#include "simd/scalar.h"
#define RAREFY_NS rarefy_scalar
#include "kernels/tiles.h"

namespace rarefy {
const Kernels scalar_kernels = rarefy_scalar::table_of("scalar");
}
