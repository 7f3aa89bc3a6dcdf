// Blocks of keys or values as uniform codes with two corrections, as the codecs of kv/ have them, bit for bit: extremes of
// a vector leave before ranges are found, the largest errors are stored, and of what is then left a matrix of low rank.
//
// A block of threads has one block of one head in shared memory. PARTS neighbouring threads have a vector, which is a
// channel over the block's tokens or a token over its channels. No product is fused with a sum, and every sum is of
// numbers half a vector apart, then of half as many, and so on.
//
// Macros: CHANNELS_APART (vectors are channels), BITS, GROUP (numbers that share a scale), BLOCK (tokens), D, X (type of
// the numbers), ENTRIES (stored errors of a vector), RANK, ITERATIONS; HALF is 1.

#include "encode_types.cuh"


struct Arguments {
  const void* x;       // [batch][heads][tokens][D], with strides
  const int* source;   // [batch][tokens]: the token that is read in the place of each, -1: zeros; or null
  const float* start;  // [D][RANK]: where the search for directions begins
  u32* codes;
  u16* scale;
  u16* zero;
  u16* values;   // [pairs][blocks][vectors][ENTRIES]
  u8* indices;   // likewise
  u16* left;     // [pairs][blocks][BLOCK][RANK]
  u16* right;    // [pairs][blocks][RANK][D]
  u32* faults;
  i64 batch_stride, head_stride;
  int tokens, heads;
};

constexpr int LENGTH = CHANNELS_APART ? BLOCK : D, VECTORS = CHANNELS_APART ? D : BLOCK;
constexpr int PARTS = LENGTH / MINE, TOGETHER = GROUP / MINE, THREADS = VECTORS * PARTS;
constexpr int PITCH = D + 1;  // so that neither a row's nor a column's numbers meet in a bank

#include "encode_codes.cuh"

// The sum over LENGTH_ numbers of a warp: lane n has n, n + 32 and so on.
template <int LENGTH_> device float sum_of(float (&x)[LENGTH_ / 32]) {
#pragma unroll
  for (int half = LENGTH_ / 64; half > 0; half /= 2)
#pragma unroll
    for (int n = 0; n < half; ++n) x[n] += x[n + half];
  float sum = x[0];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += of_lane_xor(sum, distance);
  return sum;
}

// Columns [RANK][BLOCK] made orthonormal by one warp: each less what those before it give, twice; zeros where that is all.
device void make_orthonormal(float* columns, int lane) {
  constexpr int OWN = BLOCK / 32;
  const auto norm = [&](const float* x) {
    float squares[OWN];
#pragma unroll
    for (int n = 0; n < OWN; ++n) squares[n] = x[n] * x[n];
    return root(sum_of<BLOCK>(squares));
  };
  for (int column = 0; column < RANK; ++column) {
    float x[OWN];
#pragma unroll
    for (int n = 0; n < OWN; ++n) x[n] = columns[column * BLOCK + 32 * n + lane];
    const float size = norm(x);
    for (int turn = 0; turn < 2 * column; ++turn) {
      const float* other = columns + turn % column * BLOCK + lane;
      float products[OWN];
#pragma unroll
      for (int n = 0; n < OWN; ++n) products[n] = other[32 * n] * x[n];
      const float share = sum_of<BLOCK>(products);
#pragma unroll
      for (int n = 0; n < OWN; ++n) x[n] -= other[32 * n] * share;
    }
    const float rest = norm(x);
#pragma unroll
    for (int n = 0; n < OWN; ++n) columns[column * BLOCK + 32 * n + lane] = rest > 1e-6f * size ? x[n] / rest : 0.0f;
    warp_barrier();
  }
}

// `to[row] = sum over n of matrix[row * ROW + n * STEP] * by[n]`, COUNT of them, LENGTH_ numbers each: four neighbouring
// threads have one, neighbours of 8 in every 32.
template <int COUNT, int LENGTH_, int ROW, int STEP> device void multiply_all(float* to, const float* matrix, const float* by) {
  for (int at = threadIdx.x; at < 4 * COUNT; at += THREADS) {
    const int row = at / 4, part = at % 4;
    float x[LENGTH_ / 4];
#pragma unroll
    for (int n = 0; n < LENGTH_ / 4; ++n) {
      const int place = n / 8 * 32 + 8 * part + n % 8;
      x[n] = matrix[row * ROW + place * STEP] * by[place];
    }
    if constexpr (LENGTH_ == 128)
#pragma unroll
      for (int n = 0; n < 16; ++n) x[n] += x[n + 16];
    if constexpr (LENGTH_ >= 64)
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] += x[n + 8];
#pragma unroll
    for (int distance = 2; distance > 0; distance /= 2)
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] += of_lane_xor(x[n], distance);
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
      for (int n = 0; n < half; ++n) x[n] += x[n + half];
    if (part == 0) to[row] = x[0];
  }
}

