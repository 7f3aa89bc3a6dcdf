// Scales and zero points of one tile and group, whatever way they are stored.
#pragma once
#include "../internal.h"

namespace RAREFY_NS {

using rarefy::ceil_div;

// Sixteen floats from element `index` of an array of `type`.
static inline F load_floats(const rarefy_span &array, int32_t type, int64_t index) {
  switch (type) {
    case RAREFY_F16: return load_half(static_cast<const uint16_t *>(array.data) + index);
    case RAREFY_BF16: return load_bfloat(static_cast<const uint16_t *>(array.data) + index);
    default: return load_f(static_cast<const float *>(array.data) + index);
  }
}

static inline float load_one(const rarefy_span &array, int32_t type, int64_t index) {
  switch (type) {
    case RAREFY_F16: return rarefy_scalar::half_to_float(static_cast<const uint16_t *>(array.data)[index]);
    case RAREFY_BF16: return rarefy_scalar::bfloat_to_float(static_cast<const uint16_t *>(array.data)[index]);
    default: return static_cast<const float *>(array.data)[index];
  }
}

// value = scale * (code - zero), or scale (positive) and negative * table entry; PAIRS: zero holds what code 0 stands
// for and scale what code 1 does.
struct Params {
  F scale, zero, negative;
};

// Number `which` of the second order: of the whole row tile, or of each row.
static inline F second(const rarefy_term &t, int64_t tile, int64_t group, int32_t which) {
  int64_t tiles = ceil_div(rarefy::groups_of(t), t.second_groups), column = group / t.second_groups;
  if (t.second_rows == 1)
    return load_floats(t.second_order, t.second_type, ((tile * tiles + column) * t.second_numbers + which) * 16);
  int64_t row = tile * 16 / t.second_rows;
  return set_f(load_one(t.second_order, t.second_type, (row * tiles + column) * t.second_numbers + which));
}

static inline Params params(const rarefy_term &t, int64_t tile, int64_t group) {
  int64_t at = tile * rarefy::groups_of(t) + group;
  Params p{set_f(1.f), set_f(t.zero), zero_f()};
  switch (t.scale_layout) {
    case RAREFY_SINGLE: p.scale = load_floats(t.scale, t.scale_type, at * 16); break;
    case RAREFY_SIGNED:
      p.scale = load_floats(t.scale, t.scale_type, at * 32);
      p.negative = load_floats(t.scale, t.scale_type, at * 32 + 16);
      break;
    case RAREFY_PAIRS:
      p.zero = load_floats(t.scale, t.scale_type, at * 32);
      p.scale = load_floats(t.scale, t.scale_type, at * 32 + 16);
      return p;
    case RAREFY_NIBBLES:
    case RAREFY_OCTETS: {
      const uint8_t *bytes = static_cast<const uint8_t *>(t.scale.data);
      bool nibbles = t.scale_layout == RAREFY_NIBBLES;
      I first = load_bytes(bytes + at * (nibbles ? 16 : 32));
      F code = to_f(nibbles ? and_i(first, 15) : first);
      p.scale = mul_f(second(t, tile, group, 0), sub_f(code, second(t, tile, group, 1)));
      if (t.second_numbers == 4) {
        code = to_f(nibbles ? shr_i<4>(first) : load_bytes(bytes + at * 32 + 16));
        p.zero = mul_f(second(t, tile, group, 2), sub_f(code, second(t, tile, group, 3)));
      }
      break;
    }
    default: break;
  }
  if (t.zero_type == RAREFY_U8) p.zero = load_bytes_f(static_cast<const uint8_t *>(t.zero_point.data) + at * 16);
  else if (t.zero_type != RAREFY_NONE) p.zero = load_floats(t.zero_point, t.zero_type, at * 16);
  if (t.multiplier != 1.f) {
    F factor = set_f(t.multiplier);
    p.scale = mul_f(p.scale, factor);
    p.negative = mul_f(p.negative, factor);
  }
  return p;
}

}  // namespace RAREFY_NS
