// Columns of every rule, in buffers of exactly their size, against plain loops, on the instruction set in use. Included
// by native.cpp.
#pragma once
#include "../columns.h"

namespace {

float small() { return (float((draw() >> 8) % 20001) - 10000.f) * 1e-5f; }
std::vector<float> many(int64_t count, float lift = 0) {
  std::vector<float> r(static_cast<size_t>(count));
  for (float &value : r) value = small() + lift;
  return r;
}

// A number of 16 bits.
double wide(uint16_t bits, bool half) {
  const int fraction = half ? 10 : 7, all = bits & 0x7fff, exponent = all >> fraction, rest = all & ((1 << fraction) - 1);
  const int bias = half ? 15 : 127;
  const double size = exponent ? std::ldexp(1. + std::ldexp(rest, -fraction), exponent - bias) : std::ldexp(rest, 1 - bias - fraction);
  return bits & 0x8000 ? -size : size;
}

void check_round(int32_t rule, bool rounds, int32_t members, int32_t rows, int32_t count, int32_t width) {
  const int64_t across = int64_t(members) * rows;
  std::vector<float> block = many(across * width), shares = many(int64_t(members) * count * width);
  std::vector<float> scale = many(2 * across, .2f), zero = many(2 * across, 3.f), reach = many(across, .3f);
  std::vector<float> unit = many(int64_t(members) * count, .2f), errors(size_t(across * count)), lost(size_t(across * count));
  std::vector<uint8_t> codes(size_t(across * count)), marked(size_t(across * count));
  for (uint8_t &mark : marked) mark = uint8_t(draw() >> 31);
  scale[0] = 0;
  rarefy_round a{};
  a.block = block.data(), a.errors = errors.data(), a.shares = shares.data(), a.scale = scale.data(), a.zero = zero.data();
  a.codes = rounds ? codes.data() : nullptr, a.marked = marked.data(), a.lost = lost.data();
  a.reach = reach.data(), a.unit = unit.data();
  a.block_member = int64_t(width) * rows, a.block_column = rows, a.errors_member = int64_t(count) * rows, a.errors_column = rows;
  a.shares_member = int64_t(count) * width, a.shares_row = width, a.unit_member = count, a.unit_column = 1;
  a.members = members, a.rows = rows, a.count = count, a.width = width, a.last = 7;
  for (int32_t n = 0; n < count; ++n) a.group[n] = n % 2;
  std::vector<float> expected = block;
  std::vector<uint8_t> given = marked;
  rarefy_round_columns(&a, rule);
  const bool fused = std::strcmp(rarefy_instructions(), "scalar") != 0;
  for (int64_t own = 0; own < across; ++own) {
    const int64_t member = own / rows, row = own % rows;
    for (int32_t n = 0; n < count; ++n) {
      float *column = &expected[size_t((member * width + n) * rows + row)];
      const float s = scale[size_t(n % 2 * across + own)], z = zero[size_t(n % 2 * across + own)];
      const float code = std::fmin(std::fmax(std::nearbyint(z + (s == 0 ? 0.f : *column / s)), 0.f), 7.f);
      const float gone = rounds ? *column - (code - z) * s : 0.f;
      const size_t at = size_t(n * across + own);
      bool mark = given[at] != 0;
      if (rule == RAREFY_CHOOSE) mark = std::fabs(gone) > reach[size_t(own)] * unit[size_t(member * count + n)];
      const float error = rule == RAREFY_DROP && !mark ? *column : rule >= RAREFY_SPARE && mark ? 0.f : gone;
      // Without fused products a later column may fall on the other side of a tie.
      if (fused || n == 0) {
        expect(!rounds || codes[at] == uint8_t(code), "codes of columns", rule);
        expect(errors[size_t((member * count + n) * rows + row)] == error, "errors of columns", rule);
        expect(rule < RAREFY_SPARE || (lost[at] == gone && marked[at] == mark), "outliers of columns", rule);
      }
      for (int32_t later = n + 1; later < width; ++later) {
        float *next = &expected[size_t((member * width + later) * rows + row)];
        *next = std::fma(-error, shares[size_t((member * count + n) * width + later)], *next);
      }
    }
  }
  for (size_t i = 0; fused && i < block.size(); ++i) expect(block[i] == expected[i], "columns behind", rule);
}

// Groups have the steps that their codes stand for, and no lane reads or writes beyond what there is.
void check_fit(int32_t size, int32_t members, int32_t rows, int32_t tile, int32_t bits, bool half, int32_t factors) {
  const int64_t across = int64_t(members) * rows, tiles = (across + tile - 1) / tile;
  std::vector<float> columns = many(across * size), unit = many(int64_t(members) * size, .3f), mass = many(int64_t(members) * size, .2f);
  std::vector<float> threshold = many(across, .1f), scale(static_cast<size_t>(across)), zero(static_cast<size_t>(across));
  std::vector<uint8_t> codes(size_t(across * (bits <= 4 ? 1 : 2)));
  std::vector<uint16_t> second(size_t(tiles * 4));
  rarefy_fit a{};
  a.columns = columns.data(), a.unit = unit.data(), a.mass = mass.data(), a.threshold = threshold.data();
  a.codes = codes.data(), a.second = second.data(), a.scale = scale.data(), a.zero = zero.data();
  a.columns_member = int64_t(size) * rows, a.columns_column = rows, a.unit_member = a.mass_member = size, a.unit_column = 1;
  a.members = members, a.rows = rows, a.factors = factors, a.finest = 6e-5f, a.tiny = 1e-38f, a.norm = 2.4f;
  for (int32_t n = 0; n < factors; ++n) a.factor[n] = 1.f - .02f * float(n);
  rarefy_fit_around(&a, size, 8, bits, bits, tile, half);
  for (int64_t row = 0; row < across; ++row) {
    const uint16_t *own = &second[size_t(row / tile * 4)];
    const uint8_t *code = &codes[size_t(bits <= 4 ? row : 2 * row)];
    const int number = bits <= 4 ? code[0] & 15 : code[0];
    expect(std::fabs(scale[size_t(row)] - wide(own[0], half) * (number - wide(own[1], half))) <= 1e-6, "scale of a group", size);
    expect(scale[size_t(row)] >= 0 && scale[size_t(row)] < .2f, "size of a scale", size);
  }
}

void check_search(int64_t rows, int64_t columns, int64_t size, int32_t zero, int32_t type, bool weighted) {
  std::vector<float> weight = many(rows * columns), importance = many(rows * columns, .2f);
  std::vector<float> found(size_t(rows * ((columns + size - 1) / size)));
  rarefy_search a{};
  a.weight = weight.data(), a.importance = weighted ? importance.data() : nullptr, a.found = found.data();
  a.rows = rows, a.columns = columns, a.group_size = size, a.factors = 5, a.levels = 8, a.zero = zero, a.type = type;
  a.finest = 6e-5f, a.norm = 2.4f;
  for (int32_t n = 0; n < 5; ++n) a.factor[n] = 1.f - .1f * float(n), a.step[n] = a.factor[n] * 2.f / 7.f;
  rarefy_search_ranges(&a);
  for (float factor : found) expect(factor <= 1.f && factor >= .5f, "factor of a range", size);
}

void check_columns() {
  for (int32_t rule = RAREFY_EVERY; rule <= RAREFY_CHOOSE; ++rule) {
    check_round(rule, true, 1, 1, 1, 1);
    check_round(rule, true, 2, 37, 5, 9);
    check_round(rule, true, 1, 16, 20, 20);
  }
  check_round(RAREFY_DROP, false, 3, 5, 4, 300);
  check_fit(16, 1, 32, 16, 3, true, 20);
  check_fit(7, 2, 8, 4, 5, false, 3);
  check_fit(1, 1, 5, 16, 3, true, 0);
  check_fit(32, 3, 9, 1, 4, true, 2);
  check_fit(16, 2, 51, 64, 4, true, 3);
  for (int32_t zero = RAREFY_MIDDLE; zero <= RAREFY_REAL; ++zero)
    for (int32_t type : {RAREFY_F32, RAREFY_F16, RAREFY_BF16}) check_search(3, 45, 20, zero, type, zero % 2 == 0);
}

}  // namespace
