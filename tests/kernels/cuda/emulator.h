// A processor's answer to machine.cuh, one block after another and a block's threads as fibers, so that the arithmetic
// and the indices of a kernel can be tested where no GPU is.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define RAREFY_EMULATED
#define device static inline
#define global
#define __launch_bounds__(...)
#define in_clusters_of(x, y)
#define __grid_constant__
#define shared_memory(name) static unsigned char*& name = emulator::shared

struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };

namespace emulator {
struct Position { int x, y, z; };
struct Barrier { int waiting = 0; unsigned generation = 0; };
struct Operands { unsigned a[4], b[2]; };

std::vector<std::vector<unsigned char>> memory;  // of each block that runs now
unsigned char* shared;
std::vector<ucontext_t> fibers;
std::vector<char> finished;
std::vector<Barrier> barriers;  // of all blocks, of each block, of each warp
std::vector<Operands> exchanged;
std::vector<float> floats;
ucontext_t scheduler;
int current, threads;  // the fiber, and those of a block

// Whoever has returned is not waited for.
void arrive(Barrier& barrier, int first, int count) {
  const unsigned generation = barrier.generation;
  for (++barrier.waiting; barrier.generation == generation; swapcontext(&fibers[current], &scheduler)) {
    int here = 0;
    for (int n = first; n < first + count; ++n) here += !finished[n];
    if (barrier.waiting < here) continue;
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
}
}  // namespace emulator

static emulator::Position threadIdx, blockIdx, gridDim;

device uint4 load_once(const uint4* from) { return *from; }
device uint4 load_once(const uint4* from, bool real) { return real ? *from : uint4{0, 0, 0, 0}; }
device uint2 load_once(const uint2* from) { return *from; }
device unsigned load_once(const unsigned* from) { return *from; }
device unsigned load_near(const unsigned* from) { return *from; }
device unsigned short load_once(const unsigned short* from) { return *from; }
device unsigned load_once_widened(const unsigned short* from) { return *from; }
device uint4 load_shared_by_all(const uint4* from, bool real) { return real ? *from : uint4{0, 0, 0, 0}; }
device uint2 load_shared_by_all(const uint2* from, bool real) { return real ? *from : uint2{0, 0}; }
device uint4 load_shared_by_all(const uint4* from) { return *from; }
device uint2 load_shared_by_all(const uint2* from) { return *from; }
device float load_fresh(const float* from) { return *from; }
device unsigned short load_fresh(const unsigned short* from) { return *from; }
device uint4 load_fresh(const uint4* from, bool real) { return real ? *from : uint4{0, 0, 0, 0}; }
device uint2 load_fresh(const uint2* from, bool real) { return real ? *from : uint2{0, 0}; }
device unsigned load_fresh(const unsigned* from, bool real) { return real ? *from : 0; }
device void load_held(uint2& to, const unsigned char* from, bool real) { if (real) memcpy(&to, from, 8); }
device void copy_async(unsigned char* to, const void* from, bool real) {
  if (real) memcpy(to, from, 16); else memset(to, 0, 16);
}
device void copy_word_async(unsigned char* to, const void* from, bool real) {
  if (real) memcpy(to, from, 4); else memset(to, 0, 4);
}
template <class T> device void keep(T&) {}
device void commit_copies() {}
template <int PENDING> device void wait_for_copies() {}
device int own_block() { return emulator::current / emulator::threads; }
device void block_barrier() {
  emulator::arrive(emulator::barriers[1 + own_block()], own_block() * emulator::threads, emulator::threads);
}
device void warp_barrier() {
  const int warp = emulator::current / 32;
  emulator::arrive(emulator::barriers[1 + emulator::memory.size() + warp], 32 * warp, 32);
}
device void start_later_kernels() {}
device void wait_for_earlier_kernels() {}
device bool last_to_arrive(unsigned* arrived, unsigned count) {
  static unsigned before;
  block_barrier();
  if (threadIdx.x == 0) {
    before = (*arrived)++;
    if (before == count - 1) *arrived = 0;
  }
  block_barrier();
  return before == count - 1;
}

device float as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
device float half_value(unsigned short bits) { _Float16 value; memcpy(&value, &bits, 2); return float(value); }
template <bool HALF_> device unsigned short rounded(float value) {
  if (HALF_) { const _Float16 half = _Float16(value); unsigned short bits; memcpy(&bits, &half, 2); return bits; }
  unsigned bits;
  memcpy(&bits, &value, 4);
  return (unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
device float widened(unsigned short bits) { return HALF ? half_value(bits) : as_float(unsigned(bits) << 16); }
device float sum_of(int count, float value) {
  const int thread = emulator::current, first = thread / count * count;
  emulator::floats[thread] = value;
  warp_barrier();
  float sum = 0;
  for (int n = 0; n < count; ++n) sum += emulator::floats[first + n];
  warp_barrier();
  return sum;
}
template <int LANES_> device float sum_of_lanes(float value) { return sum_of(LANES_, value); }
device float sum_of_four(float value) { return sum_of(4, value); }
device float sum_of_warp(float value) { return sum_of(32, value); }
device unsigned of_lane(unsigned value, int lane) {
  const int thread = emulator::current;
  emulator::exchanged[thread].a[0] = value;
  warp_barrier();
  const unsigned found = emulator::exchanged[thread / 32 * 32 + lane].a[0];
  warp_barrier();
  return found;
}
device unsigned max_of_warp(unsigned value) {
  unsigned most = 0;
  for (int lane = 0; lane < 32; ++lane) most = std::max(most, of_lane(value, lane));
  return most;
}
device float of_lane(float value, int lane) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return as_float(of_lane(bits, lane));
}
device unsigned of_lane_xor(unsigned value, int distance) { return of_lane(value, threadIdx.x % 32 ^ distance); }
device float of_lane_xor(float value, int distance) { return of_lane(value, threadIdx.x % 32 ^ distance); }
device unsigned half_pair(float low, float high) { return rounded<true>(low) | unsigned(rounded<true>(high)) << 16; }
device unsigned halves_of_e4m3(unsigned short pair) {
  float found[2];
  for (int k = 0; k < 2; ++k) {
    const int code = pair >> 8 * k & 127, exponent = code >> 3, digits = code & 7;
    const float size = std::ldexp(float(exponent ? 8 + digits : digits), (exponent ? exponent : 1) - 10);
    found[k] = pair >> 8 * k & 128 ? -size : size;
  }
  return half_pair(found[0], found[1]);
}
device float power_of_two(float value) { return std::exp2(value); }
device float root(float value) { return std::sqrt(value); }
device float fused_sum(float a, float b, float c) { return std::fma(a, b, c); }
device float nearest_integer(float value) { return std::nearbyint(value); }
device int nearest_whole(float value) { return int(std::nearbyint(value)); }
device void raise(unsigned* flags, unsigned bits) { *flags |= bits; }
device float log_of_two(float value) { return std::log2(value); }
device unsigned funnel(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
device unsigned transposed(unsigned pair) {
  const int thread = threadIdx.x, warp = thread / 32 * 32, g = thread % 32 / 4, t = thread % 4;
  emulator::exchanged[thread].a[0] = pair;
  warp_barrier();
  unsigned found = 0;
  for (int k = 0; k < 2; ++k)
    found |= (emulator::exchanged[warp + 4 * (2 * t + k) + g / 2].a[0] >> g % 2 * 16 & 0xFFFF) << 16 * k;
  warp_barrier();
  return found;
}
device void put_transposed(unsigned char* line, const unsigned (&pairs)[4]) {
  const int thread = emulator::current, warp = thread / 32 * 32, matrix = thread % 32 / 8, column = thread % 8;
  memcpy(emulator::exchanged[thread].a, pairs, sizeof pairs);
  warp_barrier();
  for (int row = 0; row < 8; ++row) {
    const unsigned pair = emulator::exchanged[warp + 4 * row + column / 2].a[matrix];
    reinterpret_cast<unsigned short*>(line)[row] = (unsigned short)(pair >> column % 2 * 16);
  }
  warp_barrier();
}
device unsigned votes(bool ours) {
  const int thread = threadIdx.x;
  emulator::exchanged[thread].a[0] = ours;
  warp_barrier();
  unsigned found = 0;
  for (int n = 0; n < 32; ++n) found |= emulator::exchanged[thread / 32 * 32 + n].a[0] << n;
  warp_barrier();
  return found;
}
device int ones_of(unsigned word) { return __builtin_popcount(word); }
device int lowest_of(uint64_t word) { return __builtin_ctzll(word); }
device unsigned bits_of(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
device unsigned bf16_pair(float low, float high) { return rounded<false>(low) | unsigned(rounded<false>(high)) << 16; }
device unsigned fused(unsigned a, unsigned b, unsigned c) {
  unsigned d = 0;
  for (int k = 0; k < 32; k += 16) {
    const double exact = double(widened(a >> k)) * widened(b >> k) + widened(c >> k);
    d |= unsigned(rounded<HALF>(float(exact))) << k;
  }
  return d;
}
device unsigned negated(unsigned pair) { return pair ^ 0x80008000u; }
device unsigned lesser(unsigned a, unsigned b) {
  unsigned d = 0;
  for (int k = 0; k < 32; k += 16) d |= unsigned(rounded<HALF>(std::fmin(widened(a >> k), widened(b >> k)))) << k;
  return d;
}
device unsigned greater(unsigned a, unsigned b) {
  unsigned d = 0;
  for (int k = 0; k < 32; k += 16) {
    const float one = widened(a >> k), other = widened(b >> k);
    d |= (one >= other || std::isnan(one) ? a >> k & 0xFFFF : b >> k & 0xFFFF) << k;
  }
  return d;
}
device unsigned chosen(unsigned word, unsigned mask, unsigned others) { return (word & mask) | others; }
device unsigned either(unsigned mask, unsigned ones, unsigned zeros) { return (ones & mask) | (zeros & ~mask); }
device unsigned permuted(unsigned a, unsigned b, unsigned bytes) {
  const uint64_t all = uint64_t(b) << 32 | a;
  unsigned d = 0;
  for (int k = 0; k < 4; ++k) d |= unsigned(all >> 8 * (bytes >> 4 * k & 7) & 255) << 8 * k;
  return d;
}
template <bool HALF_> device float number_of_word(unsigned bits) { return HALF_ ? half_value(bits) : as_float(bits << 16); }
template <bool HALF_> device void multiply_as(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int thread = emulator::current, warp = thread / 32 * 32, g = thread % 32 / 4, t = thread % 4;
  emulator::exchanged[thread] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  warp_barrier();
  for (int j = 0; j < 4; ++j) {
    const int column = 2 * t + j % 2;
    for (int k = 0; k < 16; ++k) {
      const emulator::Operands& weights = emulator::exchanged[warp + 4 * g + k % 8 / 2];
      const emulator::Operands& tokens = emulator::exchanged[warp + 4 * column + k % 8 / 2];
      const unsigned w = weights.a[j / 2 + k / 8 * 2] >> k % 2 * 16, x = tokens.b[k / 8] >> k % 2 * 16;
      sum[j] += number_of_word<HALF_>(w) * number_of_word<HALF_>(x);
    }
  }
  warp_barrier();
}
device void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply_as<HALF>(sum, a, b0, b1); }
device void multiply_halves(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply_as<true>(sum, a, b0, b1); }
device void multiply_bits(int (&counts)[4], unsigned a0, unsigned a1, unsigned b) {
  const int thread = emulator::current, warp = thread / 32 * 32, g = thread % 32 / 4, t = thread % 4;
  emulator::exchanged[thread] = {{a0, a1, 0, 0}, {b, 0}};
  warp_barrier();
  for (int j = 0; j < 4; ++j) {
    counts[j] = 0;
    for (int k = 0; k < 4; ++k)
      counts[j] += __builtin_popcount(emulator::exchanged[warp + 4 * g + k].a[j / 2] & emulator::exchanged[warp + 4 * (2 * t + j % 2) + k].b[0]);
  }
  warp_barrier();
}
device void multiply_alone(float (&product)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  memset(product, 0, sizeof product);
  multiply(product, a, b0, b1);
}
device float absolute(float value) { return std::fabs(value); }
device float max_of(float a, float b) { return std::fmax(a, b); }
device float quotient(float a, float b) { return a / b; }
device float sigmoid(float value) { return 1.0f / (1.0f + std::exp(-value)); }
device float error_function(float value) { return std::erf(value); }
device float inverse_root(float value) { return 1.0f / std::sqrt(value); }
device unsigned char e4m3(float value) {
  const float size = std::fmin(std::fabs(value), 448.0f);
  int exponent = size > 0 ? std::ilogb(size) : -6;
  exponent = exponent < -6 ? -6 : exponent;
  const int code = int(std::nearbyint(std::ldexp(size, 3 - exponent))) + 8 * (exponent + 6);
  return (unsigned char)(code | (std::signbit(value) ? 128 : 0));
}
device unsigned short e4m3_pair(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
device unsigned short e4m3_of_halves(unsigned halves) { return e4m3_pair(half_value(halves), half_value(halves >> 16)); }
device void reduce_over_block(float& sum, float& most, float*) {
  static float sums, maxima;
  block_barrier();
  if (threadIdx.x == 0) sums = maxima = 0;
  block_barrier();
  sums += sum, maxima = std::fmax(maxima, most);
  block_barrier();
  sum = sums, most = maxima;
}

// ---- wgmma.cuh.

typedef unsigned long long u64;

// A barrier in shared memory is 8 bytes: how many are to arrive, who has, bytes to come, phase.
struct Phased { unsigned char count, arrived; unsigned short phase; int bytes; };
device Phased& phased(u64* barrier) { return *reinterpret_cast<Phased*>(barrier); }
device void advance(Phased& own) {
  if (own.arrived == own.count && own.bytes == 0) own.arrived = 0, own.phase ^= 1;
}
device void prepare_barrier(u64* barrier, unsigned count) { phased(barrier) = {(unsigned char)count, 0, 0, 0}; }
device void barriers_are_prepared() {}
device void cluster_barrier() { emulator::arrive(emulator::barriers[0], 0, emulator::fibers.size()); }
device unsigned rank_in_cluster() { return own_block(); }
// The same place in the shared memory of another block of the cluster.
template <class T> device T* of_block(T* at, unsigned rank) {
  return reinterpret_cast<T*>(emulator::memory[rank].data() + (reinterpret_cast<unsigned char*>(at) - emulator::shared));
}
device uint4 load_of_block(const uint4* at, unsigned rank) {
  return *of_block(const_cast<uint4*>(at), rank);
}
device void expect(u64* barrier, unsigned bytes) {
  phased(barrier).bytes += bytes, ++phased(barrier).arrived;
  advance(phased(barrier));
}
device void arrive_at(u64* barrier) { ++phased(barrier).arrived, advance(phased(barrier)); }
device void arrive_at(u64* barrier, unsigned rank) { arrive_at(of_block(barrier, rank)); }
device void wait_for(u64* barrier, unsigned phase) {
  while (phased(barrier).phase == phase) swapcontext(&emulator::fibers[emulator::current], &emulator::scheduler);
}
static std::vector<int> passed, taken;  // by both fours of each block, by each thread
device void pass_turn(int four) { ++passed[2 * own_block() + 1 - four]; }
device void take_turn(int four) {
  const int wanted = 128 * ++taken[emulator::current];
  while (passed[2 * own_block() + four] < wanted) swapcontext(&emulator::fibers[emulator::current], &emulator::scheduler);
}
static std::vector<emulator::Barrier> fours;  // of warps
device void barrier_of_four(int) {
  const int four = emulator::current / 128;
  emulator::arrive(fours[four], 128 * four, 128);
}
device void barrier_of_both() {
  emulator::arrive(fours[own_block() * (emulator::threads / 128) + 2], own_block() * emulator::threads, 256);
}
template <int COUNT> device void give_registers_back() {}
template <int COUNT> device void take_registers() {}
device void copy_bulk(unsigned char* to, const void* from, unsigned bytes, u64* barrier) {
  memcpy(to, from, bytes);
  phased(barrier).bytes -= bytes;
  advance(phased(barrier));
}
device void copy_bulk_to(unsigned char* to, const void* from, unsigned bytes, u64* barrier, unsigned short blocks) {
  for (unsigned rank = 0; blocks >> rank; ++rank)
    if (blocks >> rank & 1) copy_bulk(of_block(to, rank), from, bytes, of_block(barrier, rank));
}
device void begin_products() {}
device void commit_products() {}
template <int PENDING> device void wait_for_products() {}
device void settle(float&) {}
device void settle(unsigned&) {}
device u64 tokens_at(const unsigned char* block, unsigned leading) {
  return u64(block - emulator::shared) / 16 | u64(leading) << 32;
}
template <int N> device void multiply_wide(float (&d)[N][4], const unsigned (&a)[4], u64 tokens, bool add) {
  const int t = threadIdx.x % 4, n = threadIdx.x % 32 / 4;
  const unsigned char* block = emulator::shared + 16 * (tokens & 0xFFFF);
  for (int first = 0; first < N; ++first) {
    if (!add) memset(d[first], 0, 16);
    unsigned b[2];
    for (int half = 0; half < 2; ++half) memcpy(&b[half], block + half * (tokens >> 32) + first * 128 + n * 16 + 4 * t, 4);
    multiply(d[first], a, b[0], b[1]);
  }
}

// ---- Lines of 128 bytes, swizzled: of a place in shared memory, bits 7 to 9 are added to bits 4 to 6.

device u64 swizzled(u64 place) { return place ^ (place >> 7 & 7) << 4; }
struct Box { const unsigned short* from; long long stride; int rows, columns, height; };  // in the place of a tensor map
device void copy_box(unsigned char* to, const void* map, int column, int row, u64* barrier) {
  const Box& box = *static_cast<const Box*>(map);
  for (int n = 0; n < 64 * box.height; ++n) {
    const int own_row = row + n / 64, own_column = column + n % 64;
    const bool real = own_row < box.rows && own_column < box.columns;
    unsigned char* place = to + swizzled(2 * n);  // whole kilobytes
    *reinterpret_cast<unsigned short*>(place) = real ? box.from[own_row * box.stride + own_column] : 0;
  }
  phased(barrier).bytes -= 128 * box.height;
  advance(phased(barrier));
}
device void show_to_products() {}
device u64 lines_at(unsigned block) { return block / 16; }
// Addresses in shared memory.
device unsigned kept_address(const void* at) { return static_cast<const unsigned char*>(at) - emulator::shared; }
template <class T> device void store(unsigned at, const T& words) { memcpy(emulator::shared + at, &words, sizeof words); }
device u64* barrier_at(unsigned at) { return reinterpret_cast<u64*>(emulator::shared + at); }
device void expect(unsigned barrier, unsigned bytes) { expect(barrier_at(barrier), bytes); }
device void arrive_at(unsigned barrier) { arrive_at(barrier_at(barrier)); }
device void arrive_at(unsigned barrier, unsigned rank) { arrive_at(barrier_at(barrier), rank); }
device bool is_over(unsigned barrier, unsigned phase) { return phased(barrier_at(barrier)).phase != phase; }
device void wait_for(unsigned barrier, unsigned phase) { wait_for(barrier_at(barrier), phase); }
device void copy_box(unsigned to, const void* map, int column, int row, unsigned barrier) {
  copy_box(emulator::shared + to, map, column, row, barrier_at(barrier));
}
template <int N> device void multiply_lines(float (&d)[N][4], u64 weights, u64 tokens, bool add) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32 % 4;
  const auto number = [](u64 lines, int line, int k) {
    return widened(*reinterpret_cast<const unsigned short*>(emulator::shared + swizzled(16 * lines + 128 * line + 2 * k)));
  };
  float own[2][16];
  for (int which = 0; which < 2; ++which)
    for (int k = 0; k < 16; ++k) own[which][k] = number(weights, 16 * warp + g + 8 * which, k);
  for (int n = 0; n < N; ++n)
    for (int column = 0; column < 2; ++column) {
      float x[16];
      for (int k = 0; k < 16; ++k) x[k] = number(tokens, 8 * n + 2 * t + column, k);
      for (int which = 0; which < 2; ++which) {
        float& sum = d[n][2 * which + column];
        if (!add) sum = 0;
        for (int k = 0; k < 16; ++k) sum += own[which][k] * x[k];
      }
    }
}
