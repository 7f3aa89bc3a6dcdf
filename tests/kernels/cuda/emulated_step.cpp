// All blocks of step.cu at once, since they wait for each other.
#include "emulator.h"
#include KERNEL_SOURCE

namespace {
Step step;

void thread() {
  rarefy_step(step);
  emulator::finished[emulator::current] = 1;
  while (true) emulator::rest();
}
}  // namespace

extern "C" void run_step(const Step* given, int x, int size) {
  using namespace emulator;
  constexpr size_t STACK = 1 << 16;
  step = *given;
  gridDim = {x, 1, 1};
  threads = THREADS, blocks = x;
  const int count = x * threads;
  std::vector<char> stacks(STACK * count);
  exchanged.assign(count, {});
  floats.assign(count, 0);
  memory.assign(size_t(size) * x + 128, 0xAB);
  unsigned char* aligned = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 127);
  barriers.assign(x + count / 32, {});
  finished.assign(count, 0);
  fibers.assign(count, {});
  for (int n = 0; n < count; ++n) {
    getcontext(&fibers[n]);
    fibers[n].uc_stack.ss_sp = stacks.data() + n * STACK;
    fibers[n].uc_stack.ss_size = STACK;
    makecontext(&fibers[n], thread, 0);
  }
  for (int left = count; left > 0;) {
    left = 0;
    for (current = 0; current < count; ++current) {
      if (finished[current]) continue;
      threadIdx.x = current % threads, blockIdx.x = current / threads;
      shared = aligned + size_t(size) * blockIdx.x;
      swapcontext(&scheduler, &fibers[current]);
      left += !finished[current];
    }
  }
}
