// A step's own kernels for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#include "simd/avx2.h"
#define RAREFY_NS rarefy_avx2
#include "step/kernels.h"

namespace rarefy {
const StepKernels avx2_step = rarefy_avx2::step_table;
}
