// What a kernel that stays on the machine asks of it: memory that flows through a ring in shared memory, barriers of
// some of a block's warps and of the whole grid. Beside machine.cuh; tests put a processor's answer in its place.

// ---- Barriers in shared memory that count arrivals and bytes.

device u32 shared_address(const void* place) { return static_cast<u32>(__cvta_generic_to_shared(place)); }
device void start_barrier(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
device void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
device void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
device void expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
device void wait_for(u64* barrier, u32 parity) {
  asm volatile("{ .reg .pred p;\n"
               "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
               "@!p bra WAIT; }" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// Multiples of 16 bytes into shared memory; the barrier hears of them. They are read once by the whole grid.
device void copy_bulk(u8* to, const void* from, u32 bytes, u64* barrier, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}
device u64 read_once() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// ---- The first `THREADS_` threads of the block, all blocks.

template <int THREADS_> device void barrier_of() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS_) : "memory"); }
device void leave(u32* counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
device u32 seen(const u32* counter) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
device u32 counted(u32* counter) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
device void wait_a_little() {}
device void all_may_begin() {
  asm volatile("griddepcontrol.launch_dependents;");
}
device void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- What other blocks have written in the meantime.

device uint4 fresh(const uint4* from) {
  uint4 to;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from) : "memory");
  return to;
}
device u16 fresh(const u16* from) {
  u16 to;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(to) : "l"(from) : "memory");
  return to;
}
device float fresh(const float* from) { return load_fresh(from); }
device int fresh(const int* from) {
  int to;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(to) : "l"(from) : "memory");
  return to;
}
template <int COUNT> device float sum_over(float value) {
#pragma unroll
  for (int distance = COUNT / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}
device float other_lane(float value, int distance) { return __shfl_xor_sync(0xFFFFFFFFu, value, distance); }
device float exponential(float value) { return __expf(value); }
device float error_function(float value) { return erff(value); }
device i64 cycles() {
  i64 value;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(value)::"memory");
  return value;
}
// As `multiply` of machine.cuh, of float16 whatever activations are.
device void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
device u32 largest_of_warp(u32 value) { return __reduce_max_sync(0xFFFFFFFFu, value); }
