// Y[token][row] for a weight of which a bitmap says what is kept, codes or 16-bit values; a few tokens.
//
// A warp takes a row, a lane one column of every 32: the bits before its own are how many kept weights lie before its
// own. So memory is read in the order in which it lies, and activations wait in shared memory. Where two of every four
// columns are kept, a lane takes eight kept weights instead, since their columns are known to be 16 neighbours.
//
// Macros besides those of kept.cuh: BITS (1, 2, 4, 8: codes; 16: values), VALUES (their type), GROUP (columns of a scale;
// 0: the whole row), SCALE, ZERO (types), CENTER.

#include "kept.cuh"

constexpr int AHEAD = TOKENS > 2 ? 16 : 32;  // words whose weights are loaded before the first is used

device const i64* starts_of(const Arguments& a) { return static_cast<const i64*>(a.row_ptr); }

// A kept weight as it is stored.
device float stored(const u8* codes, u32 at) {
  if constexpr (BITS == 16) return number<VALUES>(codes, at);
  else return float(codes[at * BITS / 8] >> at * BITS % 8 & ((1 << BITS) - 1));
}

// Of a word of the bitmap: itself, and how many kept weights of the row lie before it. A warp finds 32 of them at once.
struct Place { u32 mask, before; };

extern "C" global __launch_bounds__(THREADS, TOKENS > 2 ? 1 : 2) void rarefy_masked(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = gridDim.x * WARPS;
  const u32 below = (1u << lane) - 1;
  Place* places = reinterpret_cast<Place*>(pool) + 64 * warp;            // [WARPS][2][32]
  u16* tokens = reinterpret_cast<u16*>(pool + WARPS * 64 * sizeof(Place));  // [TOKENS][32 * words]
  i64 row = blockIdx.x * WARPS + warp;
  const auto word_at = [&](i64 row, int base) {
    return row < a.rows && base + lane < a.words ? load_once(a.bitmap + row * a.words + base + lane) : 0;
  };
  u32 next = word_at(row, 0);
  start_later_kernels();
  wait_for_earlier_kernels();
  for (int n = threadIdx.x; n < TOKENS * 32 * a.words; n += THREADS) {
    const int token = n / (32 * a.words), column = n % (32 * a.words);
    tokens[n] = token < a.tokens && column < a.columns ? a.x[i64(token) * a.stride + column] : u16(0);
  }
  block_barrier();
  for (int turn = 0; row < a.rows; row += stride) {
    const i64 first = starts_of(a)[row];
    const u8* codes = static_cast<const u8*>(a.codes) + first / 8 * BITS;
    u32 start = first % 8;
    float sums[TOKENS] = {};
    for (int base = 0; base < a.words; base += 32, turn ^= 1) {
      const u32 own = next;
      const bool ends = base + 32 >= a.words;
      next = word_at(ends ? row + stride : row, ends ? 0 : base + 32);
      const u32 until = sum_until(ones_of(own), lane);
      places[32 * turn + lane] = {own, start + until - ones_of(own)};
      start += of_lane(until, 31);
      warp_barrier();
      const int count = a.words - base < 32 ? a.words - base : 32;
      for (int group = 0; group < count; group += AHEAD) {
        float weights[AHEAD];
        u32 kept = 0;
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
          const Place place = places[32 * turn + group + n];
          const bool is_kept = place.mask >> lane & 1;
          weights[n] = is_kept ? stored(codes, place.before + ones_of(place.mask & below)) : 0.0f;
          if constexpr (SCALE != NONE) kept |= u32(is_kept) << n;
        }
        warp_barrier();  // all of them are on their way before the first is used
        const u16* x = tokens + 32 * (base + group) + lane;
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
          if (SCALE != NONE && !(kept >> n & 1)) continue;
          if (group + n >= count) continue;
          float weight = weights[n];
          if constexpr (SCALE != NONE) {
            const int column = 32 * (base + group + n) + lane;
            const i64 place = row * a.groups + (GROUP ? column / (GROUP ? GROUP : 1) : 0);
            weight = (weight - (ZERO == NONE ? float(CENTER) : number<ZERO>(a.zero, place))) * number<SCALE>(a.scale, place);
          }
#pragma unroll
          for (int token = 0; token < TOKENS; ++token) sums[token] += weight * activation(x[token * 32 * a.words + 32 * n]);
        }
      }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      const float sum = sum_of_warp(sums[token]) * a.multiplier;
      if (lane == 0 && token < a.tokens) a.y[i64(token) * a.rows + row] = rounded<X_HALF>(sum);
    }
  }
}

#if BITS >= 4
// ---- Two of every four columns (BITS: 4, 8 or 16), rows of `columns / 16` pieces of eight kept weights.

constexpr int PIECES = 4;  // of a lane that are on their way

template <int BITS_> struct Piece { uint4 weights; };
template <> struct Piece<8> { uint2 weights; };
template <> struct Piece<4> { u32 weights; };

struct Batch {
  Piece<BITS> piece[PIECES];
  u32 mask[PIECES];
  u32 scale[PIECES], zero[PIECES];
};

