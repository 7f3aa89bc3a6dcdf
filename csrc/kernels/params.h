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
    case RAREFY_F16: return one_half(static_cast<const uint16_t *>(array.data)[index]);
    case RAREFY_BF16: return rarefy_scalar::bfloat_to_float(static_cast<const uint16_t *>(array.data)[index]);
    default: return static_cast<const float *>(array.data)[index];
  }
}

// value = scale * (code - zero), or scale (positive) and negative * table entry; PAIRS: zero holds what code 0 stands
// for and scale what code 1 does.
struct Params {
  F scale, zero, negative;
};

// The parameters of one tile, group by group, with all that does not change from group to group worked out before.
struct Scales {
  const rarefy_term &t;
  int64_t tile, first, second_first = 0, second_step = 0;

  Scales(const rarefy_term &term, int64_t tile_) : t(term), tile(tile_), first(tile_ * rarefy::groups_of(term)) {
    if (t.second_numbers == 0) return;
    int64_t tiles = ceil_div(rarefy::groups_of(t), t.second_groups);
    second_step = t.second_rows == 1 ? 16 : 1;
    second_first = (t.second_rows == 1 ? tile : tile * 16 / t.second_rows) * tiles * t.second_numbers * second_step;
  }

  inline __attribute__((always_inline)) Params operator()(int64_t group) const {
    if (t.scale_type == RAREFY_F16 && t.multiplier == 1.f) {  // what nearly all weights have
      const uint16_t *scale = static_cast<const uint16_t *>(t.scale.data);
      int64_t at = (first + group) * 16;
      if (t.scale_layout == RAREFY_SINGLE) {
        prefetch_far(scale + at + 512);
        Params p{load_half(scale + at), set_f(t.zero), zero_f()};
        if (t.zero_type == RAREFY_U8) {
          const uint8_t *zero = static_cast<const uint8_t *>(t.zero_point.data) + at;
          prefetch_far(zero + 512);
          p.zero = load_bytes_f(zero);
        } else if (t.zero_type == RAREFY_F16) p.zero = load_half(static_cast<const uint16_t *>(t.zero_point.data) + at);
        else if (t.zero_type != RAREFY_NONE) p.zero = load_floats(t.zero_point, t.zero_type, at);
        return p;
      }
      if (t.zero_type == RAREFY_NONE && (t.scale_layout == RAREFY_PAIRS || t.scale_layout == RAREFY_SIGNED)) {
        prefetch_far(scale + 2 * at + 1024);
        F low = load_half(scale + 2 * at), high = load_half(scale + 2 * at + 16);
        if (t.scale_layout == RAREFY_PAIRS) return {high, low, zero_f()};
        return {low, set_f(t.zero), high};
      }
    }
    if (t.scale_layout == RAREFY_NIBBLES && t.second_type == RAREFY_F16 && t.second_numbers == 4 &&
        second_step == 1 && t.second_groups == 1 && t.multiplier == 1.f && t.zero_type == RAREFY_NONE) {
      const uint16_t *numbers = static_cast<const uint16_t *>(t.second_order.data) + second_first + 4 * group;
      I both = load_bytes(static_cast<const uint8_t *>(t.scale.data) + (first + group) * 16);
      F scale = sub_f(to_f(and_i(both, 15)), set_f(one_half(numbers[1])));
      F zero = sub_f(to_f(shr_i<4>(both)), set_f(one_half(numbers[3])));
      return {mul_f(set_f(one_half(numbers[0])), scale), mul_f(set_f(one_half(numbers[2])), zero), zero_f()};
    }
    return other(group);
  }

  // Number `which` of the second order: of the whole row tile, or of each row.
  F second(int64_t group, int32_t which) const {
    int64_t column = t.second_groups == 1 ? group : group / t.second_groups;
    int64_t at = second_first + (column * t.second_numbers + which) * second_step;
    if (second_step == 16) return load_floats(t.second_order, t.second_type, at);
    return set_f(load_one(t.second_order, t.second_type, at));
  }

  __attribute__((noinline)) Params other(int64_t group) const {
    int64_t at = first + group;
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
        break;
      case RAREFY_NIBBLES:
      case RAREFY_OCTETS: {
        const uint8_t *bytes = static_cast<const uint8_t *>(t.scale.data);
        bool nibbles = t.scale_layout == RAREFY_NIBBLES;
        I both = load_bytes(bytes + at * (nibbles ? 16 : 32));
        F code = to_f(nibbles ? and_i(both, 15) : both);
        p.scale = mul_f(second(group, 0), sub_f(code, second(group, 1)));
        if (t.second_numbers == 4) {
          code = to_f(nibbles ? shr_i<4>(both) : load_bytes(bytes + at * 32 + 16));
          p.zero = mul_f(second(group, 2), sub_f(code, second(group, 3)));
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
      if (t.scale_layout == RAREFY_PAIRS) p.zero = mul_f(p.zero, factor);
    }
    return p;
  }
};

// Groups in the order of their columns, `per` steps to each.
struct Walk {
  int64_t per, group = 0, left;

  explicit Walk(int64_t per_group) : per(per_group), left(per_group) {}
  // One step further; whether a new group begins.
  bool step() {
    if (--left) return false;
    left = per;
    ++group;
    return true;
  }
};

}  // namespace RAREFY_NS
