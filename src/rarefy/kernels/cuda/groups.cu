// Y[token][row] for a weight of which each row keeps some groups of columns, in 4 bits; a few tokens.
//
// Rows keep different groups, so they cannot share a tile of a tensor core: a warp takes a row, a lane 16 neighbouring
// weights. Where the codes lie does not depend on which groups they are, so they are on their way while the row's bitmap
// is turned into a list, and those of the next row while this one is computed. Products of four weights are summed in
// float16 with activations scaled to its range, all else in float32.
//
// Macros besides those of kept.cuh: GROUP (columns), SCALE, ZERO (types), CENTER.

#include "kept.cuh"

constexpr int PIECES = GROUP / 16;
constexpr int AHEAD = 4;  // loads of a lane before the first is used
constexpr u32 MAGIC = 0x64006400u, ONES = 0x3C003C00u;
constexpr u32 OFFSET = (0xE400u + CENTER) * 0x10001u;  // minus 1024 and the code that means zero

struct Row {
  u32 first, count;  // of its pieces of 16 weights
  u32 words;         // lane n: word n of the bitmap
  uint2 codes[AHEAD];
  u32 scale[AHEAD];
};

device void fetch(Row& row, int slot, u32 at, const Arguments& a) {
  if (at >= row.count) return;
  row.codes[slot] = load_once(static_cast<const uint2*>(a.codes) + i64(row.first) + at);
  row.scale[slot] = raw<SCALE>(a.scale, (i64(row.first) + at) / PIECES);
}

device void begin(Row& row, int number_of_row, int lane, const Arguments& a) {
  const bool real = number_of_row < a.rows;
  const u32* starts = static_cast<const u32*>(a.row_ptr);
  row.first = real ? starts[number_of_row] * PIECES : 0;
  row.count = real ? starts[number_of_row + 1] * PIECES - row.first : 0;
  row.words = real && lane < a.words ? a.bitmap[i64(number_of_row) * a.words + lane] : 0;
#pragma unroll
  for (int slot = 0; slot < AHEAD; ++slot) fetch(row, slot, slot * 32 + lane, a);
}

// Eight neighbouring activations as float32.
device void load_tokens(float (&values)[8], const Arguments& a, int token, int column) {
  const bool real = token < a.tokens && column < a.columns;
  const uint4 all = load_shared_by_all(reinterpret_cast<const uint4*>(a.x + i64(token) * a.stride + column), real);
  const u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = activation(u16(words[k / 2] >> 16 * (k % 2)));
}

// Tokens to shared memory in float16, each eight as codes are beside each other in the halves of words, with their sums.
// Returns the power of two that was taken out of them.
device float stage(uint4* tokens, float* totals, float* shared, int halves, const Arguments& a) {
  float none = 0.0f, most = 0.0f;
  for (int n = threadIdx.x; n < TOKENS * halves; n += THREADS) {
    float values[8];
    load_tokens(values, a, n / halves, n % halves * 8);
#pragma unroll
    for (int k = 0; k < 8; ++k) most = max_of(most, absolute(values[k]));
  }
  reduce_over_block(none, most, shared);
  const int exponent = int(bits_of(most) >> 23) - 126;
  const bool sane = exponent > -100 && exponent < 100;
  const float down = sane ? as_float(u32(127 - exponent) << 23) : 1.0f;
  for (int n = threadIdx.x; n < TOKENS * halves; n += THREADS) {
    float values[8], total = 0.0f;
    load_tokens(values, a, n / halves, n % halves * 8);
#pragma unroll
    for (int k = 0; k < 8; ++k) total += values[k] *= down;
    u32 pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) pairs[k] = rounded<true>(values[k]) | u32(rounded<true>(values[k + 4])) << 16;
    tokens[n] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    totals[n] = total;
  }
  block_barrier();
  return sane ? as_float(u32(127 + exponent) << 23) : 1.0f;
}

