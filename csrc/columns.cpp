// Columns (columns.h): rows on the pool.
#include "columns.h"

#include <cstdlib>
#include <cstring>

#include "internal.h"
#include "kernels/columns_table.h"

namespace rarefy {
namespace {

const ColumnKernels &column_kernels() {
#ifdef RAREFY_WIDE
  if (!std::strcmp(rarefy_instructions(), "avx512")) return avx512_columns;
  if (!std::strcmp(rarefy_instructions(), "avx2")) return avx2_columns;
#endif
  return scalar_columns;
}

struct Rounding {
  const rarefy_round &given;
  int32_t rule;
  int64_t pieces;  // of a member
  const ColumnKernels &own;

  void run(int64_t piece) const {
    int64_t row = piece % pieces * column_lanes, left = given.rows - row;
    // A column's rows lie far apart from the next column's: gathered, they fit the nearest cache.
    alignas(64) float near[256 * column_lanes];
    void *far = given.width > 256 ? std::aligned_alloc(64, size_t(given.width) * column_lanes * 4) : nullptr;
    float *scratch = far ? static_cast<float *>(far) : near;
    own.round(given, rule, piece / pieces, row, left < column_lanes ? left : column_lanes, scratch);
    std::free(far);
  }
};

struct Fitting {
  const rarefy_fit &given;
  Fit fit;
  const ColumnKernels &own;

  int64_t height() const { return fit.tile < column_lanes ? column_lanes : fit.tile; }
  int64_t rows() const { return int64_t(given.members) * given.rows; }
  void run(int64_t piece) const {
    int64_t row = piece * height(), left = rows() - row;
    own.fit(given, fit, row, left < height() ? left : height());
  }
};

struct Searching {
  const rarefy_search &given;
  const ColumnKernels &own;

  void run(int64_t row) const { own.search(given, row); }
};

template <class Task> void on_pool(Task &task, int64_t pieces) {
  rarefy_parallel([](void *context, int64_t piece) { static_cast<Task *>(context)->run(piece); }, &task, pieces);
}

}  // namespace
}  // namespace rarefy

using namespace rarefy;

void rarefy_round_columns(const rarefy_round *given, int32_t rule) {
  Rounding task{*given, rule, ceil_div(given->rows, column_lanes), column_kernels()};
  on_pool(task, task.pieces * given->members);
}

void rarefy_fit_around(const rarefy_fit *given, int32_t size, int32_t levels, int32_t scale_bits, int32_t zero_bits,
                       int32_t tile, int32_t half) {
  Fitting task{*given, {size, levels, scale_bits, zero_bits, tile, half != 0}, column_kernels()};
  on_pool(task, ceil_div(task.rows(), task.height()));
}

void rarefy_search_ranges(const rarefy_search *given) {
  Searching task{*given, column_kernels()};
  on_pool(task, given->rows);
}
