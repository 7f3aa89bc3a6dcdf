// Columns for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#define RAREFY_NS rarefy_scalar
#include "kernels/columns.h"

namespace rarefy {
const ColumnKernels scalar_columns = rarefy_scalar::columns_table;
}
