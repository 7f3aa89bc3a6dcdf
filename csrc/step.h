/* One step of a decoder: a program of operations over buffers, for a few tokens that follow those in a cache.
 *
 * The operations are those of rarefy's decoding programs, in 32-bit floats; weights are terms of rarefy.h, or dense.
 * A buffer is [tokens, stride] with the stride of its width rounded up to 16. Nothing here allocates memory that a
 * caller has to free or throws; `rarefy_step_check` says whether a program can be run, `rarefy_step` trusts it.
 */
#ifndef RAREFY_STEP_H
#define RAREFY_STEP_H

#include "rarefy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* EMBED    out = table[token] * scale              data: table [rows, columns] of `type`
 * NORM     out = x / rms(x) * data per head        data: f32 [columns / heads]; eps
 * PROJECT  out = x @ weight.T + bias               terms, or none and data: weight [rows, columns] of `type`
 * ROTATE   x per head: halves turn by position     data: f32 [columns / heads / 2] radians a position; scale
 * ATTEND   out = attention of q = x over the cache of `layer`, to which k = y and v = z are added first;
 *          scale; softcap (0: none); window (0: none)
 * GATE     out = activation(x) * y
 * ADD      x += y
 * CAP      x = softcap * tanh(x / softcap)
 */
enum {
  RAREFY_EMBED = 0, RAREFY_NORM = 1, RAREFY_PROJECT = 2, RAREFY_ROTATE = 3, RAREFY_ATTEND = 4, RAREFY_GATE = 5,
  RAREFY_ADD = 6, RAREFY_CAP = 7
};
enum { RAREFY_SILU = 0, RAREFY_GELU = 1, RAREFY_GELU_TANH = 2, RAREFY_RELU = 3 };

typedef struct rarefy_op {
  int32_t kind;
  int32_t x, y, z, out; /* buffers */
  int32_t type;         /* of data, for EMBED and PROJECT */
  int32_t heads;        /* of x */
  int32_t layer;
  int32_t activation;
  int32_t terms;        /* of the weight, beginning at `first` */
  int64_t rows, columns, window;
  float eps, scale, softcap;
  const void *data;
  const float *bias;    /* f32 [rows], or none */
  const rarefy_term *first;
} rarefy_op;

/* Operations from `head` on are run for the last token only, unless every token's logits are wanted. PROJECTs that
 * stand together and read one buffer run together; their terms stand together in memory. The last operation that
 * writes it leaves the logits in buffer `logits`. */
typedef struct rarefy_program {
  const rarefy_op *ops;
  const int64_t *widths; /* of buffers */
  int32_t count, head, buffers, logits;
  int32_t layers, heads, kv_heads;
  int64_t head_dim, vocabulary;
} rarefy_program;

/* keys and values [layers, kv_heads, capacity, head_dim] of `type` (F32 or F16), of which `length` positions hold. */
typedef struct rarefy_cache {
  void *keys, *values;
  int32_t type;
  int64_t capacity, length;
} rarefy_cache;

/* Returns 0, or -1 with a sentence in `message`. */
RAREFY_API int32_t rarefy_step_check(const rarefy_program *program, char *message, size_t capacity);

/* Bytes of 64-byte aligned memory that a step of so many tokens works in. */
RAREFY_API int64_t rarefy_step_bytes(const rarefy_program *program, int64_t tokens, int64_t positions, int32_t mode);

/* Run `count` tokens that follow those of the cache, whose length then counts them. `logits` [count or 1, vocabulary]:
 * of `every` token or of the last. `memory` as rarefy_step_bytes for these tokens and all positions then held. Returns
 * 0, or -1 with a sentence in `message` when sizes do not fit or a token is none. */
RAREFY_API int32_t rarefy_step(const rarefy_program *program, rarefy_cache *cache, const int64_t *tokens, int64_t count,
                               int32_t mode, int32_t every, float *logits, void *memory, int64_t bytes, char *message,
                               size_t capacity);

#ifdef __cplusplus
}
#endif
#endif
