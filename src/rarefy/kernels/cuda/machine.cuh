// What the kernels ask of the machine, in PTX; tests put a processor's answer in its place. No header is needed, so
// that the compiler which PyTorch brings along is enough.

#define device __device__ __forceinline__
#define global __global__
#define in_clusters_of(x, y) __cluster_dims__(x, y, 1)
#ifndef SHARED_ALIGNMENT
#define SHARED_ALIGNMENT 128
#endif
#define shared_memory(name) extern __shared__ __align__(SHARED_ALIGNMENT) u8 name[]

#if __CUDA_ARCH__ >= 900
#define ORDERED 1
#else
#define ORDERED 0
#endif

// ---- Memory.

// Read once by the whole grid: not worth a place in the first cache.
device uint4 load_once(const uint4* from) {
  uint4 to;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from));
  return to;
}
device uint4 load_once(const uint4* from, bool real) {
  uint4 to = {0, 0, 0, 0};
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
               "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w) : "l"(from), "r"(u32(real)));
  return to;
}
device uint2 load_once(const uint2* from) {
  uint2 to;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
  return to;
}
device u32 load_once(const u32* from) {
  u32 to;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to) : "l"(from));
  return to;
}
// Its neighbours are read soon.
device u32 load_near(const u32* from) {
  u32 to;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to) : "l"(from));
  return to;
}
device u16 load_once(const u16* from) {
  u16 to;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(to) : "l"(from));
  return to;
}
// In 32 bits, which a compiler would else make sure of.
device u32 load_once_widened(const u16* from) {
  u32 to;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=r"(to) : "l"(from));
  return to;
}
// Read by many blocks, or zeros. Not as what is constant (`nc`), which a compiler moves before a wait for what earlier
// kernels write.
device uint4 load_shared_by_all(const uint4* from, bool real) {
  uint4 to = {0, 0, 0, 0};
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
               "@p ld.global.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w) : "l"(from), "r"(u32(real)));
  return to;
}
device uint4 load_shared_by_all(const uint4* from) {
  uint4 to;
  asm volatile("ld.global.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from));
  return to;
}
device uint2 load_shared_by_all(const uint2* from) {
  uint2 to;
  asm volatile("ld.global.L1::evict_last.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
  return to;
}
device uint2 load_shared_by_all(const uint2* from, bool real) {
  uint2 to = {0, 0};
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0;\n"
               "@p ld.global.L1::evict_last.v2.u32 {%0, %1}, [%2]; }"
               : "+r"(to.x), "+r"(to.y) : "l"(from), "r"(u32(real)));
  return to;
}
device float load_fresh(const float* from) {
  float to;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(to) : "l"(from) : "memory");
  return to;
}
device u16 load_fresh(const u16* from) {
  u16 to;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(to) : "l"(from) : "memory");
  return to;
}
// Unlike what is read once, this stays where it stands before or after a wait: a compiler moves loads of what it takes
// for constant.
device uint4 load_fresh(const uint4* from, bool real) {
  uint4 to = {0, 0, 0, 0};
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
               "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w) : "l"(from), "r"(u32(real)) : "memory");
  return to;
}
device uint2 load_fresh(const uint2* from, bool real) {
  uint2 to = {0, 0};
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0;\n"
               "@p ld.global.cg.v2.u32 {%0, %1}, [%2]; }"
               : "+r"(to.x), "+r"(to.y) : "l"(from), "r"(u32(real)) : "memory");
  return to;
}
device u32 load_fresh(const u32* from, bool real) {
  u32 to = 0;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0;\n"
               "@p ld.global.cg.u32 %0, [%1]; }" : "+r"(to) : "l"(from), "r"(u32(real)) : "memory");
  return to;
}
// From shared memory, if it is wanted.
device void load_held(uint2& to, const u8* from, bool real) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0;\n"
               "@p ld.shared.v2.u32 {%0, %1}, [%2]; }"
               : "+r"(to.x), "+r"(to.y) : "r"(static_cast<u32>(__cvta_generic_to_shared(from))), "r"(u32(real)));
}
// Sixteen bytes into shared memory, or zeros.
device void copy_async(u8* to, const void* from, bool real) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(real ? 16 : 0) : "memory");
}
// Four bytes.
device void copy_word_async(u8* to, const void* from, bool real) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(real ? 4 : 0) : "memory");
}
device void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> device void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// ---- Order.

