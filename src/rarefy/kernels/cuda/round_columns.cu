// Columns of a weight, one after the other: rounded to an even grid, and what they lose taken from the columns after them.
//
// A lane has a row, so that nothing but the rows' independence is used: a warp rounds CHUNK columns from registers, one
// by one, then all warps of the block take the errors of the chunk from the columns behind it. What later columns take
// over lies in shared memory, and that of the next chunk is on its way meanwhile. Sums are in the order of the columns,
// as a loop over columns in torch has them.
//
// Macros: ROUND (whether there is a grid), RULE (below), WARPS, FUSED (whether a product is not rounded before it is
// added, as in torch on processors); HALF is 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

// What becomes of a column: all of it is rounded; what is not marked is dropped; what is marked stays as it is; or
// whether it stays is decided here and marked.
enum { EVERY = 0, DROP = 1, SPARE = 2, CHOOSE = 3 };

constexpr int MOST = 128;  // columns of a launch

struct Arguments {
  float* block;         // [members][width][rows], the first `count` columns of which are treated
  float* errors;        // [members][count][rows]
  const float* shares;  // [members][count][width]
  const float* scale;   // [groups][members * rows]
  const float* zero;    // likewise
  u8* codes;            // [count][members * rows]
  u8* marked;           // likewise
  float* lost;          // likewise
  const float* reach;   // [members * rows]: the error, in units of its column, beyond which a weight stays
  const float* unit;    // [members][count]
  i64 block_member, block_column, errors_member, errors_column, shares_member, shares_row, unit_member, unit_column;
  int members, rows, count, width, last;
  int group[MOST];
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

shared_memory(pool);

constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 16;
constexpr int PIECE = 128;  // columns whose shares are in shared memory at once
constexpr int AT_ONCE = 4;  // later columns of a warp

device float without(float value, float error, float share) {
  return FUSED ? fmaf(-error, share, value) : value - error * share;
}

// Shares of the errors of columns [first, first + CHUNK) in columns [from, from + PIECE); those beyond are zero.
device void stage(float* to, const float* shares, int first, int from, const Arguments& a) {
  for (int n = threadIdx.x; n < CHUNK * PIECE; n += THREADS) {
    const int row = first + n / PIECE, column = from + n % PIECE;
    const bool real = row < a.count && column < a.width;
    const float* source = shares + (real ? row * a.shares_row + column : 0);
    copy_word_async(reinterpret_cast<u8*>(to + n), source, real);
  }
  commit_copies();
}

extern "C" global void __launch_bounds__(THREADS) rarefy_round_columns(const Arguments a) {
  float* const staged = reinterpret_cast<float*>(pool);   // [2][CHUNK][PIECE]
  float* const passed = staged + 2 * CHUNK * PIECE;       // [CHUNK][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = blockIdx.y;
  const int row = blockIdx.x * 32 + lane;
  const bool real = row < a.rows;
  const i64 across = i64(a.members) * a.rows, own = i64(member) * a.rows + (real ? row : 0);
  float* const block = a.block + member * a.block_member + (real ? row : 0);
  float* const errors = a.errors + member * a.errors_member + (real ? row : 0);
  const float* const shares = a.shares + member * a.shares_member;
  const float reach = RULE == CHOOSE ? a.reach[own] : 0.0f;
  int side = 0;
  stage(staged, shares, 0, 0, a);
  for (int first = 0; first < a.count; first += CHUNK) {
    const int live = a.count - first < CHUNK ? a.count - first : CHUNK;
    wait_for_copies<0>();
    block_barrier();
    const float* const share = staged + side * CHUNK * PIECE;
    if (warp == 0) {
      float values[CHUNK], scales[CHUNK], zeros[CHUNK];
      bool marks[CHUNK];
#pragma unroll
      for (int n = 0; n < CHUNK; ++n) {
        const int column = first + (n < live ? n : 0);
        values[n] = block[column * a.block_column];
        if (ROUND) {
          scales[n] = a.scale[a.group[column] * across + own];
          zeros[n] = a.zero[a.group[column] * across + own];
        }
        marks[n] = (RULE == DROP || RULE == SPARE) && a.marked[column * across + own];
      }
#pragma unroll
      for (int n = 0; n < CHUNK; ++n) {
        if (n >= live) break;
        const int column = first + n;
        float lost = 0.0f;
        if (ROUND) {
          // A group of zeros has scale 0, and every value of it is then at its zero point.
          const float steps = scales[n] == 0.0f ? 0.0f : values[n] / scales[n];
          const float code = fminf(fmaxf(rintf(zeros[n] + steps), 0.0f), float(a.last));
          lost = values[n] - (code - zeros[n]) * scales[n];
          if (real) a.codes[column * across + own] = u8(code);
        }
        float error = lost;
        if (RULE == DROP && !marks[n]) error = values[n];
        if (RULE == CHOOSE) marks[n] = fabsf(lost) > reach * a.unit[member * a.unit_member + column * a.unit_column];
        if (RULE == CHOOSE && real) a.marked[column * across + own] = marks[n];
        if ((RULE == SPARE || RULE == CHOOSE) && marks[n]) error = 0.0f;
        if ((RULE == SPARE || RULE == CHOOSE) && real) a.lost[column * across + own] = lost;
        if (real) errors[column * a.errors_column] = error;
        if (real) block[column * a.block_column] = values[n];
        passed[n * 32 + lane] = error;
#pragma unroll
        for (int later = n + 1; later < CHUNK; ++later)
          values[later] = without(values[later], error, share[n * PIECE + later]);
      }
    }
    block_barrier();
    // A chunk that is not full is the last, and what lies behind it begins at once.
    int from = first;
    if (first + CHUNK < a.count) stage(staged + (side ^ 1) * CHUNK * PIECE, shares, first + CHUNK, first + CHUNK, a);
    float error[CHUNK];
#pragma unroll
    for (int n = 0; n < CHUNK; ++n) error[n] = n < live ? passed[n * 32 + lane] : 0.0f;
    for (int behind = first + live; from < a.width; from += PIECE) {
      if (from > first) {
        // Wider than what is staged: the next chunk's shares have to wait.
        wait_for_copies<0>();
        block_barrier();
        stage(staged + side * CHUNK * PIECE, shares, first, from, a);
        wait_for_copies<0>();
        block_barrier();
      }
      const int end = from + PIECE < a.width ? from + PIECE : a.width;
      for (int column = behind + warp * AT_ONCE; column < end; column += WARPS * AT_ONCE) {
        float values[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) values[k] = column + k < end ? block[(column + k) * a.block_column] : 0.0f;
#pragma unroll
        for (int n = 0; n < CHUNK; ++n)
#pragma unroll
          for (int k = 0; k < AT_ONCE; ++k)
            values[k] = without(values[k], error[n], share[n * PIECE + column - from + k]);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (real && column + k < end) block[(column + k) * a.block_column] = values[k];
      }
      behind = end;
    }
    block_barrier();
    side ^= 1;
  }
}
