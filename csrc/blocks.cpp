// Attention over listed blocks (blocks.h): keys and values in panels, then blocks of queries, both on the pool.
#include "blocks.h"

#include <atomic>
#include <cstdio>
#include <cstring>

#include "internal.h"
#include "kernels/blocks_table.h"

namespace rarefy {
namespace {

const BlocksKernels &blocks_kernels(const rarefy_chosen &c) {
#ifdef RAREFY_WIDE
  if (!std::strcmp(rarefy_instructions(), "avx512")) {
    __builtin_cpu_init();
    return c.type == RAREFY_BF16 && c.width % 32 == 0 && __builtin_cpu_supports("avx512bf16") ? pairs_blocks : avx512_blocks;
  }
  if (!std::strcmp(rarefy_instructions(), "avx2")) return avx2_blocks;
#endif
  (void)c;
  return scalar_blocks;
}

int64_t lines(int64_t floats) { return ceil_div(floats, 16) * 16; }

// Floats that all keys, or all values, are packed in.
int64_t packed(const rarefy_chosen &c, const BlocksKernels &own) {
  return c.batch * c.kv_heads * key_blocks(c) * panels_of(c) * panel * (own.pairs ? c.width / 2 : c.width);
}

// What is wrong with a call, or null.
const char *fault(const rarefy_chosen &c) {
  if (c.type != RAREFY_F32 && c.type != RAREFY_F16 && c.type != RAREFY_BF16) return "Attention has numbers of no known type";
  if (c.width < 16 || c.width % 16 || c.width > RAREFY_WIDEST) return "Heads are too wide or uneven";
  if (c.batch < 1 || c.queries < 1 || c.keys < 1 || c.kv_heads < 1 || c.lists < 1) return "There is nothing to attend";
  if (c.keys > INT32_MAX / 2) return "There are too many keys";
  if (c.heads < 1 || c.heads % c.kv_heads || c.heads % c.lists) return "Heads do not divide among KV heads and lists";
  if (c.block_q < 1 || c.block_q > RAREFY_MOST_QUERIES || c.block_k < 1 || c.block_k > c.keys + RAREFY_MOST_QUERIES)
    return "Blocks are empty or too long";
  int64_t rows = c.batch * c.lists * ceil_div(c.queries, c.block_q), blocks = key_blocks(c);
  for (int64_t i = 0; i < rows; ++i) {
    int64_t start = c.start[i], count = c.count[i];
    if (start < 0 || count < 0 || start + count > c.entries) return "A list lies beyond what lists there are";
    for (int64_t n = start; n < start + count; ++n)
      if (c.columns[n] < 0 || c.columns[n] >= blocks) return "A list names a block that does not exist";
  }
  for (int64_t i = 0; i < c.batch * c.queries; ++i)
    if (c.low[i] < 0 || c.high[i] > c.keys) return "A query sees keys that do not exist";
  return nullptr;
}

struct Task {
  const rarefy_chosen &call;
  const BlocksKernels &own;
  float *keys, *values, *scratch;
  int64_t each;
  std::atomic<int64_t> next{0};

  void pack() {
    const int64_t blocks = key_blocks(call), size = panels_of(call) * panel * (own.pairs ? call.width / 2 : call.width);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < call.batch * call.kv_heads * blocks;)
      own.pack(call, i / blocks, i % blocks, keys + i * size, values + i * size);
  }
  // Later queries see more and come first, so that the last ones are short.
  void attend(int64_t slot) {
    const int64_t pairs = call.batch * call.heads, rows = ceil_div(call.queries, call.block_q);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pairs * rows;)
      own.attend(call, i % pairs / call.heads, i % call.heads, rows - 1 - i / pairs, keys, values, scratch + slot * each);
  }
};

}  // namespace
}  // namespace rarefy

using namespace rarefy;

int64_t rarefy_blocks_bytes(const rarefy_chosen *call) {
  const BlocksKernels &own = blocks_kernels(*call);
  return (2 * lines(packed(*call, own)) + rarefy_threads(0) * lines(own.floats(*call))) * 4;
}

int32_t rarefy_attend_blocks(const rarefy_chosen *call, void *memory, int64_t bytes, char *message, size_t capacity) {
  const char *why = fault(*call);
  if (!why && (reinterpret_cast<uintptr_t>(memory) % 64 || bytes < rarefy_blocks_bytes(call)))
    why = "Attention has too little memory to work in";
  if (why) {
    if (message && capacity) std::snprintf(message, capacity, "%s", why);
    return -1;
  }
  const BlocksKernels &own = blocks_kernels(*call);
  float *keys = static_cast<float *>(memory), *values = keys + lines(packed(*call, own));
  Task task{*call, own, keys, values, values + lines(packed(*call, own)), lines(own.floats(*call))};
  int64_t slots = rarefy_threads(0);
  rarefy_parallel([](void *context, int64_t) { static_cast<Task *>(context)->pack(); }, &task, slots);
  task.next = 0;
  rarefy_parallel([](void *context, int64_t slot) { static_cast<Task *>(context)->attend(slot); }, &task, slots);
  return 0;
}
