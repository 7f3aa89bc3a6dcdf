/* The inner loop of solvers that go through a weight column by column; see src/rarefy/kernels/columns.py.
 *
 * Pointers and steps are those of 32-bit floats, rows lie together; `codes` and `marked` are bytes. What a rule does not
 * need is null. Both structures are those of the CUDA kernels.
 */
#ifndef RAREFY_COLUMNS_H
#define RAREFY_COLUMNS_H

#include "rarefy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Most columns of a call, and factors of a search; most rows of a tile. */
enum { RAREFY_AT_ONCE = 128, RAREFY_FIT_ROWS = 64 };

/* What becomes of a column: all of it is rounded; what is not marked is dropped; what is marked stays as it is; or
 * whether it stays is decided here and marked. */
enum { RAREFY_EVERY = 0, RAREFY_DROP = 1, RAREFY_SPARE = 2, RAREFY_CHOOSE = 3 };

typedef struct rarefy_round {
  float *block;         /* [members, width, rows], the first `count` columns of which are treated */
  float *errors;        /* [members, count, rows] */
  const float *shares;  /* [members, count, width] */
  const float *scale;   /* [groups, members * rows] */
  const float *zero;    /* likewise */
  uint8_t *codes;       /* [count, members * rows], null: columns are not rounded */
  uint8_t *marked;      /* likewise */
  float *lost;          /* likewise */
  const float *reach;   /* [members * rows]: the error, in units of its column, beyond which a weight stays */
  const float *unit;    /* [members, count] */
  int64_t block_member, block_column, errors_member, errors_column, shares_member, shares_row, unit_member, unit_column;
  int32_t members, rows, count, width, last;
  int32_t group[RAREFY_AT_ONCE];
} rarefy_round;

typedef struct rarefy_fit {
  const float *columns;    /* [members, size, rows] */
  const float *unit;       /* [members, size] */
  const float *mass;       /* likewise: what an error counts */
  const float *threshold;  /* [members * rows] */
  uint8_t *codes;          /* [members * rows, 1 or 2] */
  uint16_t *second;        /* [tiles, 4] */
  float *scale;            /* [members * rows] */
  float *zero;             /* likewise */
  int64_t columns_member, columns_column, unit_member, unit_column, mass_member;
  int32_t members, rows, factors;
  float finest;            /* the smallest step as a share of the largest number */
  float tiny;              /* the smallest step at all */
  float norm;              /* power of an error */
  float factor[RAREFY_AT_ONCE];
} rarefy_fit;

typedef struct rarefy_search {
  const float *weight;      /* [rows, columns] */
  const float *importance;  /* likewise, null: all count alike */
  float *found;             /* [rows, groups] the factor of least error */
  int64_t rows, columns, group_size;
  int32_t factors, levels;
  int32_t zero;             /* below */
  int32_t type;             /* of scales, and of real zeros: RAREFY_F32, F16 or BF16 */
  float finest, norm;
  float factor[RAREFY_AT_ONCE];
  float step[RAREFY_AT_ONCE]; /* factor * 2 / (levels - 1) */
} rarefy_search;

/* Zeros: at the middle code, at a stored code, anywhere. */
enum { RAREFY_MIDDLE = 0, RAREFY_WHOLE = 1, RAREFY_REAL = 2 };

/* For each group of even steps the factor on its range with the least sum of importance * |error| ** norm, the first
 * of several. */
RAREFY_API void rarefy_search_ranges(const rarefy_search *given);

/* On the pool. Nothing is checked. */
RAREFY_API void rarefy_round_columns(const rarefy_round *given, int32_t rule);

/* A group of `size` columns, at most 32, with tiles of `tile` rows, a power of two up to RAREFY_FIT_ROWS; numbers of the
 * second level are float16 if `half`, else bfloat16. */
RAREFY_API void rarefy_fit_around(const rarefy_fit *given, int32_t size, int32_t levels, int32_t scale_bits,
                                  int32_t zero_bits, int32_t tile, int32_t half);

#ifdef __cplusplus
}
#endif
#endif
