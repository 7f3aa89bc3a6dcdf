// Columns for one instruction set.
#pragma once
#include "../columns.h"

namespace rarefy {

constexpr int64_t column_lanes = 16;  // rows that a kernel has side by side

struct Fit {
  int32_t size, levels, scale_bits, zero_bits, tile;
  bool half;
};

struct ColumnKernels {
  // `lanes` rows of a member from `row` on; `scratch` is [width, 16].
  void (*round)(const rarefy_round &, int32_t rule, int64_t member, int64_t row, int64_t lanes, float *scratch);
  // Rows of all members from `row` on, a whole number of tiles.
  void (*fit)(const rarefy_fit &, const Fit &, int64_t row, int64_t lanes);
  // The groups of a row.
  void (*search)(const rarefy_search &, int64_t row);
};

extern const ColumnKernels scalar_columns;
#ifdef RAREFY_WIDE
extern const ColumnKernels avx2_columns, avx512_columns;
#endif

}  // namespace rarefy
