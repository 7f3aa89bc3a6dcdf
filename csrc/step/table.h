// The parts of a step that are compiled once for each instruction set; meanings in kernels.h.
#pragma once
#include "../step.h"

namespace rarefy {

struct StepKernels {
  void (*embed)(const void *table, int32_t type, int64_t row, int64_t width, float scale, float *out);
  void (*norm)(const float *x, const float *weight, int64_t width, int64_t heads, float eps, float *out);
  void (*rotate)(float *x, int64_t width, int64_t heads, const float *cosine, const float *sine);
  void (*gate)(const float *x, const float *y, int64_t width, int32_t activation, float *out);
  void (*add)(float *x, const float *y, int64_t width);
  void (*cap)(float *x, int64_t width, float top);
  void (*dense)(const void *weight, int32_t type, int64_t columns, const float *x, int64_t x_stride, float *y,
                int64_t y_stride, int64_t first, int64_t last, int64_t tokens);
  void (*store)(const float *x, void *row, int32_t type, int64_t width);
  void (*attend)(const float *q, int64_t group, int64_t width, const void *keys, const void *values, int32_t type,
                 int64_t first, int64_t last, float scale, float softcap, float *scores, float *out);
};

extern const StepKernels scalar_step;
#ifdef RAREFY_WIDE
extern const StepKernels avx2_step, avx512_step;
#endif

}  // namespace rarefy
