// Sixteen rows of a weight through a stretch of columns; see columns.h. Sums are in the order of the columns, with one
// rounding for each product and sum where the processor can.
#pragma once
#include <initializer_list>

#include "../columns.h"
#include "columns_table.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace RAREFY_NS {

constexpr int64_t lanes_of = rarefy::column_lanes;
typedef float V __attribute__((vector_size(64)));
typedef int32_t W __attribute__((vector_size(64)));

inline V all(float value) { return V{} + value; }
inline V smaller(V a, V b) { return a < b ? a : b; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline V size_of(V a) { return (V)((W)a & 0x7fffffff); }
// a * b + c
inline V fused(V a, V b, V c) {
  F x = load_f((const float *)&a), y = load_f((const float *)&b), z = load_f((const float *)&c);
  V r;
  store_f((float *)&r, fma_f(x, y, z));
  return r;
}
// The nearest whole number from 0 to `last`, ties to even: adding 1.5 * 2^23 leaves no room for a fraction.
inline V bounded(V a, float last) { return (smaller(larger(a, V{}), all(last)) + 12582912.f) - 12582912.f; }

inline V load(const float *p, int64_t lanes) {
  V r{};
  if (lanes == lanes_of) std::memcpy(&r, p, sizeof r);
  else std::memcpy(&r, p, size_t(lanes) * 4);
  return r;
}
inline void store(float *p, V a, int64_t lanes) {
  if (lanes == lanes_of) std::memcpy(p, &a, sizeof a);
  else std::memcpy(p, &a, size_t(lanes) * 4);
}
inline W load_marks(const uint8_t *p, int64_t lanes) {
  W r{};
  for (int64_t i = 0; i < lanes; ++i) r[i] = -int32_t(p[i]);
  return r;
}

template <int RULE, bool ROUND>
void round_lanes(const rarefy_round &a, int64_t member, int64_t row, int64_t lanes, float *scratch) {
  const int64_t across = int64_t(a.members) * a.rows, own = member * a.rows + row;
  float *block = a.block + member * a.block_member + row, *errors = a.errors + member * a.errors_member + row;
  const float *shares = a.shares + member * a.shares_member;
  V *values = reinterpret_cast<V *>(scratch);
  for (int64_t n = 0; n < a.width; ++n) values[n] = load(block + n * a.block_column, lanes);
  const V reach = RULE == RAREFY_CHOOSE ? load(a.reach + own, lanes) : V{};
  for (int64_t n = 0; n < a.count; ++n) {
    const V value = values[n];
    V lost{};
    if (ROUND) {
      const V scale = load(a.scale + a.group[n] * across + own, lanes);
      const V zero = load(a.zero + a.group[n] * across + own, lanes);
      // A group of zeros has scale 0, and every value of it is then at its zero point.
      const V steps = scale == 0.f ? V{} : value / scale;
      const V code = bounded(zero + steps, float(a.last));
      lost = value - (code - zero) * scale;
      uint8_t *codes = a.codes + n * across + own;
      for (int64_t i = 0; i < lanes; ++i) codes[i] = uint8_t(code[i]);
    }
    V error = lost;
    uint8_t *marked = a.marked + n * across + own;
    if (RULE == RAREFY_DROP) error = load_marks(marked, lanes) ? lost : value;
    if (RULE == RAREFY_SPARE) error = load_marks(marked, lanes) ? V{} : lost;
    if (RULE == RAREFY_CHOOSE) {
      const W marks = size_of(lost) > reach * a.unit[member * a.unit_member + n * a.unit_column];
      for (int64_t i = 0; i < lanes; ++i) marked[i] = uint8_t(-marks[i]);
      error = marks ? V{} : lost;
    }
    if (RULE == RAREFY_SPARE || RULE == RAREFY_CHOOSE) store(a.lost + n * across + own, lost, lanes);
    store(errors + n * a.errors_column, error, lanes);
    const float *share = shares + n * a.shares_row;
    const V taken = -error;
    for (int64_t later = n + 1; later < a.width; ++later) values[later] = fused(taken, all(share[later]), values[later]);
  }
  for (int64_t n = 0; n < a.width; ++n) store(block + n * a.block_column, values[n], lanes);
}

void round_columns(const rarefy_round &a, int32_t rule, int64_t member, int64_t row, int64_t lanes, float *scratch) {
  if (!a.codes) return round_lanes<RAREFY_DROP, false>(a, member, row, lanes, scratch);
  switch (rule) {
    case RAREFY_EVERY: return round_lanes<RAREFY_EVERY, true>(a, member, row, lanes, scratch);
    case RAREFY_DROP: return round_lanes<RAREFY_DROP, true>(a, member, row, lanes, scratch);
    case RAREFY_SPARE: return round_lanes<RAREFY_SPARE, true>(a, member, row, lanes, scratch);
    default: return round_lanes<RAREFY_CHOOSE, true>(a, member, row, lanes, scratch);
  }
}

// ---- Two-level scales, fitted around what would spoil a group.

inline V moved(V a, int32_t distance) {
  W at;
  for (int32_t i = 0; i < lanes_of; ++i) at[i] = i ^ distance;
  return __builtin_shuffle(a, at);
}
inline uint16_t narrow(float value, bool half) {
  if (half) return rarefy_scalar::to_half(value);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Numbers that are equal within a tile, as they are stored in 16 bits.
inline V stored(V a, const rarefy::Fit &f) {
  V r{};
  const int32_t equal = f.tile < lanes_of ? f.tile : int32_t(lanes_of);
  for (int32_t first = 0; first < lanes_of; first += equal) {
    const uint16_t bits = narrow(a[first], f.half);
    const float value = f.half ? rarefy_scalar::half_to_float(bits) : rarefy_scalar::bfloat_to_float(bits);
    for (int32_t i = first; i < first + equal; ++i) r[i] = value;
  }
  return r;
}

// What the rows of a tile want of a number.
struct Span { V low, high; };
inline Span span_of(Span a, int32_t tile) {
  for (int32_t distance = (tile < lanes_of ? tile : int32_t(lanes_of)) / 2; distance > 0; distance /= 2)
    a.low = smaller(a.low, moved(a.low, distance)), a.high = larger(a.high, moved(a.high, distance));
  return a;
}

// A number of each row, as a code of some bits for a step and a zero of the tile.
struct Level { V step, zero, code, value; };
inline Level level_of(V number, Span span, int32_t bits, float finest, const rarefy::Fit &f) {
  const V low = span.low, high = span.high;
  const V reach = larger(size_of(low), size_of(high));
  const float last = float((1 << bits) - 1);
  V step = stored(larger((high - low) / last, reach * finest), f);
  const W flat = (high == low) | (step == 0.f);
  step = flat ? stored(reach, f) : step;
  step = step == 0.f ? all(1.f) : step;
  const V zero = stored(flat ? (high < 0.f ? all(1.f) : V{}) : -low / step, f);
  const V code = bounded(number / step + zero, last);
  return {step, zero, code, step * (code - zero)};
}

// The scale and the zero that a row wants for a range, zero included, shrunk by a factor.
struct Wanted { V scale, zero; };
inline Wanted wanted(V low, V high, V factor, float finest, const rarefy::Fit &f) {
  low = smaller(low, V{}) * factor, high = larger(high, V{}) * factor;
  const V scale = larger((high - low) / float(f.levels - 1), larger(size_of(low), size_of(high)) * finest);
  return {scale, scale == 0.f ? all(float(f.levels / 2)) : -low / scale};
}

// What rounding costs each weight between `low` and `high`, and all of them but the one at `without`.
inline V costs(V *own, const V *values, const V *units, V low, V high, W without, float tiny, const rarefy::Fit &f) {
  const float last = float(f.levels - 1);
  const V step = larger((high - low) / last, all(tiny));
  V sum{};
  for (int32_t n = 0; n < f.size; ++n) {
    const V error = (values[n] - (bounded((values[n] - low) / step, last) * step + low)) / units[n];
    own[n] = error * error;
    sum += without == n ? V{} : own[n];
  }
  return sum;
}

// a ** power for a >= 0, to some units in the last place: 2 ** (power * log2(a)).
inline V raised(V a, float power) {
  const V safe = larger(a, all(1.17549435e-38f));
  const W shifted = (W)safe - 0x3f3504f3;  // so that the mantissa lies between the roots of 1/2 and 2
  const V exponent = __builtin_convertvector(shifted >> 23, V), m = (V)((W)safe - (shifted & ~0x7fffff)) - 1.f;
  // ln(1 + m) = m - m^2 / 2 + m^3 * p, with the coefficients of the Cephes library.
  V p = all(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * m + c;
  const V square = m * m, natural = m + (p * m * square - square * 0.5f);
  V y = (exponent + natural * 1.44269504f) * power;
  y = smaller(larger(y, all(-126.f)), all(127.f));
  const V whole = (y + 12582912.f) - 12582912.f, part = (y - whole) * 0.693147181f;
  V e = all(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) e = e * part + c;
  const V scale = (V)((__builtin_convertvector(whole, W) + 127) << 23);
  return a == 0.f ? V{} : e * scale;
}

// What a scale and a zero cost each row; `steps` are the values in units of the scale.
inline V lost(const V *values, const V *masses, const V *steps, V scale, V zero, float norm, const rarefy::Fit &f) {
  V error{};
  for (int32_t n = 0; n < f.size; ++n) {
    const V off = size_of(values[n] - (bounded(steps[n] + zero, float(f.levels - 1)) - zero) * scale);
    error += (norm == 2.f ? off * off : raised(off, norm)) * masses[n];
  }
  return error;
}

// Sixteen rows of a group: their values, outliers replaced, and what they want as if nobody shared it.
struct Rows {
  V values[32], masses[32];
  Wanted best;
};

void begin_fit(Rows &rows, const rarefy_fit &a, const rarefy::Fit &f, int64_t row, int64_t lanes) {
  const int64_t count = int64_t(a.members) * a.rows;
  V *values = rows.values, *masses = rows.masses, units[32], threshold = load(a.threshold + row, lanes);
  alignas(64) float spread[3][lanes_of];
  for (int64_t i = lanes; i < lanes_of; ++i) threshold[i] = threshold[lanes - 1];
  const bool one = row / a.rows == (row + lanes - 1) / a.rows && lanes == lanes_of;
  for (int32_t n = 0; n < f.size; ++n) {
    if (one) {
      const int64_t member = row / a.rows;
      values[n] = load(a.columns + member * a.columns_member + n * a.columns_column + row % a.rows, lanes);
      units[n] = all(a.unit[member * a.unit_member + n * a.unit_column]);
      masses[n] = all(a.mass[member * a.mass_member + n]);
      continue;
    }
    for (int64_t i = 0; i < lanes_of; ++i) {  // rows that are not there do as the last
      const int64_t flat = row + i < count ? row + i : count - 1, member = flat / a.rows;
      spread[0][i] = a.columns[member * a.columns_member + n * a.columns_column + flat % a.rows];
      spread[1][i] = a.unit[member * a.unit_member + n * a.unit_column];
      spread[2][i] = a.mass[member * a.mass_member + n];
    }
    values[n] = load(spread[0], lanes_of), units[n] = load(spread[1], lanes_of), masses[n] = load(spread[2], lanes_of);
  }

  // The two smallest and the two largest.
  V low = values[0], high = values[0], second_low = values[0], second_high = values[0];
  W lowest{}, highest{};
  for (int32_t n = 1; n < f.size; ++n) {
    const V value = values[n];
    const W below = value < low, above = value >= high;
    second_low = below ? low : n == 1 ? value : smaller(second_low, value);
    second_high = above ? high : n == 1 ? value : larger(second_high, value);
    low = below ? value : low, lowest = below ? W{} + n : lowest;
    high = above ? value : high, highest = above ? W{} + n : highest;
  }
  if (f.size > 1) {
    V gain[32], others[32], sum{}, kept{};
    const V whole = costs(gain, values, units, low, high, W{} - 1, a.tiny, f);
    const V without_low = costs(others, values, units, second_low, high, lowest, a.tiny, f);
    const V without_high = costs(others, values, units, low, second_high, highest, a.tiny, f);
    for (int32_t n = 0; n < f.size; ++n) {
      V own = lowest == n ? whole - without_low : gain[n];
      own = highest == n ? whole - without_high : own;
      gain[n] = own > threshold ? all(1.f) : V{};
      sum += gain[n] != 0.f ? V{} : values[n], kept += 1.f - gain[n];
    }
    const V mean = sum / larger(kept, all(1.f));
    for (int32_t n = 0; n < f.size; ++n) {
      values[n] = gain[n] != 0.f ? mean : values[n];
      low = n ? smaller(low, values[n]) : values[n], high = n ? larger(high, values[n]) : values[n];
    }
  }

  Wanted &best = rows.best = wanted(low, high, all(1.f), a.finest, f);
  if (a.factors) {
    V mass{};
    for (int32_t n = 0; n < f.size; ++n) mass += masses[n];
    for (int32_t n = 0; n < f.size; ++n) masses[n] = mass == 0.f ? all(1.f) : masses[n];
    V least{};
    for (int32_t tried = 0; tried < a.factors; ++tried) {
      const Wanted found = wanted(low, high, all(a.factor[tried]), a.finest, f);
      V steps[32];
      for (int32_t n = 0; n < f.size; ++n) steps[n] = found.scale == 0.f ? V{} : values[n] / found.scale;
      const V error = lost(values, masses, steps, found.scale, found.zero, a.norm, f);
      const W better = tried == 0 ? W{} - 1 : error < least;
      least = better ? error : least;
      best.scale = better ? found.scale : best.scale, best.zero = better ? found.zero : best.zero;
    }
  }
}

void end_fit(const Rows &rows, Span scales, Span zeros, const rarefy_fit &a, const rarefy::Fit &f, int64_t row, int64_t lanes) {
  const V *values = rows.values, *masses = rows.masses;
  Level scale = level_of(rows.best.scale, scales, f.scale_bits, a.finest, f);
  Level zero = level_of(rows.best.zero, zeros, f.zero_bits, a.finest, f);
  const bool nibbles = f.scale_bits <= 4 && f.zero_bits <= 4;
  if (a.factors && nibbles) {
    V least{}, scale_code{}, zero_code{};
    for (int32_t first = 0; first < 1 << f.scale_bits; ++first) {
      const V own = scale.step * (float(first) - scale.zero);
      V steps[32];
      for (int32_t n = 0; n < f.size; ++n) steps[n] = own == 0.f ? V{} : values[n] / own;
      for (int32_t second = 0; second < 1 << f.zero_bits; ++second) {
        const V error = lost(values, masses, steps, own, zero.step * (float(second) - zero.zero), a.norm, f);
        const W better = first + second == 0 ? W{} - 1 : error < least;
        least = better ? error : least;
        scale_code = better ? all(float(first)) : scale_code, zero_code = better ? all(float(second)) : zero_code;
      }
    }
    scale.code = scale_code, scale.value = scale.step * (scale_code - scale.zero);
    zero.code = zero_code, zero.value = zero.step * (zero_code - zero.zero);
  }
  store(a.scale + row, scale.value, lanes), store(a.zero + row, zero.value, lanes);
  for (int64_t i = 0; i < lanes; ++i) {
    const int32_t first = int32_t(scale.code[i]), second = int32_t(zero.code[i]);
    if (nibbles) a.codes[row + i] = uint8_t(first | second << 4);
    else a.codes[2 * (row + i)] = uint8_t(first), a.codes[2 * (row + i) + 1] = uint8_t(second);
    if ((row + i) % f.tile == 0) {
      uint16_t *order = a.second + (row + i) / f.tile * 4;
      order[0] = narrow(scale.step[i], f.half), order[1] = narrow(scale.zero[i], f.half);
      order[2] = narrow(zero.step[i], f.half), order[3] = narrow(zero.zero[i], f.half);
    }
  }
}

// `lanes` rows from `row` on: a whole number of tiles, or what is left of them.
void fit_around(const rarefy_fit &a, const rarefy::Fit &f, int64_t row, int64_t lanes) {
  Rows rows[RAREFY_FIT_ROWS / lanes_of];
  Span scales{}, zeros{};
  for (int64_t first = 0, part = 0; first < lanes; first += lanes_of, ++part) {
    begin_fit(rows[part], a, f, row + first, lanes - first < lanes_of ? lanes - first : lanes_of);
    const auto [scale, zero] = rows[part].best;
    scales = part ? Span{smaller(scales.low, scale), larger(scales.high, scale)} : Span{scale, scale};
    zeros = part ? Span{smaller(zeros.low, zero), larger(zeros.high, zero)} : Span{zero, zero};
  }
  scales = span_of(scales, f.tile), zeros = span_of(zeros, f.tile);
  for (int64_t first = 0, part = 0; first < lanes; first += lanes_of, ++part)
    end_fit(rows[part], scales, zeros, a, f, row + first, lanes - first < lanes_of ? lanes - first : lanes_of);
}

// ---- The best range of each group of a row; here lanes have neighbouring columns.

inline float as_stored(float value, int32_t type) {
  if (type == RAREFY_F32) return value;
  const uint16_t bits = narrow(value, type == RAREFY_F16);
  return type == RAREFY_F16 ? rarefy_scalar::half_to_float(bits) : rarefy_scalar::bfloat_to_float(bits);
}
inline float total(V a) {
  float sum = 0;
  for (int64_t i = 0; i < lanes_of; ++i) sum += a[i];
  return sum;
}

// Scale and zero as they are stored, for the range of a group shrunk by the factor number `tried`.
inline void even_steps(const rarefy_search &a, int32_t tried, float low, float high, float &scale, float &zero) {
  const bool constant = low == high && low != 0;
  const float least = low, most = high, middle = float(a.levels / 2), last = float(a.levels - 1);
  const float reach = std::fmax(std::fabs(low), std::fabs(high));
  if (a.zero == RAREFY_MIDDLE) {
    scale = as_stored(constant ? std::fabs(high) : reach * a.step[tried], a.type), zero = middle;
    return;
  }
  if (a.zero == RAREFY_WHOLE) low = std::fmin(low, 0.f), high = std::fmax(high, 0.f);
  low *= a.factor[tried], high *= a.factor[tried];
  scale = std::fmax((high - low) / last, std::fmax(std::fabs(low), std::fabs(high)) * a.finest);
  zero = scale == 0 ? middle : -low / scale;
  if (constant) scale = std::fmax(std::fabs(least), std::fabs(most)), zero = most < 0 ? 1.f : 0.f;
  if (a.zero == RAREFY_WHOLE) zero = __builtin_rintf(zero), zero = zero < 0 ? 0.f : zero > last ? last : zero;
  else zero = as_stored(zero, a.type);
  scale = as_stored(scale, a.type);
}

void search_ranges(const rarefy_search &a, int64_t row) {
  const int64_t groups = (a.columns + a.group_size - 1) / a.group_size;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * a.group_size, left = a.columns - first;
    const int64_t size = left < a.group_size ? left : a.group_size;
    const float *weight = a.weight + row * a.columns + first;
    const float *importance = a.importance ? a.importance + row * a.columns + first : nullptr;
    float low = weight[0], high = weight[0], mass = 0;
    for (int64_t n = 0; n < size; ++n) {
      low = weight[n] < low ? weight[n] : low, high = weight[n] > high ? weight[n] : high;
      mass += importance ? importance[n] : 1.f;
    }
    float least = 0;
    for (int32_t tried = 0; tried < a.factors; ++tried) {
      float scale, zero;
      even_steps(a, tried, low, high, scale, zero);
      const V divisor = all(scale == 0 ? 1.f : scale);
      V error{};
      for (int64_t n = 0; n < size; n += lanes_of) {
        const int64_t lanes = size - n < lanes_of ? size - n : lanes_of;
        const V value = load(weight + n, lanes);
        const V steps = scale == 0 ? V{} : value / divisor;
        const V lost = size_of(value - (bounded(steps + zero, float(a.levels - 1)) - zero) * scale);
        V counts = importance && mass != 0 ? load(importance + n, lanes) : all(1.f);
        for (int64_t i = lanes; i < lanes_of; ++i) counts[i] = 0;
        error += raised(lost, a.norm) * counts;
      }
      const float sum = total(error);
      if (tried == 0 || sum < least) least = sum, a.found[row * groups + group] = a.factor[tried];
    }
  }
}

constexpr rarefy::ColumnKernels columns_table = {round_columns, fit_around, search_ranges};

}  // namespace RAREFY_NS
