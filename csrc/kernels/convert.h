// 32-bit floats as numbers of any float type.
#pragma once
#include "../internal.h"

namespace RAREFY_NS {

static inline uint16_t to_bfloat(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // stays a NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void convert(const float *from, void *to, int32_t type, int64_t count) {
  if (type == RAREFY_F32) {
    __builtin_memcpy(to, from, size_t(count) * 4);
    return;
  }
  uint16_t *words = static_cast<uint16_t *>(to);
  for (int64_t i = 0; i < count; ++i) words[i] = type == RAREFY_BF16 ? to_bfloat(from[i]) : rarefy_scalar::to_half(from[i]);
}

}  // namespace RAREFY_NS
