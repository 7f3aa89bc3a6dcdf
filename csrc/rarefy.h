/* rarefy's native library for x86-64 processors: products of compressed weights with 32-bit activations.
 *
 * A plain C interface: no torch, no Python. A weight [rows, columns] is a sum of terms; a term is its stored numbers
 * in an execution layout, 16 rows to a tile. Sizes are in elements unless they say bytes. Nothing here allocates memory
 * that a caller has to free, nothing throws, and every function that reads a term's memory is preceded by
 * `rarefy_check`, which refuses terms whose buffers do not have exactly the sizes that their description asks for.
 */
#ifndef RAREFY_H
#define RAREFY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RAREFY_ABI 5
#define RAREFY_API __attribute__((visibility("default")))

enum { RAREFY_TILE = 16, RAREFY_UNIT = 32, RAREFY_PANEL = 128, RAREFY_BLOCKINGS = 4 };

/* Element types. */
enum { RAREFY_NONE = 0, RAREFY_F32 = 1, RAREFY_F16 = 2, RAREFY_BF16 = 3, RAREFY_U8 = 4 };

/* Kinds of terms; T tiles, U units of 32 columns, P panels of 128 columns, G groups, b bits, E entries.
 *
 * CODES    codes      u8  [T, U, b, 64]  planes of 4, 2 and 1 bits (see layout.cpp); 8 bits: bytes
 *          scale      as scale_layout says
 *          zero_point u8 or float [T, G, 16]; none: `zero` for every group
 *          table      f32 [2^b] what each code stands for, before the scale; none: the code itself
 * TABLES   codes      u8  [T, P, 16, b * 16] rows apart, for tables of their own
 *          table      float of scale_type [T, G, 16, E]
 * KEPT     as CODES, but only codes at the set bits of the mask, in bytes (more than 4 bits) or nibbles; with a table,
 *          `zero` is the code of its entry 0
 *          positions  u64 [T, U * 8] bit 4 * row + column of each 16 x 4 quad
 *          pointers   i64 [T + 1] first byte of each tile in `codes`
 * VALUES   codes      f32, f16 or bf16 (scale_type) at the set bits, column by column
 *          positions  u16 [T, U * 32] bit per row
 *          pointers   i64 [T + 1] first value of each tile in `codes`
 * ENTRIES  codes      i32 [slices, 16] a 16-bit value of scale_type above a 16-bit column; 0: none
 *          positions  u8 [ceil(columns / 65536), T, 48] per lane how many slices belong to its own row (u16 [16]), and
 *                     which row the others belong to (u8 [16])
 *          pointers   i32 [ceil(columns / 65536) * T + 1] first slice of each tile
 * GROUPS   codes      u8  [kept groups, bytes of group_size codes of b bits, a bit stream]
 *          scale      float [kept groups] ; zero_point u8 or float [kept groups]
 *          positions  u16 [kept groups] group number within the row
 *          pointers   i32 [rows + 1]
 */
enum { RAREFY_CODES = 0, RAREFY_TABLES = 1, RAREFY_KEPT = 2, RAREFY_VALUES = 3, RAREFY_ENTRIES = 4, RAREFY_GROUPS = 5 };

/* scale_layout of CODES and KEPT.
 *
 * UNIT     none: every scale is 1
 * SINGLE   float [T, G, 16]
 * SIGNED   float [T, G, 2, 16]: for positive and for negative entries of the table
 * NIBBLES  u8 [T, G, 16]: code of the scale + 16 * code of the zero point; second_order as below
 * OCTETS   u8 [T, G, 2, 16]: a byte for each
 * PAIRS    float [T, G, 2, 16]: what code 0 and code 1 stand for (one bit)
 *
 * Two-level: scale = step * (code - zero), with (step, zero) of scales and, if second_numbers is 4, of zero points in
 * `second_order`: [row tiles, group tiles, second_numbers] float of second_type, a tile being second_rows (a multiple
 * of 16) x second_groups; or, with second_rows 1, [T, group tiles, second_numbers, 16].
 */
enum { RAREFY_UNIT_SCALE = 0, RAREFY_SINGLE = 1, RAREFY_SIGNED = 2, RAREFY_NIBBLES = 3, RAREFY_OCTETS = 4, RAREFY_PAIRS = 5 };

typedef struct rarefy_span {
  const void *data;
  int64_t bytes;
} rarefy_span;

typedef struct rarefy_term {
  int32_t kind;
  int32_t bits;           /* of a code, 1 to 8 */
  int32_t scale_layout;
  int32_t scale_type;     /* of scales, tables of their own, and values */
  int32_t zero_type;
  int32_t second_type;
  int32_t second_numbers; /* 0, 2 or 4 */
  int32_t entries;        /* of a table of TABLES */
  int64_t rows;
  int64_t columns;
  int64_t group_size;     /* columns that share a scale, 1 to columns */
  int64_t second_rows;
  int64_t second_groups;
  float zero;             /* the zero point where none is stored */
  float multiplier;       /* of the whole term */
  rarefy_span codes, scale, zero_point, second_order, table, positions, pointers;
} rarefy_term;

/* How activations are treated: kept in 32 bits, or quantized to 8 bits per token and block of columns. */
enum { RAREFY_EXACT = 0, RAREFY_FAST = 1 };

