// Attention over codes for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#include "simd/avx512.h"
#define RAREFY_NS rarefy_avx512
#include "kernels/attend.h"

namespace rarefy {
const AttendKernels avx512_attend = rarefy_avx512::attend_table;
}
