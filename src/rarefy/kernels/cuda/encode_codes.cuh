// What encoders have in common. A thread has MINE numbers of a vector, PARTS neighbouring threads the whole of it.

template <int TYPE> device float number_of(u32 bits) {
  return TYPE == F16 ? half_value(u16(bits)) : as_float(bits << 16);
}
template <int TYPE> device float number_at(const void* base, i64 index) {
  if constexpr (TYPE == F32) return static_cast<const float*>(base)[index];
  else return number_of<TYPE>(static_cast<const u16*>(base)[index]);
}
device float at_most(float value) { return value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value; }
device float larger(float a, float b) { return a > b ? a : b; }
device float smaller(float a, float b) { return a < b ? a : b; }

// The codes of this thread as 32 * BITS bits.
device void store_codes(u32* to, const u32 (&codes)[MINE]) {
#pragma unroll
  for (int word = 0; word < BITS; ++word) {
    u32 bits = 0;
#pragma unroll
    for (int n = 0; n < MINE; ++n) {
      const int at = n * BITS - 32 * word;
      if (at > -BITS && at < 32) bits |= at >= 0 ? codes[n] << at : codes[n] >> -at;
    }
    to[word] = bits;
  }
}

struct Steps {
  u16 scale, zero;
};
// Scale and zero of a group between `low` and `high`, as formats/grids/integer.py proposes and rounds them.
device Steps steps_of(float low, float high) {
  const float reach = larger(absolute(low), absolute(high));
  const bool constant = low == high && low != 0.0f;
  float scale = larger((high - low) / float(LEVELS - 1), reach * 6.103515625e-05f);
  float zero = scale == 0.0f ? float(LEVELS / 2) : -low / scale;
  if (constant) scale = reach, zero = high < 0.0f ? 1.0f : 0.0f;
  return {rounded<true>(scale), rounded<true>(zero)};
}

// The nearest code of a number, and what is wrong with its group.
device u32 code_of(float x, float scale, float zero) {
  const float place = nearest_integer((scale == 0.0f ? 0.0f : x / scale) + zero);
  return u32(smaller(larger(place, 0.0f), float(LEVELS - 1)));
}
device u32 overflow_of(float scale, float zero) {
  return absolute(scale) <= 65504.0f && absolute(zero) <= 65504.0f ? 0 : OVERFLOWS;
}

// The largest number of a vector and where it is, the first of equals, which it then has no more; `x` are this thread's.
struct Largest {
  float value;
  int index;
};
device Largest take_largest(float (&x)[MINE], int part) {
  Largest best = {as_float(0xFF800000u), 0};
#pragma unroll
  for (int n = 0; n < MINE; ++n)
    if (x[n] > best.value) best = {x[n], part * MINE + n};
#pragma unroll
  for (int distance = 1; distance < PARTS; distance *= 2) {
    const float value = of_lane_xor(best.value, distance);
    const int index = int(of_lane_xor(u32(best.index), distance));
    if (value > best.value || (value == best.value && index < best.index)) best = {value, index};
  }
#pragma unroll
  for (int n = 0; n < MINE; ++n)
    if (part * MINE + n == best.index) x[n] = as_float(0xFF800000u);
  return best;
}
