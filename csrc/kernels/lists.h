// Terms that are not codes in fixed places: rows with tables of their own, values under a mask, entries, groups.
#pragma once
#include "exact.h"

namespace RAREFY_NS {

// ---- TABLES: 16 columns of one row in the lanes, each lane's codes of 8 such stretches in one word.

template <int BITS> struct RowWords {
  I low, high;
  explicit RowWords(const uint8_t *p) {
    if constexpr (BITS == 4) low = load_i(p);
    else if constexpr (BITS >= 2) low = load_words(p);
    else low = load_bytes(p);
    high = BITS == 3 ? load_bytes(p + 32) : low;
  }
  // The codes of stretch N, in the lowest four bits.
  template <int N> I codes() const {
    if constexpr (BITS == 4) return shr_i<4 * N>(low);
    I plain = and_i(shr_i<(BITS == 1 ? N : 2 * N)>(low), BITS == 1 ? 1 : 3);
    if constexpr (BITS == 3) return or_i(plain, and_i(N < 2 ? shl_i<(N < 2 ? 2 - N : 0)>(high) : shr_i<(N < 2 ? 0 : N - 2)>(high), 4));
    return plain;
  }
};

// The table of one row and group, zero beyond its entries.
static inline Table row_table(const rarefy_term &t, int64_t row, int64_t group, int64_t groups) {
  int64_t tile = row / 16, at = ((tile * groups + group) * 16 + row % 16) * t.entries;
  float own[16] = {};
  for (int i = 0; i < t.entries; ++i) own[i] = load_one(t.table, t.scale_type, at + i) * t.multiplier;
  return table_f(own);
}

template <int BITS, class Use>
static inline void each_stretch(const rarefy_term &t, int64_t row, int64_t panel, Table table, Use use) {
  const uint8_t *p = static_cast<const uint8_t *>(t.codes.data) +
                     (((row / 16) * rarefy::panels_of(t) + panel) * 16 + row % 16) * 16 * BITS;
  RowWords<BITS> words(p);
  prefetch_far(p + far);
  auto each = [&](auto n) __attribute__((always_inline)) {
    constexpr int N = decltype(n)::value;
    use(N, lookup_f(table, words.template codes<N>()));
  };
  each(Count<0>{}), each(Count<1>{}), each(Count<2>{}), each(Count<3>{});
  each(Count<4>{}), each(Count<5>{}), each(Count<6>{}), each(Count<7>{});
}

template <int BITS, int M>
static void tables_few(const rarefy_term &t, const rarefy_input &in, int64_t tile, int64_t first, float (*acc)[16]) {
  int64_t panels = rarefy::panels_of(t), groups = rarefy::groups_of(t);
  int64_t per_group = groups == 1 ? panels : t.group_size / panel_columns;
  F sums[16][M];
  for (int r = 0; r < 16; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = zero_f();
  for (int64_t g = 0; g < groups; ++g) {
    int64_t end = (g + 1) * per_group < panels ? (g + 1) * per_group : panels;
    Table tables[16];
    for (int r = 0; r < 16; ++r) tables[r] = row_table(t, tile * 16 + r, g, groups);
    for (int64_t panel = g * per_group; panel < end; ++panel)
      for (int r = 0; r < 16; ++r) {
        F even[M], odd[M];
        for (int m = 0; m < M; ++m) even[m] = sums[r][m], odd[m] = zero_f();
        each_stretch<BITS>(t, tile * 16 + r, panel, tables[r], [&](int n, F w) __attribute__((always_inline)) {
          for (int m = 0; m < M; ++m) {
            F x = load_f(in.x + (first + m) * in.stride + panel * panel_columns + 16 * n);
            if (n % 2) odd[m] = fma_f(w, x, odd[m]);
            else even[m] = fma_f(w, x, even[m]);
          }
        });
        for (int m = 0; m < M; ++m) sums[r][m] = add_f(even[m], odd[m]);
      }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < 16; ++r) acc[m][r] += sum_f(sums[r][m]);
}

template <int BITS>
static void tables_panel(const rarefy_term &t, int64_t tile, int64_t k0, float *panel, bool add) {
  int64_t groups = rarefy::groups_of(t), group = groups == 1 ? 0 : k0 / t.group_size;
  alignas(64) float row[panel_columns];
  for (int r = 0; r < 16; ++r) {
    Table table = row_table(t, tile * 16 + r, group, groups);
    each_stretch<BITS>(t, tile * 16 + r, k0 / panel_columns, table,
                       [&](int n, F w) __attribute__((always_inline)) { store_f(row + 16 * n, w); });
    for (int k = 0; k < panel_columns; ++k) panel[16 * k + r] = add ? panel[16 * k + r] + row[k] : row[k];
  }
}

// ---- VALUES: floats at the set bits of a mask, column by column.

template <int TYPE> static inline F expand_typed(const void *values, int64_t at, uint32_t mask) {
  if (TYPE == RAREFY_F16) return expand_half(static_cast<const uint16_t *>(values) + at, mask);
  if (TYPE == RAREFY_BF16) return expand_bfloat(static_cast<const uint16_t *>(values) + at, mask);
  return expand_f32(static_cast<const float *>(values) + at, mask);
}

static inline F expand_values(const rarefy_term &t, int64_t at, uint32_t mask) {
  if (t.scale_type == RAREFY_F16) return expand_typed<RAREFY_F16>(t.codes.data, at, mask);
  if (t.scale_type == RAREFY_BF16) return expand_typed<RAREFY_BF16>(t.codes.data, at, mask);
  return expand_typed<RAREFY_F32>(t.codes.data, at, mask);
}

// use(column, 16 values) for columns [k0, k1); `at` is the first value, and afterwards the next one.
template <class Use>
static inline void each_column(const rarefy_term &t, int64_t tile, int64_t k0, int64_t k1, int64_t &at, Use use) {
  const uint16_t *masks = static_cast<const uint16_t *>(t.positions.data) + tile * rarefy::units_of(t) * 32;
  for (int64_t k = k0; k < k1; ++k) {
    use(k, expand_values(t, at, masks[k]));
    at += __builtin_popcount(masks[k]);
  }
}

template <int TYPE, int M>
static void values_few(const rarefy_term &t, const rarefy_input &in, int64_t tile, int64_t first, float (*acc)[16]) {
  int64_t at = static_cast<const int64_t *>(t.pointers.data)[tile];
  const uint16_t *masks = static_cast<const uint16_t *>(t.positions.data) + tile * rarefy::units_of(t) * 32;
  const float *x = in.x + first * in.stride;
  const void *values = t.codes.data;
  F even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = load_f(acc[m]), odd[m] = zero_f();
  for (int64_t k = 0; k < t.columns; k += 2) {  // masks and x go on, empty and zero, to a multiple of 32
    F left = expand_typed<TYPE>(values, at, masks[k]);
    at += __builtin_popcount(masks[k]);
    F right = expand_typed<TYPE>(values, at, masks[k + 1]);
    at += __builtin_popcount(masks[k + 1]);
    for (int m = 0; m < M; ++m) {
      even[m] = fma_f(left, set_f(x[m * in.stride + k]), even[m]);
      odd[m] = fma_f(right, set_f(x[m * in.stride + k + 1]), odd[m]);
    }
  }
  for (int m = 0; m < M; ++m) store_f(acc[m], add_f(even[m], odd[m]));
}

// ---- GROUPS: short stretches of columns of one row, each with a scale.

static inline float group_code(const uint8_t *codes, int32_t bits, int64_t index) {
  int64_t bit = index * bits;
  uint32_t word = codes[bit >> 3] | uint32_t(codes[(bit >> 3) + 1]) << 8;
  return float(word >> (bit & 7) & ((1u << bits) - 1));
}

// The values of kept group `at`, floats [group_size], a multiple of 16.
static inline void group_values(const rarefy_term &t, int64_t at, float *values) {
  int64_t size = t.group_size, bytes = size / 8 * t.bits;
  const uint8_t *codes = static_cast<const uint8_t *>(t.codes.data) + at * bytes;
  float scale = load_one(t.scale, t.scale_type, at) * t.multiplier, zero = t.zero;
  if (t.zero_type == RAREFY_U8) zero = static_cast<const uint8_t *>(t.zero_point.data)[at];
  else if (t.zero_type != RAREFY_NONE) zero = load_one(t.zero_point, t.zero_type, at);
  F scales = set_f(scale), zeros = set_f(zero);
  if (t.bits == 4) {
    for (int64_t i = 0; i < size; i += 16) {
      alignas(64) uint8_t wide[64];
      store_b(wide, nibbles_b(codes + i / 2));
      store_f(values + i, mul_f(sub_f(load_bytes_f(wide), zeros), scales));
    }
    return;
  }
  for (int64_t i = 0; i < size; ++i) values[i] = (group_code(codes, t.bits, i) - zero) * scale;
}

static inline void groups_rows(const rarefy_term &t, const rarefy_input &in, int64_t tile, int64_t first,
                               int64_t tokens, float (*acc)[16]) {
  const int32_t *pointers = static_cast<const int32_t *>(t.pointers.data);
  const uint16_t *ids = static_cast<const uint16_t *>(t.positions.data);
  int64_t rows = t.rows - tile * 16 < 16 ? t.rows - tile * 16 : 16;
  alignas(64) float values[rarefy::largest_group];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t m0 = 0; m0 < tokens; m0 += 4) {
      int64_t count = tokens - m0 < 4 ? tokens - m0 : 4;
      F sums[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
      for (int64_t at = pointers[tile * 16 + r]; at < pointers[tile * 16 + r + 1]; ++at) {
        group_values(t, at, values);
        int64_t start = ids[at] * t.group_size;  // columns beyond the last are zero up to the stride
        for (int64_t i = 0; i < t.group_size && start + i < in.columns; i += 16) {
          F w = load_f(values + i);
          for (int64_t m = 0; m < count; ++m)
            sums[m] = fma_f(w, load_f(in.x + (first + m0 + m) * in.stride + start + i), sums[m]);
        }
      }
      for (int64_t m = 0; m < count; ++m) acc[m0 + m][r] += sum_f(sums[m]);
    }
}

static inline void groups_panel(const rarefy_term &t, int64_t tile, int64_t k0, float *panel, bool add) {
  if (!add) __builtin_memset(panel, 0, panel_columns * 16 * sizeof(float));
  const int32_t *pointers = static_cast<const int32_t *>(t.pointers.data);
  const uint16_t *ids = static_cast<const uint16_t *>(t.positions.data);
  int64_t rows = t.rows - tile * 16 < 16 ? t.rows - tile * 16 : 16;
  alignas(64) float values[rarefy::largest_group];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t at = pointers[tile * 16 + r]; at < pointers[tile * 16 + r + 1]; ++at) {
      int64_t start = ids[at] * t.group_size - k0;
      if (start >= panel_columns || start + t.group_size <= 0) continue;
      group_values(t, at, values);
      for (int64_t i = 0; i < t.group_size; ++i)
        if (start + i >= 0 && start + i < panel_columns) panel[(start + i) * 16 + r] += values[i];
    }
}

}  // namespace RAREFY_NS
