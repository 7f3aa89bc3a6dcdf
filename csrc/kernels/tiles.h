// Products of whole tiles: which kernel serves which term, and what an instruction set offers to the library.
#pragma once
#include "convert.h"
#include "lists.h"

namespace RAREFY_NS {

static inline void panel_of(const rarefy_term &t, const Wide &wide, int64_t tile, int64_t k0, float *panel,
                            bool add, Cursor &cursor) {
  switch (t.kind) {
    case RAREFY_CODES:
    case RAREFY_KEPT: return codes_panel(t, wide, tile, k0, panel, add, cursor);
    case RAREFY_TABLES:
      if (t.bits == 1) return tables_panel<1>(t, tile, k0, panel, add);
      if (t.bits == 2) return tables_panel<2>(t, tile, k0, panel, add);
      if (t.bits == 3) return tables_panel<3>(t, tile, k0, panel, add);
      return tables_panel<4>(t, tile, k0, panel, add);
    case RAREFY_VALUES: {
      int64_t end = k0 + panel_columns < t.columns ? k0 + panel_columns : t.columns;
      int64_t at = static_cast<const int64_t *>(t.pointers.data)[tile] + cursor.at[0], start = at;
      if (!add) __builtin_memset(panel, 0, panel_columns * 16 * sizeof(float));
      each_column(t, tile, k0, end, at, [&](int64_t k, F w) { put(panel + 16 * (k - k0), w, add); });
      cursor.at[0] += at - start;
      return;
    }
    case RAREFY_ENTRIES: return entries_panel(t, tile, k0, panel, add);
    default: return groups_panel(t, tile, k0, panel, add);
  }
}

static inline const rarefy_blocks *blocks_of(const rarefy_term &t, const rarefy_input &in) {
  int64_t size = rarefy::block_of(t);
  for (int32_t i = 0; i < in.blockings; ++i)
    if (in.blocks[i].size == size) return &in.blocks[i];
  return nullptr;
}

// Whether the term multiplies a few tokens without a panel.
static inline bool exact_directly(const rarefy_term &t) {
  if (t.kind != RAREFY_CODES) return true;
  if (t.table.bytes) {
    bool both = t.scale_layout == RAREFY_SIGNED;  // sides of a table have a sum each
    return (both ? t.bits == 3 || t.bits == 4 || t.bits == 6 || t.bits == 8 : t.bits >= 3) && rarefy::block_of(t) >= 32;
  }
  return rarefy::block_of(t) >= 16;
}

template <int M>
static void exact_lists(const rarefy_term &t, const rarefy_input &in, int64_t tile, int64_t first, float (*acc)[16]) {
  if (t.kind == RAREFY_VALUES) {
    if (t.scale_type == RAREFY_F16) return values_few<RAREFY_F16, M>(t, in, tile, first, acc);
    if (t.scale_type == RAREFY_BF16) return values_few<RAREFY_BF16, M>(t, in, tile, first, acc);
    return values_few<RAREFY_F32, M>(t, in, tile, first, acc);
  }
  if (t.bits == 1) return tables_few<1, M>(t, in, tile, first, acc);
  if (t.bits == 2) return tables_few<2, M>(t, in, tile, first, acc);
  if (t.bits == 3) return tables_few<3, M>(t, in, tile, first, acc);
  tables_few<4, M>(t, in, tile, first, acc);
}

static void exact_directly(const rarefy_term &t, const rarefy_input &in, const Wide &wide, const rarefy_term *beside,
                           int64_t tile, int64_t first, int64_t tokens, float (*acc)[16]) {
  if (rarefy::reads_blocks(t)) return exact_codes(t, in, *blocks_of(t, in), wide, beside, tile, first, tokens, acc);
  if (t.kind == RAREFY_GROUPS) return groups_rows(t, in, tile, first, tokens, acc);
  if (t.kind == RAREFY_ENTRIES) {
    for (; tokens >= 4; tokens -= 4, first += 4, acc += 4) entries_few<4>(t, in, tile, first, acc);
    for (; tokens; --tokens, ++first, ++acc) entries_few<1>(t, in, tile, first, acc);
    return;
  }
  for (; tokens >= 2; tokens -= 2, first += 2, acc += 2) exact_lists<2>(t, in, tile, first, acc);
  if (tokens) exact_lists<1>(t, in, tile, first, acc);
}

// Corrections cost less entry by entry than in a panel, whatever the number of tokens.
static inline bool is_correction(const rarefy_term &t) { return t.kind == RAREFY_ENTRIES; }

// The first term that does the corrections of `beside` while it waits for its codes; -1 if none does.
static inline int32_t corrector(const rarefy_term *terms, int32_t count, const rarefy_input &in) {
  for (int32_t i = 0; i < count; ++i) {
    const rarefy_term &t = terms[i];
    if (!rarefy::reads_blocks(t) || t.columns > 65536) continue;
    if (in.mode == RAREFY_FAST && multiplies_bytes(t) ? fast_corrects(t, *blocks_of(t, in), in.tokens)
                                                      : in.tokens <= few && exact_directly(t))
      return i;
  }
  return -1;
}

static void tiles(const rarefy_term *terms, int32_t count, const rarefy_input *input, int64_t first, int64_t last,
                  float *y, int64_t y_stride) {
  const rarefy_input &in = *input;
  alignas(64) float acc[abreast_tiles * chunk_tokens][16], panel[panel_columns * 16];
  Parts parts[rarefy::max_terms];
  Wide wide[rarefy::max_terms];
  int32_t last_entries = -1;
  for (int32_t i = 0; i < count; ++i) {
    if (in.mode == RAREFY_FAST && multiplies_bytes(terms[i]) && terms[i].table.bytes) parts[i] = split_table(terms[i]);
    else wide[i] = Wide(terms[i]);
    if (is_correction(terms[i])) last_entries = i;
  }
  // A chunk of tokens stays in the cache for all tiles; codes are read again for the next, which takes next to no time.
  int64_t step = in.tokens <= few ? 1 : abreast_tiles;
  for (int64_t m0 = 0; m0 < in.tokens; m0 += chunk_tokens)
    for (int64_t begin = first; begin < last; begin += step) {
      int64_t tokens = in.tokens - m0 < chunk_tokens ? in.tokens - m0 : chunk_tokens;
      int64_t end = begin + step < last ? begin + step : last;
      for (int64_t tile = 0; tile < end - begin; ++tile)
        __builtin_memset(acc + tile * chunk_tokens, 0, size_t(tokens) * 64);
      int32_t left[rarefy::max_terms], panels = 0, busy = last_entries < 0 ? -1 : corrector(terms, count, in);
      for (int32_t i = 0; i < count; ++i) {
        const rarefy_term &t = terms[i];
        if (busy >= 0 && i == last_entries) continue;
        const rarefy_term *beside = i == busy ? &terms[last_entries] : nullptr;
        if (in.mode == RAREFY_FAST && multiplies_bytes(t))
          fast(t, in, *blocks_of(t, in), parts[i], beside, begin, end, m0, tokens, acc);
        else if (exact_directly(t) && (in.tokens <= few || is_correction(t)))
          for (int64_t tile = begin; tile < end; ++tile)
            exact_directly(t, in, wide[i], beside, tile, m0, tokens, acc + (tile - begin) * chunk_tokens);
        else
          left[panels++] = i;
      }
      for (int64_t tile = begin; tile < end; ++tile) {
        float(*own)[16] = acc + (tile - begin) * chunk_tokens;
        Cursor cursors[rarefy::max_terms] = {};
        for (int64_t k0 = 0; panels && k0 < terms[0].columns; k0 += panel_columns) {
          for (int32_t i = 0; i < panels; ++i)
            panel_of(terms[left[i]], wide[left[i]], tile, k0, panel, i > 0, cursors[i]);
          multiply_panel(panel, in, k0, m0, tokens, own);
        }
      }
      for (int64_t m = 0; m < tokens; ++m)
        for (int64_t tile = begin; tile < end; ++tile) {
          const float *own = acc[(tile - begin) * chunk_tokens + m];
          float *to = y + (m0 + m) * y_stride + tile * 16;
          if (int64_t rows = terms[0].rows - tile * 16; rows >= 16) store_f(to, load_f(own));
          else __builtin_memcpy(to, own, size_t(rows) * sizeof(float));
        }
    }
}

// The 16 rows of a tile as floats [rows, columns] from `weight` on, which is row 0 of the whole weight.
static void decode(const rarefy_term *terms, int32_t count, int64_t tile, float *weight) {
  alignas(64) float panel[panel_columns * 16];
  Cursor cursors[rarefy::max_terms] = {};
  Wide wide[rarefy::max_terms];
  for (int32_t i = 0; i < count; ++i) wide[i] = Wide(terms[i]);
  int64_t columns = terms[0].columns, rows = terms[0].rows - tile * 16 < 16 ? terms[0].rows - tile * 16 : 16;
  for (int64_t k0 = 0; k0 < columns; k0 += panel_columns) {
    for (int32_t i = 0; i < count; ++i) panel_of(terms[i], wide[i], tile, k0, panel, i > 0, cursors[i]);
    int64_t width = columns - k0 < panel_columns ? columns - k0 : panel_columns;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < width; ++k) weight[(tile * 16 + r) * columns + k0 + k] = panel[16 * k + r];
  }
}

