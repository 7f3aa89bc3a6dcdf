// Attention over codes, compiled once for each instruction set; meanings in kernels/attend.h.
#pragma once
#include "../attend.h"

namespace rarefy {

struct AttendKernels {
  int64_t (*floats)();  // that one thread works in
  void (*stretch)(const rarefy_stretch &stretch, int64_t head, const float *q, int64_t group, int64_t width,
                  float factor, const int64_t *hidden, int64_t hidden_each, float *out, float *lse, float *memory);
};

extern const AttendKernels scalar_attend;
#ifdef RAREFY_WIDE
extern const AttendKernels avx2_attend, avx512_attend;
#endif

}  // namespace rarefy
