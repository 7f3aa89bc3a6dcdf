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
  threads = THREADS;
  const int count = x * threads;
  std::vector<char> stacks(STACK * count);
  exchanged.assign(count, {});
  floats.assign(count, 0);
  memory.assign(x, std::vector<unsigned char>(size, 0xAB));
  barriers.assign(1 + x + count / 32, {});
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
      shared = memory[blockIdx.x].data();
      swapcontext(&scheduler, &fibers[current]);
      left += !finished[current];
    }
  }
}
