#include "emulator.h"
#include KERNEL_SOURCE

#ifdef UNPACKERS
#define PROMPTS (UNPACKERS > 0)
#else
#define PROMPTS 0
#endif

namespace {
#if PROMPTS
typedef Prompt Given;
#else
typedef Arguments Given;
#endif
Given arguments;
void (*kernel)(const Given);

void thread() {
  kernel(arguments);
  emulator::finished[emulator::current] = 1;
  while (true) swapcontext(&emulator::fibers[emulator::current], &emulator::scheduler);
}
}  // namespace

extern "C" void run(int which, const Given* given, int x, int y, int z, int threads, int size) {
  using namespace emulator;
  constexpr size_t STACK = 1 << 16;
  memcpy(&arguments, given, sizeof arguments);  // whose place may be aligned to less
#ifdef ENTRY
  kernel = ENTRY;
#else
#if PROMPTS
  kernel = rarefy_prompt;
#elif WIDE
  kernel = which ? rarefy_arrange : rarefy_gemm;
#else
#if FLOAT8
  if (which == 2) kernel = rarefy_quantize;
#endif
  if (which == 3) kernel = rarefy_dequantize_to_bytes;
  if (which < 2) kernel = which ? rarefy_dequantize : rarefy_linear;
#endif
#endif
  gridDim = {x, y, z};
  emulator::threads = threads;
#if WIDE
  const int beside = which ? 1 : CLUSTER, above = which ? 1 : SPLIT;  // blocks of a cluster, along x and y
#else
  const int beside = 1, above = 1;
#endif
  const int together = beside * above;
  const int all = threads * together;
  std::vector<char> stacks(STACK * all);
  exchanged.assign(all, {});
  floats.assign(all, 0);
  for (int cluster = 0; cluster < x / beside * (y / above) * z; ++cluster) {
    const int row = cluster / (x / beside);
    const emulator::Position first = {cluster % (x / beside) * beside, row % (y / above) * above, row / (y / above)};
    memory.assign(together, std::vector<unsigned char>(size, 0xAB));
    barriers.assign(1 + together + all / 32, {});
    fours.assign(all / 128 + 1, {});
    passed.assign(2 * together, 0);
    taken.assign(all, 0);
    finished.assign(all, 0);
    fibers.assign(all, {});
    for (int n = 0; n < all; ++n) {
      getcontext(&fibers[n]);
      fibers[n].uc_stack.ss_sp = stacks.data() + n * STACK;
      fibers[n].uc_stack.ss_size = STACK;
      makecontext(&fibers[n], thread, 0);
    }
    for (int left = all; left > 0;) {
      left = 0;
      for (current = 0; current < all; ++current) {
        if (finished[current]) continue;
        threadIdx.x = current % threads;
        const int rank = current / threads;
        blockIdx = {first.x + rank % beside, first.y + rank / beside, first.z};
        emulator::shared = memory[current / threads].data();
        swapcontext(&scheduler, &fibers[current]);
        left += !finished[current];
      }
    }
  }
}
