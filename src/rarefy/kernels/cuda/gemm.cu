// Y[token][row] = sum over columns of X[token][column] * W[row][column], W in code, for many tokens (wgmma; compute
// capability 9.0).
//
// One warp brings tokens into shared memory, a few steps ahead, in the order in which they are wanted: `rarefy_arrange`
// has written them so. Warps in fours load codes, a few steps ahead too, and turn them into the first operand in
// registers, while the product before still runs. A group's sums are formed apart and scaled in float32, so that no
// weight is rounded.
//
// Macros besides those of codes.cuh: TOKENS (of 8), ACROSS (warps over rows, a multiple of four), STAGES (steps of tokens
// in shared memory), DEPTH (steps of codes in registers), SPLIT (blocks over columns, which add up what they have in each
// other's shared memory), CLUSTER (neighbouring blocks that share what they read of the tokens), IN_TURNS (two fours of
// warps multiply in turns), RESCALED (sums are kept in units of the last group's scale, which spares registers), OUTLIERS
// (type of single values that are added to the weight).

// The last warps bring what the others multiply: one where several blocks share a processor, else four, which can leave
// them their registers.
constexpr int THREADS = 32 * ACROSS + (ACROSS == 4 ? 32 : 128);

#include "codes.cuh"
#ifndef RAREFY_EMULATED
#include "wgmma.cuh"
#endif

constexpr int WIDTH = 8 * TOKENS, ROWS = 16 * TILES * ACROSS;
constexpr int STAGE_TOKENS = STEP * WIDTH * 2, STAGE_SUMS = SUMS ? PARTS * WIDTH * 4 : 0;
constexpr int STAGE = STAGE_TOKENS + STAGE_SUMS;  // bytes
constexpr int SUM_PITCH = ROWS + 4;
constexpr bool DIRECT = !SUMS && (GROUP == 0 || RESCALED);  // whether products are added to the sums at once
constexpr int TOGETHER = ACROSS > 4 ? 1 : TILES * TOKENS <= (RESCALED ? 8 : 4) ? 3 : 2;  // blocks of a processor
constexpr int CHUNK = PART < 4 ? PART : 4;  // blocks of 16 columns that are unpacked at once
constexpr int CHUNKS = BLOCKS / CHUNK, IN_PART = PART / CHUNK;
constexpr bool DRAINS = !DIRECT || GROUP != 0;  // whether a group has to wait for the one before
static_assert(DEPTH * CHUNKS % 2 == 0, "chunks unpacked in turns to two places");
constexpr int LEADING = WIDTH * 16;
static_assert(STAGE_TOKENS % (16 * CLUSTER) == 0 && WIDTH * ROWS % (4 * SPLIT) == 0, "equal shares of a cluster");

// Where a step's tokens lie, and their sums by group.
device const u8* arranged_tokens(const Arguments& a, int token_tile, int step) {
  return a.arranged + (i64(token_tile) * a.steps + step) * STAGE_TOKENS;
}
device const float* arranged_sums(const Arguments& a, int token_tile, int step) {
  return a.ones + (i64(token_tile) * a.steps + step) * (PARTS * WIDTH);
}

// One thread: brings the tokens of steps begin..begin + rounds to shared memory.
device void bring(const Arguments& a, u8* stages, u64* full, u64* empty, int begin, int rounds, u32 rank) {
  for (int round = 0; round < rounds; ++round) {
    const int step = begin + round, stage = round % STAGES;
    if (round >= STAGES) wait_for(empty + stage, (round / STAGES - 1) & 1);
    expect(full + stage, STAGE);
    u8* to = stages + stage * STAGE;
    if constexpr (CLUSTER > 1) {
      constexpr int SHARE = STAGE_TOKENS / CLUSTER;
      const u8* from = arranged_tokens(a, blockIdx.z, step) + rank % CLUSTER * SHARE;
      copy_bulk_to(to + rank % CLUSTER * SHARE, from, SHARE, full + stage, ((1 << CLUSTER) - 1) << rank / CLUSTER * CLUSTER);
    } else {
      copy_bulk(to, arranged_tokens(a, blockIdx.z, step), STAGE_TOKENS, full + stage);
    }
    if constexpr (SUMS) copy_bulk(to + STAGE_TOKENS, arranged_sums(a, blockIdx.z, step), STAGE_SUMS, full + stage);
  }
}

// ---- Outliers: three warps that have nothing else to do add those of one row after another, over all tokens of the
// block. Lanes are tokens, two of them a word. A row's entries are on their way while the row before is added up.