extern "C" global __launch_bounds__(THREADS) void rarefy_encode_blocks(const Arguments a) {
  const i64 pair = blockIdx.y, batch = pair / a.heads, head = pair % a.heads, block = pair * (a.tokens / BLOCK) + blockIdx.x;
  const int thread = threadIdx.x, vector = thread / PARTS, part = thread % PARTS, first = blockIdx.x * BLOCK;
  float* all = reinterpret_cast<float*>(pool);  // [BLOCK][PITCH]
  float* left = all + BLOCK * PITCH;            // [RANK][BLOCK]
  float* right = left + RANK * BLOCK;           // [RANK][D]
  bool fine = true;
  for (int n = thread; n < BLOCK * D; n += THREADS) {
    const int token = n / D, from = a.source != nullptr ? a.source[batch * a.tokens + first + token] : first + token;
    const float x = from < 0 ? 0.0f : number_at<X>(a.x, batch * a.batch_stride + head * a.head_stride + i64(from) * D + n % D);
    fine &= absolute(x) <= 3.4028234e38f;
    all[token * PITCH + n % D] = x;
  }
  block_barrier();

  // ---- Codes.
  float* own = all + (CHANNELS_APART ? part * MINE * PITCH + vector : vector * PITCH + part * MINE);
  constexpr int STEP = CHANNELS_APART ? PITCH : 1;
  float x[MINE], rest[MINE];
#pragma unroll
  for (int n = 0; n < MINE; ++n) x[n] = own[n * STEP];
  float low = as_float(0xFF800000u), high = as_float(0x7F800000u);  // between which ranges are found
  if constexpr (ENTRIES > 0) {
#pragma unroll
    for (int n = 0; n < MINE; ++n) rest[n] = x[n];
    for (int n = 0; n <= ENTRIES / 2; ++n) high = take_largest(rest, part).value;
#pragma unroll
    for (int n = 0; n < MINE; ++n) rest[n] = -x[n];
    for (int n = 0; n <= ENTRIES / 2; ++n) low = -take_largest(rest, part).value;
  }
#pragma unroll
  for (int n = 0; n < MINE; ++n) rest[n] = smaller(larger(x[n], low), high);
  low = rest[0], high = rest[0];
#pragma unroll
  for (int n = 1; n < MINE; ++n) low = smaller(low, rest[n]), high = larger(high, rest[n]);
#pragma unroll
  for (int distance = 1; distance < TOGETHER; distance *= 2)
    low = smaller(low, of_lane_xor(low, distance)), high = larger(high, of_lane_xor(high, distance));
  const Steps steps = steps_of(low, high);
  const float scale = half_value(steps.scale), zero = half_value(steps.zero);
  u32 codes[MINE];
#pragma unroll
  for (int n = 0; n < MINE; ++n) {
    codes[n] = code_of(rest[n], scale, zero);
    x[n] -= (float(codes[n]) - zero) * scale;
    rest[n] = absolute(x[n]);
  }
  const i64 row = block * VECTORS + vector;
  store_codes(a.codes + (row * PARTS + part) * BITS, codes);
  if (part % TOGETHER == 0) {
    const i64 group = row * (LENGTH / GROUP) + part / TOGETHER;
    a.scale[group] = steps.scale, a.zero[group] = steps.zero;
  }
  const u32 fault = (fine ? 0 : NOT_FINITE) | overflow_of(scale, zero);
  if (fault) raise(a.faults, fault);

  // ---- The largest errors.
  for (int entry = 0; entry < ENTRIES; ++entry) {
    const int index = take_largest(rest, part).index;
    float error = 0.0f;
#pragma unroll
    for (int n = 0; n < MINE; ++n) error = part * MINE + n == index ? x[n] : error;
    if (index / MINE != part) continue;
    const u16 value = rounded<true>(at_most(error));
#pragma unroll
    for (int n = 0; n < MINE; ++n) x[n] -= part * MINE + n == index ? half_value(value) : 0.0f;
    a.values[row * ENTRIES + entry] = value, a.indices[row * ENTRIES + entry] = u8(index);
  }

  // ---- The leading directions of the rest.
  if constexpr (RANK > 0) {
#pragma unroll
    for (int n = 0; n < MINE; ++n) own[n * STEP] = x[n];
    for (int n = thread; n < D * RANK; n += THREADS) right[n % RANK * D + n / RANK] = a.start[n];
    for (int turn = 0; turn < ITERATIONS; ++turn) {
      block_barrier();
      for (int column = 0; column < RANK; ++column)
        multiply_all<BLOCK, D, PITCH, 1>(left + column * BLOCK, all, right + column * D);
      block_barrier();
      if (thread < 32) make_orthonormal(left, thread);
      block_barrier();
      for (int column = 0; column < RANK; ++column)
        multiply_all<D, BLOCK, 1, PITCH>(right + column * D, all, left + column * BLOCK);
    }
    block_barrier();
    for (int n = thread; n < BLOCK * RANK; n += THREADS)
      a.left[block * BLOCK * RANK + n] = rounded<true>(left[n % RANK * BLOCK + n / RANK]);
    for (int n = thread; n < D * RANK; n += THREADS) a.right[block * D * RANK + n] = rounded<true>(right[n]);
  }
}
