// Columns for one instruction set; as kernels_avx2.cpp.
#include "simd/scalar.h"
#include "simd/avx512.h"
#define RAREFY_NS rarefy_avx512
#include "kernels/columns.h"

namespace rarefy {
const ColumnKernels avx512_columns = rarefy_avx512::columns_table;
}