#if OUTLIERS
#include "outliers.cuh"

static_assert(ACROSS > 4, "warps that have nothing else to do");
static_assert(WIDTH == 16 || WIDTH == 32 || WIDTH == 64 || WIDTH == 128, "words of tokens for all lanes");
constexpr int LANES = WIDTH < 64 ? WIDTH / 2 : 32, ENTRIES_AT_ONCE = 32 / LANES, WORDS = WIDTH / 2 / LANES;
constexpr int BATCH = 20 / ENTRIES_AT_ONCE;  // loads on their way

device void add_outliers(const Arguments& a, int first_row, int token_tile, int which, int lane) {
  const u32* tokens = reinterpret_cast<const u32*>(a.turned);
  tokens += i64(token_tile) * a.steps * STEP * (WIDTH / 2) + lane % LANES * WORDS;
  const int last = first_row + ROWS < a.rows ? first_row + ROWS : a.rows;
  const int held = 4 * a.quads;
  const auto entry_at = [&](int row, int at) {
    const uint2* own = a.entries + (i64(row / 16) * a.quads + at / 4) * 32 + row % 8 * 4 + at % 4;
    return at < held && row < last ? load_near(reinterpret_cast<const u32*>(own) + row / 8 % 2) : 0;
  };
  u32 mine = entry_at(first_row + which, lane);
  for (int row = first_row + which; row < last; row += 3) {
    const u32 coming = entry_at(row + 3, lane);
    const Rest rest = rest_of(a, row);
    const int end = held + rest.end - rest.begin;
    float sums[WORDS][2] = {};
    for (int first = 0; first < end; first += 32) {
      const int at = first + lane;
      if (first > 0) mine = entry_at(row, at);
      if (at >= held) mine = at < end ? load_near(a.rest + rest.begin + at - held) : 0;
      const int left = end - first < 32 ? end - first : 32;
      for (int k = 0; k < left; k += BATCH * ENTRIES_AT_ONCE) {
        u32 words[BATCH][WORDS];
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
          const int at = k + n * ENTRIES_AT_ONCE + lane / LANES;
          const u32* from = tokens + (of_lane(mine, at < 32 ? at : 31) & 0xFFFF) * (WIDTH / 2);
#pragma unroll
          for (int w = 0; w < WORDS; ++w) words[n][w] = from[w];
        }
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
          const int at = k + n * ENTRIES_AT_ONCE + lane / LANES;
          const u32 entry = of_lane(mine, at < 32 ? at : 31);
          const float value = at < left ? value_of(entry) : 0.0f;
#pragma unroll
          for (int w = 0; w < WORDS; ++w) {
            sums[w][0] += value * widened(u16(words[n][w]));
            sums[w][1] += value * widened(u16(words[n][w] >> 16));
          }
        }
      }
    }
    mine = coming;
    float* to = a.extra + (i64(token_tile) * a.rows + row) * WIDTH + lane % LANES * (2 * WORDS);
#pragma unroll
    for (int w = 0; w < WORDS; ++w)
#pragma unroll
      for (int f = 0; f < 2; ++f) {
#pragma unroll
        for (int distance = 16; distance >= LANES; distance /= 2)
          sums[w][f] += as_float(of_lane(bits_of(sums[w][f]), lane ^ distance));
        if (lane < LANES) to[2 * w + f] = sums[w][f];
      }
  }
}
#endif

template <bool VALUE> struct Constant { static constexpr bool value = VALUE; };
typedef u32 Operands[TILES][CHUNK][4];

device void unpack(
    Operands& weights, const Codes& codes, int chunk, int step, Tables (&tables)[TILES], const Arguments& a, int lane,
    int first_tile) {
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    if (GROUP != 0 && chunk * CHUNK % PART == 0)
      load(tables[r], a, tile_of(a, first_tile + 4 * r), group_of(a, step, chunk * CHUNK / PART), lane / 4);
#pragma unroll
    for (int b = 0; b < CHUNK; ++b) {
      operands(weights[r][b], codes.at[r], chunk * CHUNK + b, 4 * lane, tables[r]);
#pragma unroll
      for (int i = 0; i < 4; ++i) settle(weights[r][b][i]);
    }
  }
}

