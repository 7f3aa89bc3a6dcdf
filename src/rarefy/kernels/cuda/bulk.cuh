// Copies of whole pieces of memory (cp.async.bulk) and the barriers in shared memory (mbarrier) that say when they are
// there; compute capability 9.0.

typedef unsigned long long u64;

device u32 shared_address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }
// What has an address in shared memory may also be given by it, which is then computed but once.
device u32 shared_address(u32 at) { return at; }
device u32 kept_address(const void* at) {
  u32 found = shared_address(at);
  asm volatile("" : "+r"(found));
  return found;
}
device void store(u32 at, const uint4& words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w) : "memory");
}
device void store(u32 at, const uint2& words) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(words.x), "r"(words.y) : "memory");
}

// ---- Barriers in shared memory: a phase ends when `count` have arrived and all bytes that were announced are there.

device void prepare_barrier(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// All blocks of the cluster see each other's barriers.
device void barriers_are_prepared() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
device void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
device u32 rank_in_cluster() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Four words in the shared memory of another block of the cluster.
device uint4 load_of_block(const uint4* at, u32 rank) {
  uint4 found;
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;\n"
               "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [there]; }"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w) : "r"(shared_address(at)), "r"(rank) : "memory");
  return found;
}
template <class B> device void expect(B barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
template <class B> device void arrive_at(B barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the same barrier of another block of the cluster. Nothing was written for that block: a release to the cluster would
// wait for all loads that are on their way.
template <class B> device void arrive_at(B barrier, u32 rank) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
               ::"r"(shared_address(barrier)), "r"(rank) : "memory");
}
template <class B> device void wait_for(B barrier, u32 phase) {
  u32 done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(phase) : "memory");
}
// Whether nobody would wait.
template <class B> device bool is_over(B barrier, u32 phase) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(shared_address(barrier)), "r"(phase) : "memory");
  return done;
}

// ---- Copies of whole pieces, multiples of 16 bytes.

device void copy_bulk(u8* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// To the same place of the blocks of the cluster whose bits are set.
device void copy_bulk_to(u8* to, const void* from, u32 bytes, u64* barrier, u16 blocks) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks) : "memory");
}

// ---- Copies of boxes by a tensor map, 16-bit numbers: some rows from `row` on, of each the 64 numbers from `column` on,
// zeros where there are none, swizzled: a row is 128 bytes, and the last three bits of its number are added, bit by bit,
// to the number of each of its 16 bytes.

template <class T, class B> device void copy_box(T to, const void* map, int column, int row, B barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}
// What threads before a barrier have written to shared memory may be read by tensor cores behind it.
device void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