/* One way to cut a token into blocks that share a scale: codes [tokens, stride of the input], scale and sum
 * [tokens, count]; sum is that of the codes, or without codes (EXACT) that of the columns themselves. With codes of more
 * than 4 tokens, 8 of them lie side by side: codes [tokens / 8, stride / 4 + 32, 8, 4], of which the last 32 are nobody's,
 * scale and sum [tokens / 8, count, 8]. */
typedef struct rarefy_blocks {
  int64_t size, count;
  const int8_t *codes;
  const float *scale, *sum;
} rarefy_blocks;

/* Activations as kernels read them: [tokens, stride] 32-bit floats, columns beyond `columns` zero; without `x` where all
 * terms multiply codes. */
typedef struct rarefy_input {
  int64_t tokens, columns, stride;
  const float *x;
  int32_t mode, blockings;
  rarefy_blocks blocks[RAREFY_BLOCKINGS];
} rarefy_input;

RAREFY_API int32_t rarefy_abi(void);

/* The instruction set in use: "scalar", "avx2" or "avx512". At first use the best that the processor and the
 * environment variable RAREFY_CPU allow. */
RAREFY_API const char *rarefy_instructions(void);

/* Use another instruction set. Returns 0, or -1 when it is unknown or this processor lacks it. Not while a product
 * runs. */
RAREFY_API int32_t rarefy_select(const char *name);

/* Returns 0, or -1 with one sentence in `message` that names the tensor. */
RAREFY_API int32_t rarefy_check(const rarefy_term *term, char *message, size_t capacity);

/* y[token * y_stride + row] = sum of the terms' products with x[token * x_stride + ...], both of `type` (F32, F16,
 * BF16), on the pool. The terms have one shape. Returns 0, or -1 with a sentence in `message`. */
RAREFY_API int32_t rarefy_linear(const rarefy_term *terms, int32_t count, const void *x, int64_t x_stride, void *y,
                                 int64_t y_stride, int32_t type, int64_t tokens, int32_t mode, char *message,
                                 size_t capacity);

/* The dense sum of the terms, 32-bit floats [rows, columns]. */
RAREFY_API int32_t rarefy_decode(const rarefy_term *terms, int32_t count, float *weight, char *message,
                                 size_t capacity);

/* The parts of rarefy_linear, for callers that fuse several products into one pass over the pool.
 *
 * rarefy_input_bytes: memory that an input for these terms needs, 64-byte aligned.
 * rarefy_input_begin: lay `input` out in that memory; tokens are then filled one by one, from any thread.
 * rarefy_input_token: convert token `token` from `x` (its own first element, of `type`).
 * rarefy_tiles:       rows [16 * first, 16 * last) of the product for all tokens, into 32-bit floats `y`
 *                     [tokens, y_stride] (first element: row 0 of token 0). Checks nothing.
 * rarefy_tile_count:  tiles of a weight. */
RAREFY_API int64_t rarefy_input_bytes(const rarefy_term *terms, int32_t count, int64_t tokens, int32_t mode);
RAREFY_API void rarefy_input_begin(rarefy_input *input, const rarefy_term *terms, int32_t count, int64_t tokens,
                                   int32_t mode, void *memory);
RAREFY_API void rarefy_input_token(const rarefy_input *input, int64_t token, const void *x, int32_t type);
RAREFY_API void rarefy_tiles(const rarefy_term *terms, int32_t count, const rarefy_input *input, int64_t first,
                             int64_t last, float *y, int64_t y_stride);
RAREFY_API int64_t rarefy_tile_count(int64_t rows);

/* Run task(context, chunk) for every chunk below `chunks` on the pool of `rarefy_threads` threads, the caller among
 * them, and return when all are done. Chunks are handed out one by one, so that a thread that loses its processor
 * delays its own chunk only. Within a task, and while another thread uses the pool, the caller does all of it. */
RAREFY_API void rarefy_parallel(void (*task)(void *context, int64_t chunk), void *context, int64_t chunks);

/* Threads from now on (at least 1); returns the number before. 0 only asks. */
RAREFY_API int32_t rarefy_threads(int32_t count);

/* Codes between the canonical bit stream, i32 [rows, ceil(columns / 32), bits], and the layout of CODES. `tiles` has
 * ceil(rows / 16) * 16 * ceil(columns / 32) * bits * 4 bytes. Both are exact inverses of each other. */
RAREFY_API void rarefy_pack_codes(const uint32_t *stream, uint8_t *tiles, int64_t rows, int64_t columns, int32_t bits);
RAREFY_API void rarefy_unpack_codes(const uint8_t *tiles, uint32_t *stream, int64_t rows, int64_t columns,
                                    int32_t bits);

/* Compressed sparse rows, entries i32 [kept] with row_ptr i32 [panels, rows + 1], in the layout of ENTRIES: `starts` is
 * its pointers, from the number of entries of each tile divided by 16 and rounded up. Back comes what was given if the
 * columns of every row rise. */
RAREFY_API void rarefy_pack_entries(const int32_t *entries, const int32_t *row_ptr, const int32_t *starts,
                                    int64_t rows, int64_t panels, int32_t *slices, uint8_t *lanes);
RAREFY_API void rarefy_unpack_entries(const int32_t *slices, const uint8_t *lanes, const int32_t *starts,
                                      int64_t rows, int64_t panels, int32_t *entries, int32_t *row_ptr);

/* Read `bytes` bytes as fast as one thread can, for measurements; returns a sum that keeps the reads alive. */
RAREFY_API uint64_t rarefy_read(const void *data, int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
