// Two-level scales and zeros of one group of columns, fitted around the weights that would spoil it.
//
// A lane has a row of the group in registers; the TILE lanes whose rows share second-level numbers settle these by
// shuffles. A weight spoils its group when the cost of rounding it, (error / unit)^2 summed over the group, falls by more
// than the row's threshold once the weight is left out, which changes the range only for the smallest and the largest.
// Each row takes the factor on the others' range that costs it least. What the rows of a tile want spans the second
// level, and then each row takes the pair of codes, of a scale and a zero, that costs it least.
//
// Macros: SIZE (columns), TILE (rows; a power of two up to 32), LEVELS, SCALE_BITS, ZERO_BITS, SEARCH (whether there are
// factors), WARPS (that share factors and codes for 32 rows), HALF (second level in float16, else bfloat16).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

constexpr int MOST = 128;  // factors

struct Arguments {
  const float* columns;    // [members][SIZE][rows]
  const float* unit;       // [members][SIZE]
  const float* mass;       // likewise: what an error counts
  const float* threshold;  // [members * rows]
  u8* codes;               // [members * rows][1 or 2]
  u16* second;             // [tiles][4]
  float* scale;            // [members * rows]
  float* zero;             // likewise
  i64 columns_member, columns_column, unit_member, unit_column, mass_member;
  int members, rows, factors;
  float finest;            // the smallest step as a share of the largest number
  float tiny;              // the smallest step at all
  float norm;              // power of an error
  float factor[MOST];
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

shared_memory(pool);

device float other(float value, int distance) { return as_float(of_lane(bits_of(value), (threadIdx.x % 32) ^ distance)); }
device float least_of_tile(float value) {
#pragma unroll
  for (int distance = TILE / 2; distance > 0; distance /= 2) value = fminf(value, other(value, distance));
  return value;
}
device float most_of_tile(float value) {
#pragma unroll
  for (int distance = TILE / 2; distance > 0; distance /= 2) value = fmaxf(value, other(value, distance));
  return value;
}
device float bounded(float value, int last) { return fminf(fmaxf(rintf(value), 0.0f), float(last)); }
// As a number that is stored in 16 bits.
device float stored(float value) { return widened(rounded<HALF>(value)); }

// A number of each row, as a code of BITS for a step and a zero of the tile.
struct Level { float step, zero, code, value; };
template <int BITS> device Level level_of(float number, float finest) {
  const float low = least_of_tile(number), high = most_of_tile(number);
  const float reach = fmaxf(fabsf(low), fabsf(high));
  float step = stored(fmaxf((high - low) / float((1 << BITS) - 1), reach * finest));
  const bool flat = high == low || step == 0.0f;
  if (flat) step = stored(reach);
  if (step == 0.0f) step = 1.0f;
  const float zero = stored(flat ? (high < 0.0f ? 1.0f : 0.0f) : -low / step);
  const float code = bounded(number / step + zero, (1 << BITS) - 1);
  return {step, zero, code, step * (code - zero)};
}

// The scale and the zero that a row wants for a range, zero included, shrunk by a factor.
struct Wanted { float scale, zero; };
device Wanted wanted(float low, float high, float factor, float finest) {
  low = fminf(low, 0.0f) * factor, high = fmaxf(high, 0.0f) * factor;
  const float scale = fmaxf((high - low) / float(LEVELS - 1), fmaxf(fabsf(low), fabsf(high)) * finest);
  return {scale, scale == 0.0f ? float(LEVELS / 2) : -low / scale};
}

#if SEARCH
// The values in units of a scale.
device void divided(float (&steps)[SIZE], const float (&values)[SIZE], float scale) {
#pragma unroll
  for (int n = 0; n < SIZE; ++n) steps[n] = scale == 0.0f ? 0.0f : values[n] / scale;
}
// What a scale and a zero cost a row.
device float lost(const float (&values)[SIZE], const float (&masses)[SIZE], const float (&steps)[SIZE], float scale, float zero, float norm) {
  float error = 0.0f;
#pragma unroll
  for (int n = 0; n < SIZE; ++n) {
    const float off = fabsf(values[n] - (bounded(steps[n] + zero, LEVELS - 1) - zero) * scale);
    error += (norm == 2.0f ? off * off : powf(off, norm)) * masses[n];
  }
  return error;
}
// The first place of least error that a warp of the block has found for a row; `place` is negative where it found none.
device int first_of_best(float error, int place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float(&errors)[WARPS][32] = *reinterpret_cast<float(*)[WARPS][32]>(pool);
  int(&places)[WARPS][32] = *reinterpret_cast<int(*)[WARPS][32]>(pool + sizeof errors);
  errors[warp][lane] = error, places[warp][lane] = place;
  block_barrier();
  error = errors[0][lane], place = places[0][lane];
#pragma unroll
  for (int from = 1; from < WARPS; ++from) {
    const float own = errors[from][lane];
    const int at = places[from][lane];
    if (at >= 0 && (own < error || (own == error && at < place))) error = own, place = at;
  }
  block_barrier();
  return place;
}
#endif

// What rounding costs each weight between two of them, and all of them but the one at `without`.
device float costs(float (&own)[SIZE], const float (&values)[SIZE], const float (&units)[SIZE], float low, float high, int without, float tiny) {
  const float step = fmaxf((high - low) / float(LEVELS - 1), tiny);
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < SIZE; ++n) {
    const float error = (values[n] - (bounded((values[n] - low) / step, LEVELS - 1) * step + low)) / units[n];
    own[n] = error * error;
    sum += n == without ? 0.0f : own[n];
  }
  return sum;
}

