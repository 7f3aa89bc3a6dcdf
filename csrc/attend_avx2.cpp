// Attention over codes for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#include "simd/avx2.h"
#define RAREFY_NS rarefy_avx2
#include "kernels/attend.h"

namespace rarefy {
const AttendKernels avx2_attend = rarefy_avx2::attend_table;
}