extern "C" global __launch_bounds__(THREADS, TOGETHER) in_clusters_of(CLUSTER, SPLIT)
void rarefy_gemm(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.z * WIDTH;
  const Share share = share_of(a);
  const int begin = share.begin, rounds = share.end > begin ? share.end - begin : 0;
  u8* stages = pool + TABLE_BYTES;
  u64* full = reinterpret_cast<u64*>(stages + STAGES * STAGE);
  u64* empty = full + STAGES;
  const u32 rank = CLUSTER * SPLIT > 1 ? rank_in_cluster() : 0;  // those over rows are neighbours

  if (threadIdx.x == 0) {
    for (int n = 0; n < STAGES; ++n) {
      prepare_barrier(full + n, 1);
      prepare_barrier(empty + n, CLUSTER * ACROSS);
    }
    barriers_are_prepared();
  }
  if constexpr (TABLE == SHARED) copy_table(a);
  if constexpr (CLUSTER > 1) cluster_barrier();
  else block_barrier();

  if (warp >= ACROSS) {
    give_registers_back<ACROSS>();
    if (threadIdx.x == 32 * ACROSS) {
      start_later_kernels();
      wait_for_earlier_kernels();
      bring(a, stages, full, empty, begin, rounds, rank);
    }
#if OUTLIERS
    if (warp > ACROSS && blockIdx.y == 0) {
      start_later_kernels();
      wait_for_earlier_kernels();
      add_outliers(a, first_row, blockIdx.z, warp - ACROSS - 1, lane);
    }
    block_barrier();
#endif
    return;
  }
  take_registers<ACROSS>();
  float sums[TILES][TOKENS][4] = {};
  // A warp's tiles are four apart: four warps multiply 64 rows together.
  const int own_tile = warp / 4 * 4 * TILES + warp % 4, first_tile = blockIdx.x * (ROWS / 16) + own_tile;
  if (rounds > 0) {
    const Places places = places_of(a, first_tile, lane, 4);
    Codes codes[DEPTH];
    Scales scales[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
      if (d < rounds) {
        fetch(codes[d], a, places, begin + d, lane);
        fetch(scales[d], a, places, begin + d, lane);
      }
    Tables tables[TILES];
    load_tables(tables, a, first_tile, g, 4);
    float units[TILES][2];
    Operands weights[2];
    float part[TILES][DIRECT ? 1 : TOKENS][4];
    // After its products: what a group adds is scaled, and a step's tokens are left to the next.
    const auto finish = [&](int d, int c, int round) {
      if constexpr (!DIRECT) {
        const int p = c / IN_PART;
        const float* ones = reinterpret_cast<const float*>(stages + round % STAGES * STAGE + STAGE_TOKENS);
#pragma unroll
        for (int r = 0; r < (c % IN_PART == IN_PART - 1 ? TILES : 0); ++r)
#pragma unroll
          for (int n = 0; n < TOKENS; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              settle(part[r][n][j]);
              const float own = SUMS ? ones[p * WIDTH + 8 * n + 2 * t + j % 2] : 0.0f;
              sums[r][n][j] += contribution(scales[d].scale[r][p], scales[d].zero[r][p], j / 2, part[r][n][j], own);
            }
      }
      if (c < CHUNKS - 1) return;
      warp_barrier();
      if (lane < CLUSTER) {
        if constexpr (CLUSTER > 1) arrive_at(empty + round % STAGES, rank / CLUSTER * CLUSTER + lane);
        else arrive_at(empty + round % STAGES);
      }
      if constexpr (DIRECT && GROUP == 0) return;
      if (round + DEPTH < rounds) fetch(scales[d], a, places, begin + round + DEPTH, lane);
    };
    // Codes whose last chunk has been unpacked make room for those that come `DEPTH` steps later.
    const auto unpack_chunk = [&](int d, int c, int round) {
      unpack(weights[(d * CHUNKS + c) % 2], codes[d], c, begin + round, tables, a, lane, first_tile);
      if (c == CHUNKS - 1 && round + DEPTH < rounds) fetch(codes[d], a, places, begin + round + DEPTH, lane);
    };
    const auto issue = [&](int d, int c, int round) {
      const int p = c / IN_PART;
      const bool begins = c % IN_PART == 0;
      if (c == 0) wait_for(full + round % STAGES, round / STAGES & 1);
      if constexpr (RESCALED && GROUP != 0) {
#pragma unroll
        for (int r = 0; r < (begins ? TILES : 0); ++r)
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            float unit = number(scales[d].scale[r][p], which);
            unit = unit == 0.0f ? 1e-18f : unit;
            const float factor = round + c == 0 ? 1.0f : quotient(units[r][which], unit);
            units[r][which] = unit;
#pragma unroll
            for (int n = 0; n < TOKENS; ++n) sums[r][n][2 * which] *= factor, sums[r][n][2 * which + 1] *= factor;
          }
      }
      if constexpr (DIRECT) {
#pragma unroll
        for (int r = 0; r < (begins && DRAINS ? TILES : 0); ++r)
#pragma unroll
          for (int n = 0; n < TOKENS; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) settle(sums[r][n][j]);
      }
      if constexpr (IN_TURNS) {
        if (begins) take_turn(warp / 4);
      }
      auto& products = reinterpret_cast<float(&)[TILES][TOKENS][4]>(
          *(DIRECT ? &sums[0][0][0] : &part[0][0][0]));
      const u64 first_tokens = tokens_at(stages + round % STAGES * STAGE, LEADING);
      begin_products();
#pragma unroll
      for (int b = 0; b < CHUNK; ++b) {
        const u64 tokens = first_tokens + (c * CHUNK + b) * (2 * LEADING / 16);
#pragma unroll
        for (int r = 0; r < TILES; ++r)
          multiply_wide<TOKENS>(products[r], weights[(d * CHUNKS + c) % 2][r][b], tokens, DIRECT || c % IN_PART + b > 0);
      }
      commit_products();
      if constexpr (IN_TURNS) {
        if (c % IN_PART == IN_PART - 1 && (warp < 4 || c + 1 < CHUNKS || round + 1 < rounds)) pass_turn(warp / 4);
      }
    };
    if constexpr (IN_TURNS) {
      if (warp >= 4) pass_turn(1);
    }
    // Products of a chunk may run while the one before is finished, but only within steps that no branch interrupts: the
    // compiler would not believe otherwise that they do not touch the same registers.
    const auto multiply_steps = [&](auto unbroken, int base) {
      constexpr bool OVERLAPS = decltype(unbroken)::value;
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int round = base + d;
        if (!OVERLAPS && round >= rounds) break;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
          const bool ends = OVERLAPS ? d + 1 == DEPTH && c + 1 == CHUNKS : (c + 1) % IN_PART == 0;
          issue(d, c, round);
          wait_for_products<1>();
          if (OVERLAPS && d + c > 0) finish(c > 0 ? d : d - 1, c > 0 ? c - 1 : CHUNKS - 1, round - (c == 0));
          if (c + 1 < CHUNKS) unpack_chunk(d, c + 1, round);
          else if (round + 1 < rounds) unpack_chunk((d + 1) % DEPTH, 0, round + 1);
          if (ends) {
            wait_for_products<0>();
            finish(d, c, round);
          }
        }
      }
    };
    unpack_chunk(0, 0, 0);
    for (int base = 0; base < rounds; base += DEPTH) {
      if (!DRAINS && base + DEPTH <= rounds) multiply_steps(Constant<!DRAINS>(), base);
      else multiply_steps(Constant<false>(), base);
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int n = 0; n < (DIRECT ? TOKENS : 0); ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) settle(sums[r][n][j]);
    if constexpr (DIRECT) {
#pragma unroll
      for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const float unit = RESCALED && GROUP != 0 ? units[r][which] : number(scales[0].scale[r][0], which);
#pragma unroll
          for (int n = 0; n < TOKENS; ++n) sums[r][n][2 * which] *= unit, sums[r][n][2 * which + 1] *= unit;
        }
    }
  }

  // Nothing is on its way to this block any more, and nobody has to arrive here.
  block_barrier();
  if constexpr (CLUSTER > 1) cluster_barrier();
