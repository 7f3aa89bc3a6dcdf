// A step's own kernels for every processor; as kernels_scalar.cpp.
#include "simd/scalar.h"
#define RAREFY_NS rarefy_scalar
#include "step/kernels.h"

namespace rarefy {
const StepKernels scalar_step = rarefy_scalar::step_table;
}