device void fetch(Batch& batch, const Arguments& a, i64 row, i64 first_code, int base, int lane) {
  const int pieces = a.columns / 16;
#pragma unroll
  for (int n = 0; n < PIECES; ++n) {
    const int at = base + 32 * n + lane;
    batch.mask[n] = 0;
    if (at >= pieces || row >= a.rows) continue;
    const u8* codes = static_cast<const u8*>(a.codes) + (first_code / 8 + at) * BITS;
    batch.piece[n].weights = load_once(reinterpret_cast<const decltype(Piece<BITS>::weights)*>(codes));
    batch.mask[n] = load_once(reinterpret_cast<const u16*>(a.bitmap + row * a.words) + at);
    const i64 place = row * a.groups + (GROUP ? at * 16 / (GROUP ? GROUP : 1) : 0);
    batch.scale[n] = raw<SCALE>(a.scale, place);
    batch.zero[n] = raw<ZERO>(a.zero, place);
  }
}

device float whole(u32 code) { return as_float(0x4B000000u | code) - 8388608.0f; }
device float value_of(u16 bits) { return VALUES == F16 ? half_value(bits) : as_float(u32(bits) << 16); }

// The two kept weights of the k-th four columns.
device void two_of(float (&found)[2], const uint4& words, int k, float) {
  const u32 word = k == 0 ? words.x : k == 1 ? words.y : k == 2 ? words.z : words.w;
  found[0] = value_of(u16(word)), found[1] = value_of(u16(word >> 16));
}
device void two_of(float (&found)[2], const uint2& words, int k, float zero) {
  const u32 word = (k < 2 ? words.x : words.y) >> 16 * (k % 2);
  found[0] = whole(word & 255) - zero, found[1] = whole(word >> 8 & 255) - zero;
}
device void two_of(float (&found)[2], u32 word, int k, float zero) {
  found[0] = whole(word >> 8 * k & 15) - zero, found[1] = whole(word >> (8 * k + 4) & 15) - zero;
}

extern "C" global __launch_bounds__(THREADS, TOKENS > 2 ? 1 : 2) void rarefy_two_of_four(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pieces = a.columns / 16, stride = gridDim.x * WARPS;
  u32* selectors = reinterpret_cast<u32*>(pool);             // which bytes of four activations a mask keeps
  uint4* tokens = reinterpret_cast<uint4*>(selectors + 16);  // [TOKENS][2][pieces], the halves of 16 columns apart
  const i64 kept = starts_of(a)[1] - starts_of(a)[0];              // of a row, with what fills up its last word
  i64 row = blockIdx.x * WARPS + warp;
  Batch batch;
  fetch(batch, a, row, row * kept, 0, lane);
  if (threadIdx.x < 16) {
    u32 bytes = 0, count = 0;
    for (u32 n = 0; n < 4; ++n)
      if (threadIdx.x >> n & 1) bytes |= (2 * n | (2 * n + 1) << 4) << 8 * count++;
    selectors[threadIdx.x] = bytes;
  }
  start_later_kernels();
  wait_for_earlier_kernels();
  for (int n = threadIdx.x; n < TOKENS * 2 * pieces; n += THREADS) {
    const int token = n / (2 * pieces), half = n / pieces % 2, piece = n % pieces;
    const uint4* from = reinterpret_cast<const uint4*>(a.x + i64(token) * a.stride + 16 * piece + 8 * half);
    tokens[n] = load_shared_by_all(from, token < a.tokens);
  }
  block_barrier();
  for (; row < a.rows; row += stride) {
    float sums[TOKENS] = {};
    for (int base = 0; base < pieces; base += 32 * PIECES) {
      const bool ends = base + 32 * PIECES >= pieces;
      const i64 next_row = ends ? row + stride : row;
      Batch next;
      fetch(next, a, next_row, next_row * kept, ends ? 0 : base + 32 * PIECES, lane);
#pragma unroll
      for (int n = 0; n < PIECES; ++n) {
        if (batch.mask[n] == 0) continue;
        const int at = base + 32 * n + lane;
        const float zero = ZERO == NONE ? float(CENTER) : meant<ZERO>(batch.zero[n]);
        const float scale = SCALE == NONE ? 1.0f : meant<SCALE>(batch.scale[n]);
        float part[TOKENS] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const u32 bytes = selectors[batch.mask[n] >> 4 * k & 15];
          float weights[2];
          two_of(weights, batch.piece[n].weights, k, zero);
#pragma unroll
          for (int token = 0; token < TOKENS; ++token) {
            const uint4 four = tokens[(2 * token + k / 2) * pieces + at];
            const u32 pair = permuted(k % 2 ? four.z : four.x, k % 2 ? four.w : four.y, bytes);
            part[token] += weights[0] * activation(u16(pair)) + weights[1] * activation(u16(pair >> 16));
          }
        }
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) sums[token] += scale * part[token];
      }
      batch = next;
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      const float sum = sum_of_warp(sums[token]) * a.multiplier;
      if (lane == 0 && token < a.tokens) a.y[i64(token) * a.rows + row] = rounded<X_HALF>(sum);
    }
  }
}
#endif