#if OUTLIERS
  if (blockIdx.y == 0) {
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const int row = first_row + (own_tile + 4 * r) * 16 + g + 8 * which;
          if (row >= a.rows) continue;
          const float* more = a.extra + (i64(blockIdx.z) * a.rows + row) * WIDTH + 8 * n + 2 * t;
          sums[r][n][2 * which] += load_fresh(more), sums[r][n][2 * which + 1] += load_fresh(more + 1);
        }
  }
#endif
  float* meeting = reinterpret_cast<float*>(stages);
  put_sums(meeting, sums, SUM_PITCH, own_tile * 16, 4, lane);
  if constexpr (SPLIT > 1) cluster_barrier();
  else block_barrier();
  constexpr int OWN = WIDTH * ROWS / SPLIT;  // numbers that a block adds up, a thread four of one token
#pragma unroll 4
  for (int n = 4 * threadIdx.x; n < OWN; n += 4 * 32 * ACROSS) {
    const int token = (blockIdx.y * OWN + n) / ROWS, row = (blockIdx.y * OWN + n) % ROWS;
    const uint4* at = reinterpret_cast<const uint4*>(meeting + token * SUM_PITCH + row);
    float own[4] = {};
#pragma unroll
    for (int k = 0; k < SPLIT; ++k) {
      const uint4 four = SPLIT > 1 ? load_of_block(at, k * CLUSTER + rank % CLUSTER) : *at;
      own[0] += as_float(four.x), own[1] += as_float(four.y), own[2] += as_float(four.z), own[3] += as_float(four.w);
    }
    if (first_token + token >= a.tokens || first_row + row >= a.rows) continue;
    u16* to = a.y + i64(first_token + token) * a.rows + first_row + row;
    u32 results[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) results[f] = rounded<HALF>(own[f] * a.multiplier);
    if (a.rows % 4 == 0) {
      *reinterpret_cast<uint2*>(to) = {results[0] | results[1] << 16, results[2] | results[3] << 16};
    } else {
      for (int f = 0; f < 4 && first_row + row + f < a.rows; ++f) to[f] = u16(results[f]);
    }
  }
  if constexpr (SPLIT > 1) cluster_barrier();  // shared memory stays until all have read it
}