extern "C" global void __launch_bounds__(32 * WARPS) rarefy_fit_around(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int count = a.members * a.rows, number = blockIdx.x * 32 + lane;
  const bool real = number < count;
  const int flat = real ? number : count - 1;  // rows that are not there do as the last
  const int member = flat / a.rows, row = flat % a.rows;
  float values[SIZE], units[SIZE];
#pragma unroll
  for (int n = 0; n < SIZE; ++n) {
    values[n] = a.columns[member * a.columns_member + n * a.columns_column + row];
    units[n] = a.unit[member * a.unit_member + n * a.unit_column];
  }

  // The two smallest and the two largest.
  float low = values[0], high = values[0], second_low = 0.0f, second_high = 0.0f;
  int lowest = 0, highest = 0;
#pragma unroll
  for (int n = 1; n < SIZE; ++n) {
    const bool below = values[n] < low, above = values[n] >= high;
    second_low = below ? low : n == 1 ? values[n] : fminf(second_low, values[n]);
    second_high = above ? high : n == 1 ? values[n] : fmaxf(second_high, values[n]);
    if (below) low = values[n], lowest = n;
    if (above) high = values[n], highest = n;
  }
  if (SIZE > 1) {
    const float threshold = a.threshold[flat];
    float gain[SIZE], others[SIZE];
    const float whole = costs(gain, values, units, low, high, SIZE, a.tiny);
    const float without_low = costs(others, values, units, second_low, high, lowest, a.tiny);
    const float without_high = costs(others, values, units, low, second_high, highest, a.tiny);
    float sum = 0.0f, kept = 0.0f;
#pragma unroll
    for (int n = 0; n < SIZE; ++n) {
      if (n == lowest) gain[n] = whole - without_low;
      if (n == highest) gain[n] = whole - without_high;
      others[n] = gain[n] > threshold ? 1.0f : 0.0f;
      if (others[n] == 0.0f) sum += values[n], kept += 1.0f;
    }
    const float mean = sum / fmaxf(kept, 1.0f);
#pragma unroll
    for (int n = 0; n < SIZE; ++n)
      if (others[n] != 0.0f) values[n] = mean;
    low = high = values[0];
#pragma unroll
    for (int n = 1; n < SIZE; ++n) low = fminf(low, values[n]), high = fmaxf(high, values[n]);
  }

  float factor = 1.0f;
#if SEARCH
  float masses[SIZE], steps[SIZE], all = 0.0f;
#pragma unroll
  for (int n = 0; n < SIZE; ++n) masses[n] = a.mass[member * a.mass_member + n], all += masses[n];
#pragma unroll
  for (int n = 0; n < SIZE; ++n) masses[n] = all == 0.0f ? 1.0f : masses[n];
  float least = 0.0f;
  int place = -1;
  for (int tried = warp; tried < a.factors; tried += WARPS) {
    const Wanted found = wanted(low, high, a.factor[tried], a.finest);
    divided(steps, values, found.scale);
    const float error = lost(values, masses, steps, found.scale, found.zero, a.norm);
    if (place < 0 || error < least) least = error, place = tried;
  }
  factor = a.factor[first_of_best(least, place)];
#endif
  const Wanted best = wanted(low, high, factor, a.finest);
  Level scale = level_of<SCALE_BITS>(best.scale, a.finest), zero = level_of<ZERO_BITS>(best.zero, a.finest);
  constexpr bool NIBBLES = SCALE_BITS <= 4 && ZERO_BITS <= 4;
#if SEARCH
  if (NIBBLES) {
    constexpr int ZEROS = 1 << ZERO_BITS;
    place = -1;
    for (int first = warp; first < 1 << SCALE_BITS; first += WARPS) {
      const float own = scale.step * (float(first) - scale.zero);
      divided(steps, values, own);
      for (int second = 0; second < ZEROS; ++second) {
        const float error = lost(values, masses, steps, own, zero.step * (float(second) - zero.zero), a.norm);
        if (place < 0 || error < least) least = error, place = first * ZEROS + second;
      }
    }
    place = first_of_best(least, place);
    scale.code = float(place / ZEROS), scale.value = scale.step * (scale.code - scale.zero);
    zero.code = float(place % ZEROS), zero.value = zero.step * (zero.code - zero.zero);
  }
  if (warp != 0) return;
#endif
  if (!real) return;
  a.scale[flat] = scale.value, a.zero[flat] = zero.value;
  const int scale_code = int(scale.code), zero_code = int(zero.code);
  if (NIBBLES) {
    a.codes[flat] = u8(scale_code | zero_code << 4);
  } else {
    a.codes[2 * flat] = u8(scale_code), a.codes[2 * flat + 1] = u8(zero_code);
  }
  if (flat % TILE == 0) {
    u16* const second = a.second + flat / TILE * 4;
    second[0] = rounded<HALF>(scale.step), second[1] = rounded<HALF>(scale.zero);
    second[2] = rounded<HALF>(zero.step), second[3] = rounded<HALF>(zero.zero);
  }
}
