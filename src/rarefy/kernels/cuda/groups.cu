// Y[token][row] for a weight of which each row keeps some groups of columns, in 4 bits; a few tokens.
//
// A block takes the 16 rows of a tile (mma.m16n8k16). Rows keep different groups, so each gets a column of the product to
// itself: the first product pairs the n-th kept pieces of 16 columns of all rows with what the first eight of them meet,
// the second with what the others meet, and of both only the diagonal is wanted. Warps share a row's pieces, eight to a
// chunk. A code becomes a number exactly, scales meet float32 sums.
//
// Macros besides those of kept.cuh: GROUP (columns), SCALE, ZERO (types), CENTER.

#include "kept.cuh"

constexpr int PIECES = GROUP / 16, CHUNK = 8, SCALES = CHUNK / PIECES;  // of 16 columns; of a chunk: pieces, groups
constexpr int AHEAD = 1;                                                // chunks of a warp on their way
constexpr u32 MAGIC = HALF ? 0x64006400u : 0x43004300u;                 // 1024 or 128
constexpr u32 ONES = HALF ? 0x3C003C00u : 0x3F803F80u;
constexpr u32 OFFSET = ((HALF ? 0xE400u : 0xC300u) + CENTER) * 0x10001u;  // minus that and the code that means zero
static_assert(CHUNK % PIECES == 0, "whole groups in a chunk");

// The scales or zeros of a chunk, as they are stored.
template <int TYPE> struct Numbers {
  static constexpr int SIZE = TYPE == NONE ? 0 : TYPE == F32 ? 4 : TYPE == U8 ? 1 : 2, BYTES = SIZE * SCALES;
  u32 words[BYTES < 4 ? 1 : BYTES / 4];
};

template <int TYPE> device void load(Numbers<TYPE>& numbers, const void* base, i64 chunk) {
  using N = Numbers<TYPE>;
  const u8* from = static_cast<const u8*>(base) + chunk * N::BYTES;
  if constexpr (N::BYTES >= 16) {
#pragma unroll
    for (int n = 0; n < N::BYTES / 16; ++n) {
      const uint4 all = load_once(reinterpret_cast<const uint4*>(from) + n);
      u32* to = numbers.words + 4 * n;
      to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    }
  } else if constexpr (N::BYTES == 8) {
    const uint2 both = load_once(reinterpret_cast<const uint2*>(from));
    numbers.words[0] = both.x, numbers.words[1] = both.y;
  } else if constexpr (N::BYTES == 4) {
    numbers.words[0] = load_once(reinterpret_cast<const u32*>(from));
  } else if constexpr (N::BYTES == 2) {
    numbers.words[0] = load_once(reinterpret_cast<const u16*>(from));
  } else if constexpr (N::BYTES == 1) {
    numbers.words[0] = *from;
  }
}
template <int TYPE> device float number_of(const Numbers<TYPE>& numbers, int which) {
  constexpr int SIZE = Numbers<TYPE>::SIZE;
  if constexpr (SIZE == 0) return 0.0f;
  else return meant<TYPE>(numbers.words[which * SIZE / 4] >> which * SIZE % 4 * 8 & (SIZE == 4 ? ~0u : (1u << 8 * SIZE % 32) - 1));
}

// Chunks of one of a lane's rows g and g + 8.
struct Row { i64 first; int count; };

device Row row_of(const Arguments& a, int row) {
  const u32* starts = static_cast<const u32*>(a.row_ptr);
  if (row >= a.rows) return {0, 0};
  if (starts == nullptr) return {i64(row) * a.groups, a.groups};
  return {starts[row], int(starts[row + 1] - starts[row])};
}

// A chunk of both: lane 4 * g + t has columns 4 * t to 4 * t + 3 of each piece, two pieces to a word. Which piece of the
// row each is takes a byte, above a number for the chunk where rows have more than 256.
struct Chunks {
  uint4 codes[2];
  uint2 places[2];
  u32 base[2];
  Numbers<SCALE> scale[2];
  Numbers<ZERO> zero[2];
};

// The chunk that comes `ahead` chunks, a constant, after chunk `number`.
device void fetch(Chunks& chunks, const Row (&rows)[2], int number, int ahead, int t, const Arguments& a) {
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    chunks.codes[which] = {0, 0, 0, 0}, chunks.places[which] = {0, 0}, chunks.base[which] = 0;
    chunks.scale[which] = {}, chunks.zero[which] = {};
    if (number + ahead >= rows[which].count) continue;
    const i64 chunk = rows[which].first + number + ahead;
    chunks.codes[which] = load_once(static_cast<const uint4*>(a.codes) + chunk * 4 + t);
    chunks.places[which] = load_once(static_cast<const uint2*>(a.places) + chunk);
    if (a.bases != nullptr) chunks.base[which] = load_once(a.bases + chunk);
    load(chunks.scale[which], a.scale, chunk);
    load(chunks.zero[which], a.zero, chunk);
  }
}

