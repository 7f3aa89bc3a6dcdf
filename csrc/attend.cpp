// Attention over codes (attend.h): heads and stretches on the pool, then their sums together.
#include "attend.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "internal.h"
#include "kernels/attend_table.h"

namespace rarefy {
namespace {

const AttendKernels &attend_kernels() {
#ifdef RAREFY_WIDE
  if (!std::strcmp(rarefy_instructions(), "avx512")) return avx512_attend;
  if (!std::strcmp(rarefy_instructions(), "avx2")) return avx2_attend;
#endif
  return scalar_attend;
}

int64_t lines(int64_t floats) { return ceil_div(floats, 16) * 16; }

// What is wrong with a side, or null.
const char *fault(const rarefy_side &s, int64_t width, bool keys) {
  int64_t tokens = s.tokens;
  if (!s.codes || tokens < 1) return "A stretch has no codes";
  if (s.kind == RAREFY_PLAIN)
    return s.type == RAREFY_F32 || s.type == RAREFY_F16 || s.type == RAREFY_BF16 ? nullptr
                                                                                 : "A stretch has numbers of no known type";
  if (s.kind != RAREFY_BY_TOKEN && (s.kind != RAREFY_BY_CHANNEL || !keys)) return "A stretch is of no known kind";
  if (s.bits != 2 && s.bits != 3 && s.bits != 4 && s.bits != 8) return "Codes have other than 2, 3, 4 or 8 bits";
  if (!s.scale || !s.table || (s.kind == RAREFY_BY_CHANNEL && !s.zero)) return "A stretch has no scales";
  int64_t codes = s.kind == RAREFY_BY_CHANNEL ? s.block : width, per = s.bits == 8 ? 4 : 8, chunks = codes / per;
  if (s.group < per || s.group % per || codes % s.group || (16 % chunks && chunks % 16))
    return "Codes do not lie in whole groups of chunks";
  int64_t rows = chunks < 16 ? 16 / chunks : 1;
  if (s.kind == RAREFY_BY_CHANNEL ? tokens % s.block || width % rows || codes / s.group > 16 : tokens % rows)
    return "A stretch ends within a block";
  return nullptr;
}

int32_t refuse(char *message, size_t capacity, const char *why) {
  if (message && capacity) std::snprintf(message, capacity, "%s", why);
  return -1;
}

struct Task {
  const rarefy_stretch *stretches;
  int64_t count, heads, group, width, hidden_each;
  const float *query;
  float scale;
  const int64_t *hidden;
  float *partial, *partial_lse, *scratch;
  const AttendKernels &own;
  std::atomic<int64_t> next{0};
  int64_t pieces, each;

  void run(int64_t slot) {
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      int64_t pair = piece / count, row = piece * group;
      own.stretch(stretches[piece % count], pair, query + pair * group * width, group, width, scale,
                  hidden + pair / heads * hidden_each, hidden_each, partial + row * width, partial_lse + row,
                  scratch + slot * each);
    }
  }
};

}  // namespace
}  // namespace rarefy

using namespace rarefy;

int64_t rarefy_attend_bytes(int64_t stretches, int64_t batch, int64_t heads, int64_t group, int64_t width) {
  int64_t rows = stretches * batch * heads * group;
  return (lines(rows * width) + lines(rows) + rarefy_threads(0) * lines(attend_kernels().floats())) * 4;
}

int32_t rarefy_attend(const rarefy_stretch *stretches, int64_t count, const float *query, int64_t batch, int64_t heads,
                      int64_t group, int64_t width, float scale, const int64_t *hidden, int64_t hidden_each, float *out,
                      float *lse, void *memory, int64_t bytes, char *message, size_t capacity) {
  if (width < 16 || width % 16 || width > RAREFY_WIDTH) return refuse(message, capacity, "Heads are too wide or uneven");
  if (batch < 1 || heads < 1 || group < 1 || count < 0) return refuse(message, capacity, "There is nothing to attend");
  if (bytes < rarefy_attend_bytes(count, batch, heads, group, width) || reinterpret_cast<uintptr_t>(memory) % 64)
    return refuse(message, capacity, "Attention has too little memory to work in");
  for (int64_t i = 0; i < count; ++i) {
    const rarefy_stretch &s = stretches[i];
    if (s.tokens < 1 || s.tokens > RAREFY_STRETCH) return refuse(message, capacity, "A stretch is empty or too long");
    for (int32_t keys = 0; keys < 2; ++keys) {
      const rarefy_side *sides = keys ? s.keys : s.values;
      int64_t covered = 0;
      for (int64_t n = 0; n < (keys ? s.key_sides : s.value_sides); ++n) {
        if (const char *why = fault(sides[n], width, keys)) return refuse(message, capacity, why);
        if (sides[n].first != covered) return refuse(message, capacity, "A stretch has gaps");
        covered += sides[n].tokens;
      }
      if (covered < s.tokens || covered > RAREFY_STRETCH) return refuse(message, capacity, "A stretch is not covered");
    }
  }
  int64_t pairs = batch * heads, rows = pairs * count * group;
  float *partial = static_cast<float *>(memory), *partial_lse = partial + lines(rows * width);
  const AttendKernels &own = attend_kernels();
  Task task{stretches, count, heads, group, width, hidden_each, query, scale, hidden, partial, partial_lse,
            partial_lse + lines(rows), own, {0}, pairs * count, lines(own.floats())};
  int64_t slots = rarefy_threads(0) < task.pieces ? rarefy_threads(0) : task.pieces;
  rarefy_parallel([](void *context, int64_t slot) { static_cast<Task *>(context)->run(slot); }, &task, slots);
  for (int64_t row = 0; row < pairs * group; ++row) {
    int64_t pair = row / group, g = row % group;
    float top = -INFINITY, total = 0, *to = out + row * width;
    std::memset(to, 0, size_t(width) * 4);
    for (int64_t i = 0; i < count; ++i) {
      float own_lse = partial_lse[(pair * count + i) * group + g];
      top = own_lse > top ? own_lse : top;
    }
    for (int64_t i = 0; i < count && top > -INFINITY; ++i) {
      int64_t from = (pair * count + i) * group + g;
      float share = std::exp(partial_lse[from] - top);
      total += share;
      for (int64_t k = 0; k < width; ++k) to[k] += share * partial[from * width + k];
    }
    for (int64_t k = 0; k < width && total > 0; ++k) to[k] /= total;
    lse[row] = total > 0 ? top + std::log(total) : -INFINITY;
  }
  return 0;
}
