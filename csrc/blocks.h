/* Attention of many queries over listed blocks of keys (FlashAttention, Dao 2023, over compressed sparse rows). */
#ifndef RAREFY_BLOCKS_H
#define RAREFY_BLOCKS_H

#include "rarefy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Most channels of a head and queries of a block. */
enum { RAREFY_WIDEST = 256, RAREFY_MOST_QUERIES = 1024 };

/* Query heads come in `heads / kv_heads` to a KV head and in `heads / lists` to a list. Query block `i` of list `m` in
 * row `b` reads blocks `columns[start : start + count]` at [b, m, i], as far as its queries see their keys: query `q` of
 * row `b` sees keys [low, high) at [b, q]. Channels are contiguous; strides are of rows, heads and tokens, in elements.
 * Products are of 32-bit floats, or where all is BF16 and the processor multiplies such pairs, of those. */
typedef struct rarefy_chosen {
  const void *query, *key, *value;
  void *out;                /* [batch, heads, queries, width] */
  float *lse;               /* [batch, heads, queries], contiguous */
  const int32_t *start, *count, *columns, *low, *high;
  int64_t query_strides[3], key_strides[3], value_strides[3], out_strides[3];
  int64_t batch, heads, kv_heads, lists, queries, keys, width;
  int64_t block_q, block_k, entries; /* entries: length of `columns` */
  int32_t type;             /* of query, key, value and out: F32, F16 or BF16 */
  float scale;
} rarefy_chosen;

/* Bytes of 64-byte aligned memory that it works in. */
RAREFY_API int64_t rarefy_blocks_bytes(const rarefy_chosen *call);

/* A query that sees nothing gives 0 and -infinity. On the pool. Returns 0, or -1 with a sentence in `message`. */
RAREFY_API int32_t rarefy_attend_blocks(const rarefy_chosen *call, void *memory, int64_t bytes, char *message,
                                        size_t capacity);

#ifdef __cplusplus
}
#endif
#endif