// Tokens in the order of the operands, [token tiles][steps][STEP / 8][WIDTH][8], of which the pieces 2 b and 2 b + 1 are
// what lanes take of block b; and their sums by group, [token tiles][steps][PARTS][WIDTH]. A thread takes two blocks of a
// token, neighbours those of the same group.
extern "C" global __launch_bounds__(128) void rarefy_arrange(const Arguments a) {
  constexpr int PAIRS = PART < 2 ? 1 : PART / 2, GROUPS = BLOCKS / 2 / PAIRS;
  const u32 unit = blockIdx.x * 128u + threadIdx.x;
  const int token = unit / PAIRS % WIDTH, rest = unit / PAIRS / WIDTH;
  const int pair = rest % GROUPS * PAIRS + unit % PAIRS, step = rest / GROUPS % a.steps, tile = rest / GROUPS / a.steps;
  const bool real = tile * WIDTH + token < a.tokens;
  start_later_kernels();
  wait_for_earlier_kernels();
  if (tile * WIDTH >= a.tokens) return;
  const u16* x = a.x + (real ? i64(tile * WIDTH + token) * a.stride : 0);
  uint4* to = reinterpret_cast<uint4*>(a.arranged) + ((i64(tile) * a.steps + step) * (STEP / 8)) * WIDTH + token;
  u32 words[16];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = step * STEP + (SPAN == 4 ? 32 * pair + 8 * i : first_of(pair, i));
    const bool there = real && (!RAGGED || column < a.columns);
    const uint4 all = load_shared_by_all(reinterpret_cast<const uint4*>(x + (there ? column : 0)), there);
    words[4 * i] = all.x, words[4 * i + 1] = all.y, words[4 * i + 2] = all.z, words[4 * i + 3] = all.w;
  }
  float sums[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e)
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      u32 own[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        own[t] = words[SPAN == 4 ? 8 * e + 2 * t + q : 4 * t + 2 * e + q];
        if constexpr (SUMS) sums[e] += widened(u16(own[t])) + widened(u16(own[t] >> 16));
#if OUTLIERS
        const int column = step * STEP + (SPAN == 4 ? 32 * pair + 16 * e + 4 * t : first_of(pair, t) + 4 * e) + 2 * q;
        u16* turned = a.turned + (i64(tile) * a.steps * STEP + column) * WIDTH + token;
        turned[0] = u16(own[t]), turned[WIDTH] = u16(own[t] >> 16);
#endif
      }
      to[(4 * pair + 2 * e + q) * WIDTH] = {own[0], own[1], own[2], own[3]};
    }
  if constexpr (SUMS) {
    float* ones = a.ones + (i64(tile) * a.steps + step) * (PARTS * WIDTH) + token;
    if constexpr (PART < 2) {
      ones[2 * pair * WIDTH] = sums[0], ones[(2 * pair + 1) * WIDTH] = sums[1];
    } else {
      const float sum = sum_of_lanes<PAIRS>(sums[0] + sums[1]);
      if (unit % PAIRS == 0) ones[pair / PAIRS * WIDTH] = sum;
    }
  }
}
