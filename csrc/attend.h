/* Attention of a few queries over keys and values in code: stretches of tokens whose sums meet by their log-sum-exp.
 *
 * A side is keys or values of some tokens, each head's after the other's. Codes are bit streams of 32-bit They are decoded 16 chunks at a time and never stored: the codes at one place of all chunks are 16 numbers.
 */
#ifndef RAREFY_ATTEND_H
#define RAREFY_ATTEND_H

#include "rarefy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* PLAIN       numbers [tokens, width] of `type` (F32, F16 or BF16)
 * BY_CHANNEL  keys: codes [tokens / block, width, block], scale and zero f16 [tokens / block, width, block / group]
 * BY_TOKEN    codes [tokens, width], scale and zero f16 [tokens, width / group]
 *
 * A number is (table[code] - zero) * scale, or table[code] * scale + zero if `added`; without a table the code itself
 * stands for table[code], without `zero` it is 0. */
enum { RAREFY_PLAIN = 0, RAREFY_BY_CHANNEL = 1, RAREFY_BY_TOKEN = 2 };

typedef struct rarefy_side {
  int32_t kind, bits, type, added;
  int64_t first, tokens;      /* of these tokens within the stretch, and how many */
  int64_t block, group;
  int64_t code_bytes, scales; /* from one head to the next */
  const void *codes;
  const uint16_t *scale, *zero;
  const float *table; /* [16], what a chunk's lowest four bits stand for */
} rarefy_side;

/* Tokens [first, first + tokens) of every sequence. Both lists of sides cover them without gaps, and may go beyond. */
typedef struct rarefy_stretch {
  int64_t first, tokens;
  const rarefy_side *keys, *values;
  int64_t key_sides, value_sides;
} rarefy_stretch;

/* Most tokens of a stretch and most channels of a head. */
enum { RAREFY_STRETCH = 2048, RAREFY_WIDTH = 256 };

/* Bytes of 64-byte aligned memory that an attention over so many stretches works in. */
RAREFY_API int64_t rarefy_attend_bytes(int64_t stretches, int64_t batch, int64_t heads, int64_t group, int64_t width);

/* `out` f32 [batch, heads, group, width] of `query` f32 of that shape over all tokens of the stretches but those that
 * `hidden` i64 [batch, hidden_each] names (-1: none), and its log-sum-exp `lse` [batch, heads, group]; 0 and -infinity
 * where there is nothing to see. On the pool. Returns 0, or -1 with a sentence in `message`. */
RAREFY_API int32_t rarefy_attend(const rarefy_stretch *stretches, int64_t count, const float *query, int64_t batch,
                                 int64_t heads, int64_t group, int64_t width, float scale, const int64_t *hidden,
                                 int64_t hidden_each, float *out, float *lse, void *memory, int64_t bytes,
                                 char *message, size_t capacity);

#ifdef __cplusplus
}
#endif
#endif
