// Columns for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#include "simd/avx2.h"
#define RAREFY_NS rarefy_avx2
#include "kernels/columns.h"

namespace rarefy {
const ColumnKernels avx2_columns = rarefy_avx2::columns_table;
}
