// Attention over codes for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#define RAREFY_NS rarefy_scalar
#include "kernels/attend.h"

namespace rarefy {
const AttendKernels scalar_attend = rarefy_scalar::attend_table;
}
