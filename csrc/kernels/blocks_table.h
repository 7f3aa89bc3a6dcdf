// Attention over listed blocks, compiled once for each instruction set; meanings in kernels/blocks.h.
#pragma once
#include "../blocks.h"

namespace rarefy {

constexpr int64_t panel = 16;  // keys that lie beside each other

struct BlocksKernels {
  bool pairs;  // whether two BF16 numbers are multiplied at once, and stand for one float in all that is packed
  int64_t (*floats)(const rarefy_chosen &call);  // that one thread works in
  void (*pack)(const rarefy_chosen &call, int64_t row_and_head, int64_t block, float *keys, float *values);
  void (*attend)(const rarefy_chosen &call, int64_t row, int64_t head, int64_t block, const float *keys,
                 const float *values, float *memory);
};

extern const BlocksKernels scalar_blocks;
#ifdef RAREFY_WIDE
extern const BlocksKernels avx2_blocks, avx512_blocks, pairs_blocks;
#endif

inline int64_t panels_of(const rarefy_chosen &c) { return (c.block_k + panel - 1) / panel; }  // of a block
inline int64_t key_blocks(const rarefy_chosen &c) { return (c.keys + c.block_k - 1) / c.block_k; }

}  // namespace rarefy
