// What the parts of the library know of each other.
#pragma once
#include "rarefy.h"

namespace rarefy {

constexpr int64_t tile_rows = RAREFY_TILE, unit = RAREFY_UNIT, panel_columns = RAREFY_PANEL;
constexpr int64_t few = 4;            // tokens up to which codes are multiplied without a panel
constexpr int64_t abreast = 8;        // of more tokens, those whose 8-bit activations lie side by side
constexpr int64_t chunk_tokens = 128;  // tokens that share one decoding of a tile
constexpr int64_t chunk_tiles = 4;    // tiles that a thread takes at a time
constexpr int32_t max_terms = 16;
constexpr int64_t largest_group = 256;  // columns of a group of GROUPS
constexpr int64_t slack = 64;  // bytes after lists that kernels read in whole registers

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t tiles_of(const rarefy_term &t) { return ceil_div(t.rows, tile_rows); }
inline int64_t units_of(const rarefy_term &t) { return ceil_div(t.columns, unit); }
inline int64_t panels_of(const rarefy_term &t) { return ceil_div(t.columns, panel_columns); }
inline int64_t groups_of(const rarefy_term &t) { return ceil_div(t.columns, t.group_size); }

// Columns of activations that share a scale: a power of two, so that blocks never straddle groups or panels.
inline int64_t block_of(const rarefy_term &t) {
  int64_t power = t.group_size >= t.columns ? panel_columns : t.group_size & -t.group_size;
  return power < panel_columns ? power : panel_columns;
}
inline int64_t blocks_per_group(const rarefy_term &t, int64_t block) {
  return t.group_size >= t.columns ? INT64_MAX : t.group_size / block;
}
// Whether products of the term read blocks of activations, in either mode.
inline bool reads_blocks(const rarefy_term &t) { return t.kind == RAREFY_CODES || t.kind == RAREFY_KEPT; }

// Whether the term's codes and activations are multiplied as bytes in FAST mode.
inline bool multiplies_bytes(const rarefy_term &t) {
  return reads_blocks(t) && (t.table.bytes == 0 || t.bits == 3 || t.bits == 4);
}

// Codes of activations from a token to the next, or an eighth of what lies between 8 of them and the next 8: not a multiple
// of 4096 bytes, which would crowd the same sets of the cache.
inline int64_t code_stride(const rarefy_input &in) { return in.tokens <= few ? in.stride : in.stride + panel_columns; }

// One instruction set.
struct Kernels {
  const char *name;
  void (*tiles)(const rarefy_term *, int32_t, const rarefy_input *, int64_t, int64_t, float *, int64_t);
  void (*decode)(const rarefy_term *, int32_t, int64_t tile, float *weight);
  void (*token)(const rarefy_input *, int64_t, const void *, int32_t);
  void (*convert)(const float *, void *, int32_t type, int64_t count);
  uint64_t (*read)(const void *, int64_t);
};

extern const Kernels scalar_kernels;
#ifdef RAREFY_WIDE
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace rarefy
