#include "emulator.h"
#include KERNEL_SOURCE

namespace {
Arguments arguments;
void (*kernel)(const Arguments);

void thread() {
  kernel(arguments);
  emulator::finished[emulator::current] = 1;
  while (true) swapcontext(&emulator::fibers[emulator::current], &emulator::scheduler);
}
}  // namespace

extern "C" void run(int which, const Arguments* given, int x, int y, int z, int threads, int size) {
  using namespace emulator;
  constexpr size_t STACK = 1 << 16;
  arguments = *given;
#ifdef ENTRY
  kernel = ENTRY;
#else
#if FLOAT8
  if (which == 2) kernel = rarefy_quantize;
#endif
  if (which < 2) kernel = which ? rarefy_dequantize : rarefy_linear;
#endif
  gridDim = {x, y, z};
  emulator::threads = threads;
  std::vector<char> stacks(STACK * threads);
  exchanged.assign(threads, {});
  floats.assign(threads, 0);
  for (int block = 0; block < x * y * z; ++block) {
    blockIdx = {block % x, block / x % y, block / x / y};
    memory.assign(size, 0xAB);
    emulator::shared = memory.data();
    barriers.assign(1 + threads / 32, {});
    finished.assign(threads, 0);
    fibers.assign(threads, {});
    for (int n = 0; n < threads; ++n) {
      getcontext(&fibers[n]);
      fibers[n].uc_stack.ss_sp = stacks.data() + n * STACK;
      fibers[n].uc_stack.ss_size = STACK;
      makecontext(&fibers[n], thread, 0);
    }
    for (int left = threads; left > 0;) {
      left = 0;
      for (current = 0; current < threads; ++current) {
        if (finished[current]) continue;
        threadIdx.x = current;
        swapcontext(&scheduler, &fibers[current]);
        left += !finished[current];
      }
    }
  }
}