device void block_barrier() { __syncthreads(); }
device void warp_barrier() { __syncwarp(); }
// Later kernels may start, up to where they wait, when all blocks have come here.
device void start_later_kernels() {
#if ORDERED
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
device void wait_for_earlier_kernels() {
#if ORDERED
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Whether this block is the last of `count` to come here; what the others wrote before is then visible.
device bool last_to_arrive(u32* arrived, u32 count) {
  __shared__ u32 before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicAdd(arrived, 1u);
    if (before == count - 1) *arrived = 0;
  }
  __syncthreads();
  if (before != count - 1) return false;
  __threadfence();
  return true;
}

// ---- Numbers.

// Not to be computed again wherever it is used.
template <class T> device void keep(T& value) { asm volatile("" : "+l"(value)); }
device float as_float(u32 bits) { return __uint_as_float(bits); }
device float half_value(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
template <bool HALF_> device u16 rounded(float value) {
  u16 bits;
  if constexpr (HALF_) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
device float widened(u16 bits) { return HALF ? half_value(bits) : as_float(u32(bits) << 16); }
// The sum over so many neighbouring lanes, in all of them.
template <int LANES> device float sum_of_lanes(float value) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}
device float sum_of_four(float value) { return sum_of_lanes<4>(value); }
device float absolute(float value) { return fabsf(value); }
device float max_of(float a, float b) { return fmaxf(a, b); }
device float quotient(float a, float b) { return __fdividef(a, b); }  // but for the last bits
device float inverse_root(float value) { return rsqrtf(value); }
#if __CUDA_ARCH__ >= 890
// The nearest numbers of E4M3, never infinite.
device u16 e4m3_pair(float low, float high) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
device u16 e4m3_of_halves(u32 halves) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(pair) : "r"(halves));
  return pair;
}
#endif
// The sum of one number and the maximum of another over all threads, in all of them; `shared` holds 64 numbers.
device void reduce_over_block(float& sum, float& most, float* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, distance));
  }
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  shared[warp] = sum, shared[32 + warp] = most;
  __syncthreads();
  sum = 0.0f, most = 0.0f;
  for (int n = 0; n < warps; ++n) sum += shared[n], most = fmaxf(most, shared[32 + n]);
}
device float sum_of_warp(float value) { return sum_of_lanes<32>(value); }
device u32 max_of_warp(u32 value) { return __reduce_max_sync(0xFFFFFFFFu, value); }
device u32 of_lane(u32 value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
device float of_lane(float value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
device u32 of_lane_xor(u32 value, int distance) { return __shfl_xor_sync(0xFFFFFFFFu, value, distance); }
device float of_lane_xor(float value, int distance) { return __shfl_xor_sync(0xFFFFFFFFu, value, distance); }
// Which lanes say so.
device u32 votes(bool ours) { return __ballot_sync(0xFFFFFFFFu, ours); }
device int ones_of(u32 word) { return __popc(word); }
device int lowest_of(unsigned long long word) { return __ffsll(word) - 1; }  // of its ones
device u32 bits_of(float value) { return __float_as_uint(value); }
device u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
device u32 half_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Two numbers of E4M3 as float16.
device u32 halves_of_e4m3(u16 pair) {
  u32 found = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(found) : "h"(pair));
#endif
  return found;
}
device float power_of_two(float value) {
  float found;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(value));
  return found;
}
device float root(float value) { return sqrtf(value); }
device float fused_sum(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a * b + c, rounded once
device float sigmoid(float value) { return quotient(1.0f, 1.0f + power_of_two(-1.4426950408889634f * value)); }
device float error_function(float value) { return erff(value); }
device float nearest_integer(float value) { return rintf(value); }
device int nearest_whole(float value) { return __float2int_rn(value); }
device void raise(u32* flags, u32 bits) { atomicOr(flags, bits); }
device float log_of_two(float value) { return log2f(value); }
// 32 bits of `high` and `low` from bit `shift` of `low` on.
device u32 funnel(u32 low, u32 high, u32 shift) { return __funnelshift_r(low, high, shift); }
// Of a matrix 8 x 8 of which lane n has numbers 2 (n % 4) and the next of row n / 4, likewise its columns.
device u32 transposed(u32 pair) {
  u32 found;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(pair));
  return found;
}
// Four matrices 8 x 8, of each of which a lane has what `transposed` says, to shared memory, their columns as lines of 16
// bytes: lane 8 m + n says where column n of matrix m goes.
device void put_transposed(u8* line, const u32 (&pairs)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(static_cast<u32>(__cvta_generic_to_shared(line))), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
#endif
}
// a * b + c on two 16-bit numbers each.
device u32 fused(u32 a, u32 b, u32 c) {
  u32 d;
  if constexpr (HALF) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// The greater of two 16-bit numbers each; what is no number wins.
device u32 greater(u32 a, u32 b) {
  u32 d;
  if constexpr (HALF) asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
device u32 negated(u32 pair) {
  u32 d;
  if constexpr (HALF) asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(pair));
  else asm("neg.bf16x2 %0, %1;" : "=r"(d) : "r"(pair));
  return d;
}
// The lesser of two 16-bit numbers each.
device u32 lesser(u32 a, u32 b) {
  u32 d;
  if constexpr (HALF) asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// (word & mask) | others
device u32 chosen(u32 word, u32 mask, u32 others) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "r"(mask), "r"(others));
  return d;
}
// Bits of one word where the mask has ones, else of another.
device u32 either(u32 mask, u32 ones, u32 zeros) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(ones), "r"(zeros));
  return d;
}
device u32 permuted(u32 a, u32 b, u32 bytes) { return __byte_perm(a, b, bytes); }
device void multiply_alone(float (&product)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
device void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
device void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (HALF) multiply_halves(sum, a, b0, b1);
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// How many of 128 bits both have, of rows g and g + 8 and of eight columns.
device void multiply_bits(int (&counts)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
      : "=r"(counts[0]), "=r"(counts[1]), "=r"(counts[2]), "=r"(counts[3]) : "r"(a0), "r"(a1), "r"(b), "r"(0));
}