// The numbers of the groups that a row keeps, each lane those of its own stretch of the bitmap; a long row's word by word.
device void list_groups(u16* list, const Row& row, int at_row, int lane, const Arguments& a) {
  if (a.words <= 32) {
    const int first = lane * a.words;
    const u32 low = of_lane(row.words, first / 32), high = of_lane(row.words, (first / 32 + 1) % 32);
    const u32 own = funnel(low, high, first % 32) & (0xFFFFFFFFu >> (32 - a.words));
    u32 at = sum_until(ones_of(own), lane) - ones_of(own);
    for (int n = 0; n < a.words; ++n)
      if (own >> n & 1) list[at++] = u16(first + n);
  } else {
    u32 before = 0;
    for (int word = 0; word < a.words; ++word) {
      const u32 bits = word < 32 ? of_lane(row.words, word) : a.bitmap[i64(at_row) * a.words + word];
      if (bits >> lane & 1) list[before + ones_of(bits & ((1u << lane) - 1))] = u16(32 * word + lane);
      before += ones_of(bits);
    }
  }
}

extern "C" global __launch_bounds__(THREADS, TOKENS > 2 ? 1 : 2) void rarefy_groups(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int halves = (a.columns + 15) / 16 * 2, stride = gridDim.x * WARPS;
  uint4* tokens = reinterpret_cast<uint4*>(pool);                       // [TOKENS][halves of 16 columns]
  float* totals = reinterpret_cast<float*>(tokens + TOKENS * halves);   // likewise
  float* shared = totals + TOKENS * halves;                             // [64]
  u16* list = reinterpret_cast<u16*>(shared + 64) + warp * 32 * a.words;  // a row's groups

  Row row;
  begin(row, blockIdx.x * WARPS + warp, lane, a);
  start_later_kernels();
  wait_for_earlier_kernels();
  const float up = stage(tokens, totals, shared, halves, a);

  for (int at_row = blockIdx.x * WARPS + warp; at_row < a.rows; at_row += stride) {
    list_groups(list, row, at_row, lane, a);
    warp_barrier();
    Row next;
    begin(next, at_row + stride, lane, a);
    float sums[TOKENS] = {};
    for (u32 base = 0; base < row.count; base += 32 * AHEAD) {
#pragma unroll
      for (int slot = 0; slot < AHEAD; ++slot) {
        const u32 at = base + slot * 32 + lane;
        if (at < row.count) {
          const int piece = list[at / PIECES] * PIECES + at % PIECES;
          u32 weights[8];
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const u32 word = k < 4 ? row.codes[slot].x : row.codes[slot].y;
            weights[k] = fused(chosen(word >> 4 * (k % 4), 0x000F000Fu, MAGIC), ONES, OFFSET);
          }
          const float zero = ZERO == NONE ? 0.0f : CENTER - number<ZERO>(a.zero, (i64(row.first) + at) / PIECES);
#pragma unroll
          for (int token = 0; token < TOKENS; ++token) {
            float part = 0.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int place = token * halves + 2 * piece + half;
              const uint4 x = tokens[place];
              u32 sum = fused(weights[4 * half], x.x, 0);
              sum = fused(weights[4 * half + 1], x.y, sum);
              sum = fused(weights[4 * half + 2], x.z, sum);
              sum = fused(weights[4 * half + 3], x.w, sum);
              part += half_value(u16(sum)) + half_value(u16(sum >> 16));
              if constexpr (ZERO != NONE) part += zero * totals[place];
            }
            sums[token] += meant<SCALE>(row.scale[slot]) * part;
          }
        }
        fetch(row, slot, at + 32 * AHEAD, a);
      }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      const float sum = sum_of_warp(sums[token]) * up * a.multiplier;
      if (lane == 0 && token < a.tokens) a.y[i64(token) * a.rows + at_row] = rounded<X_HALF>(sum);
    }
    row = next;
  }
}