// Tokens to shared memory as they are, and the sums over pieces.
device void stage(u8* tokens, float* totals, const Arguments& a) {
  const int pieces = (a.columns + 15) / 16;
#pragma unroll
  for (int token = 0; token < TOKENS; ++token)
    for (int piece = threadIdx.x; piece < pieces; piece += THREADS) {
      const u16* from = a.x + i64(token) * a.stride + 16 * piece;
      float total = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool real = token < a.tokens && 16 * piece + 8 * half < a.columns;
        const uint4 all = load_shared_by_all(reinterpret_cast<const uint4*>(from) + half, real);
        reinterpret_cast<uint4*>(tokens)[2 * (token * pieces + piece) + half] = all;
        const u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
        for (int k = 0; k < (ZERO == NONE ? 0 : 8); ++k) total += widened(u16(words[k / 2] >> 16 * (k % 2)));
      }
      if constexpr (ZERO != NONE) totals[token * pieces + piece] = total;
    }
}

// All blocks of a large weight find room at once if a warp takes few registers.
extern "C" global __launch_bounds__(THREADS, TOKENS > 1 ? 1 : 28 / WARPS) void rarefy_groups(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int pieces = (a.columns + 15) / 16;
  u8* tokens = pool;                                                       // [TOKENS][pieces][32]
  float* totals = reinterpret_cast<float*>(tokens + TOKENS * pieces * 32);  // [TOKENS][pieces], where there are zeros
  float* meeting = totals + (ZERO == NONE ? 0 : TOKENS * pieces + 3 & ~3);   // [WARPS][TOKENS][16]

  const Row rows[2] = {row_of(a, blockIdx.x * 16 + g), row_of(a, blockIdx.x * 16 + g + 8)};
  Chunks chunks[AHEAD];
#pragma unroll
  for (int d = 0; d < AHEAD; ++d) fetch(chunks[d], rows, warp, d * WARPS, t, a);
  start_later_kernels();
  wait_for_earlier_kernels();
  stage(tokens, totals, a);
  block_barrier();

  float sums[TOKENS][2] = {};
  const auto word_of = [](const uint4& four, int n) { return n == 0 ? four.x : n == 1 ? four.y : n == 2 ? four.z : four.w; };
  const auto add = [&](const Chunks& now) {
    constexpr int FEW = TOKENS > 1 ? CHUNK : CHUNK / 2;
    const auto place = [&](int n, int which) { return permuted(n < 4 ? now.places[which].x : now.places[which].y, 0, 0x4440 + n % 4); };
    const u8* own_tokens[2] = {tokens + now.base[0] * 32 + 8 * t, tokens + now.base[1] * 32 + 8 * t};
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      uint2 x[FEW][2];  // of some pieces before the first is multiplied
#pragma unroll
      for (int n = 0; n < CHUNK; ++n) {
#pragma unroll
        for (int k = 0; k < (n % FEW == 0 ? FEW : 0); ++k)
#pragma unroll
          for (int which = 0; which < 2; ++which)
            x[k][which] = *reinterpret_cast<const uint2*>(own_tokens[which] + token * pieces * 32 + place(n + k, which) * 32);
        u32 weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          weights[i] = fused(chosen(word_of(now.codes[i % 2], n / 2) >> (8 * (n % 2) + i / 2 * 4), 0x000F000Fu, MAGIC), ONES, OFFSET);
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          float product[4];
          multiply_alone(product, weights, x[n % FEW][which].x, x[n % FEW][which].y);
          float own = g % 2 ? product[2 * which + 1] : product[2 * which];
          if constexpr (ZERO != NONE) own -= number_of(now.zero[which], n / PIECES) * totals[token * pieces + now.base[which] + place(n, which)];
          sums[token][which] += number_of(now.scale[which], n / PIECES) * own;
        }
      }
    }
  };
  for (int base = warp; votes(base < rows[0].count || base < rows[1].count) != 0; base += AHEAD * WARPS) {
#pragma unroll
    for (int d = 0; d < AHEAD; ++d) {
      add(chunks[d]);
      fetch(chunks[d], rows, base, (d + AHEAD) * WARPS, t, a);
    }
  }

  if (t == g / 2) {  // the others' are of rows and tokens that do not belong together
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
#pragma unroll
      for (int which = 0; which < 2; ++which) meeting[(warp * TOKENS + token) * 16 + g + 8 * which] = sums[token][which];
  }
  block_barrier();
  if (threadIdx.x < 16 * TOKENS) {
    const int token = threadIdx.x / 16, row = blockIdx.x * 16 + threadIdx.x % 16;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < WARPS; ++n) sum += meeting[(n * TOKENS + token) * 16 + threadIdx.x % 16];
    if (token < a.tokens && row < a.rows) a.y[i64(token) * a.rows + row] = rounded<HALF>(sum * a.multiplier);
  }
}