// ---- Activations.

// Quantize a block of `size` columns, a multiple of 16 but for blocks of 4: codes, their scale and their sum.
static inline void quantize(const float *x, int64_t size, int8_t *codes, float *scale, float *sum) {
  alignas(64) float own[16];
  if (size < 16) {
    __builtin_memset(own, 0, sizeof own);
    __builtin_memcpy(own, x, size_t(size) * sizeof(float));
    x = own;
  }
  F top = zero_f(), nothing = zero_f();  // the second is NaN as soon as one number is not finite
  for (int64_t k = 0; k < size; k += 16) {
    F values = load_f(x + k);
    top = max_f(top, abs_f(values));
    nothing = fma_f(values, zero_f(), nothing);
  }
  float most = most_f(top), finite = sum_f(nothing);
  if (finite != 0) {
    __builtin_memset(codes, 0, size_t(size));
    *scale = *sum = finite;
    return;
  }
  F inverse = set_f(most > 1e-30f ? 127 / most : 0), total = zero_f();
  for (int64_t k = 0; k < size; k += 16) {
    I rounded = round_i(mul_f(load_f(x + k), inverse));
    total = add_f(total, to_f(rounded));
    if (size >= 16) store_bytes(codes + k, rounded);
    else {
      int8_t bytes[16];
      store_bytes(bytes, rounded);
      __builtin_memcpy(codes, bytes, size_t(size));
    }
  }
  *scale = most / 127;
  *sum = sum_f(total);
}

