// A step's own kernels for one instruction set; as kernels_avx512.cpp.
#include "simd/scalar.h"
#include "simd/avx512.h"
#define RAREFY_NS rarefy_avx512
#include "step/kernels.h"

namespace rarefy {
const StepKernels avx512_step = rarefy_avx512::step_table;
}