// Columns [from, from + count) of a token `x` of `type`; those beyond the last are zero.
static inline void load_columns(const rarefy_input &in, const void *x, int32_t type, int64_t from, int64_t count,
                                float *to) {
  int64_t left = in.columns - from < count ? in.columns - from : count, whole = left > 0 ? left / 16 * 16 : 0;
  for (int64_t k = 0; k < whole; k += 16) store_f(to + k, load_floats({x, 0}, type, from + k));
  for (int64_t k = whole; k < count; ++k) to[k] = k < left ? load_one({x, 0}, type, from + k) : 0;
}

// The 8-bit codes of a token in their places, with the scale and the sum of each block. `floats`: the token in 32 bits, or
// none where only codes are read.
static void quantize_token(const rarefy_input &in, const rarefy_blocks &blocks, int64_t token, const float *floats,
                           const void *x, int32_t type) {
  alignas(64) float columns[panel_columns];
  alignas(64) int8_t codes[panel_columns];
  bool rows = in.tokens <= few;
  int64_t lane = token % abreast, row = token - lane, apart = rarefy::code_stride(in);
  int8_t *to = const_cast<int8_t *>(blocks.codes) + (rows ? token * apart : row * apart + 4 * lane);
  int64_t first = rows ? token * blocks.count : row * blocks.count + lane;
  float *scales = const_cast<float *>(blocks.scale) + first, *sums = const_cast<float *>(blocks.sum) + first;
  for (int64_t b = 0; b < blocks.count; ++b) {
    int64_t at = b * blocks.size;
    const float *own = floats ? floats + at : columns;
    if (!floats && type == RAREFY_F32 && at + blocks.size <= in.columns) own = static_cast<const float *>(x) + at;
    else if (!floats) load_columns(in, x, type, at, blocks.size, columns);
    int64_t place = rows ? b : b * abreast;
    quantize(own, blocks.size, rows ? to + at : codes, scales + place, sums + place);
    for (int64_t k = 0; !rows && k < blocks.size; k += 4) __builtin_memcpy(to + (at + k) * abreast, codes + k, 4);
  }
  int64_t filled = blocks.count * blocks.size;
  if (rows) __builtin_memset(to + filled, 0, size_t(in.stride - filled));
  for (int64_t k = filled; !rows && k < in.stride; k += 4) __builtin_memset(to + k * abreast, 0, 4);
}

static void token(const rarefy_input *in, int64_t token, const void *x, int32_t type) {
  float *to = in->x ? const_cast<float *>(in->x) + token * in->stride : nullptr;
  if (to) load_columns(*in, x, type, 0, in->stride, to);
  for (int32_t i = 0; i < in->blockings; ++i) {
    const rarefy_blocks &blocks = in->blocks[i];
    if (in->mode == RAREFY_FAST) {
      quantize_token(*in, blocks, token, to, x, type);
      continue;
    }
    float *sums = const_cast<float *>(blocks.sum) + token * blocks.count;
    for (int64_t b = 0; b < blocks.count; ++b) {
      const float *own = to + b * blocks.size;
      F sum = zero_f();
      float rest = 0;
      for (int64_t k = 0; k + 16 <= blocks.size; k += 16) sum = add_f(sum, load_f(own + k));
      for (int64_t k = 0; blocks.size < 16 && k < blocks.size; ++k) rest += own[k];
      sums[b] = sum_f(sum) + rest;
    }
  }
}

static uint64_t read(const void *data, int64_t bytes) {
  const uint8_t *p = static_cast<const uint8_t *>(data);
  I sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = zero_i();
  for (int64_t at = 0; at + 512 <= bytes; at += 512)
    for (int i = 0; i < 8; ++i) {
      prefetch_far(p + at + far + 64 * i);
      sums[i] = add_i(sums[i], load_i(p + at + 64 * i));
    }
  for (int i = 1; i < 8; ++i) sums[0] = add_i(sums[0], sums[i]);
  alignas(64) uint32_t lanes[16];
  store_b(lanes, as_bytes(sums[0]));
  uint64_t total = 0;
  for (uint32_t lane : lanes) total += lane;
  return total;
}

static constexpr rarefy::Kernels table_of(const char *name) { return {name, tiles, decode, token, convert, read}; }

}  // namespace RAREFY_NS
