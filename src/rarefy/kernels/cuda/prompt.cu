// Y[token][row] = sum over columns of X[token][column] * W[row][column], W in code, for prompts (wgmma; compute
// capability 9.0).
//
// Tensor cores find both operands in shared memory. Warps that do nothing else write weights there, in the type of the
// activations: a code's number times its scale, rounded once, as `rarefy_dequantize` would write it to memory. Tokens come
// by tensor maps. Two fours of warps multiply 64 rows each. A block takes one tile of rows and tokens after another; those
// that unpack are already at the next when results are written.
//
// Macros besides those of codes.cuh: TOKENS (of 8), STAGES (of 64 columns in shared memory), DEPTH (steps of codes on their
// way there), UNPACKERS (fours of warps that unpack, of TILES tiles each), SPLIT (blocks over columns, which add up what
// they have in each other's shared memory).

constexpr int MULTIPLIERS = 2, THREADS = 128 * (MULTIPLIERS + UNPACKERS);
#define SHARED_ALIGNMENT 1024

#include "codes.cuh"
#ifndef RAREFY_EMULATED
#include "wgmma.cuh"
#endif

static_assert(TILES * 4 * UNPACKERS == 8 && STAGES > 2, "all rows of a block, and stages to come");
constexpr int WIDTH = 8 * TOKENS, ROWS = 64 * MULTIPLIERS;
constexpr int LINE = 128, COLUMNS = LINE / 2;  // bytes and numbers of a row or token in a stage
constexpr int STAGE_WEIGHTS = ROWS * LINE, STAGE = STAGE_WEIGHTS + WIDTH * LINE;
constexpr int IN_STEP = STEP / COLUMNS;  // stages
constexpr int TABLE_ROOM = (TABLE_BYTES + 1023) / 1024 * 1024;  // what is swizzled begins at whole kilobytes
constexpr int AT_ONCE = WIDTH < 32 ? WIDTH : 32, PITCH = 2 * 64 + 16;  // tokens that are written at once, a row's bytes
constexpr int SUM_PITCH = ROWS + 4, MEETING = 4 * WIDTH * SUM_PITCH;     // of blocks that share columns
constexpr int STAGES_ROOM = SPLIT > 1 && MEETING > STAGES * STAGE ? MEETING : STAGES * STAGE;
constexpr int RESULTS_ROOM = SPLIT > 1 ? 0 : MULTIPLIERS * AT_ONCE * PITCH;

// The tensor map of the tokens, [tokens][columns] in boxes of WIDTH tokens and a line's columns.
struct alignas(128) Map { u64 words[16]; };
struct Prompt {
  Arguments a;
  Map tokens;
};

struct Tile { int row_tile, first_row, first_token; };  // a row tile: 16 rows

// Tiles of rows lie beside each other, so that blocks that run together read the same tokens.
struct Tiles {
  int across, count;
  Tiles(const Arguments& a) {
    across = (a.rows + ROWS - 1) / ROWS;
    count = across * ((a.tokens + WIDTH - 1) / WIDTH);
  }
  Tile at(int number) const {
    const int row = number % across;
    return {row * (ROWS / 16), row * ROWS, number / across * WIDTH};
  }
};

// Stages of a block's steps; columns that only fill up the last step have none.
device int stages_of(const Arguments& a, const Share& share) {
  const int all = (a.columns + COLUMNS - 1) / COLUMNS, end = share.end * IN_STEP < all ? share.end * IN_STEP : all;
  return end > share.begin * IN_STEP ? end - share.begin * IN_STEP : 0;
}

// Which of some places comes next, and how often it has been used, but for even numbers.
template <int COUNT> struct Turn {
  int stage = 0;
  u32 phase = 0;
  void pass() {
    if (++stage == COUNT) stage = 0, phase ^= 1;
  }
};

struct Stages {
  u8* first;
  u32 at, full_at, empty_at;  // addresses in shared memory
  u32 weights(int stage) const { return at + stage * STAGE; }
  u32 tokens(int stage) const { return at + stage * STAGE + STAGE_WEIGHTS; }
  u32 full(int stage) const { return full_at + 8 * stage; }
  u32 empty(int stage) const { return empty_at + 8 * stage; }
};

// ---- Codes, which come to shared memory some steps ahead, with scales and zeros: of loads into registers all would be
// waited for where the first is wanted. A lane has a place for each 16 bytes that it calls for. Of the groups of its rows
// it calls for those whose number is its own, of four lanes.

template <int TYPE> constexpr int WORDS_OF_PAIR =
    TYPE == NONE ? 0 : TYPE == F32 || TYPE == PAIRS ? 2 : TYPE == BILEVEL || TYPE == LEVEL ? 3 : 1;
constexpr int WORDS = WORDS_OF_PAIR<SCALE> + WORDS_OF_PAIR<ZERO>, PAIR_WORDS = (PARTS + 3) / 4 * WORDS;
constexpr int STEP_ROOM = TILES * (LOADS * 512 + PAIR_WORDS * 128);  // of a warp

template <int TYPE> device void call(u8* to, const void* base, i64 index, const uint2* second) {
  const u32* words = static_cast<const u32*>(base);
  if constexpr (TYPE == F32 || TYPE == PAIRS) copy_word_async(to, words + 2 * index, true), copy_word_async(to + 128, words + 2 * index + 1, true);
  else if constexpr (TYPE == F16 || TYPE == BF16) copy_word_async(to, words + index, true);
  else if constexpr (TYPE != NONE) copy_word_async(to, words + index / 2, true);
  if constexpr (TYPE == BILEVEL || TYPE == LEVEL) {
    copy_word_async(to + 128, &second->x, true);
    copy_word_async(to + 256, &second->y, true);
  }
}
template <int TYPE> device void take(Pair<TYPE>& pair, const u8* from, int g) {
  const auto word = [&](int n) { return *reinterpret_cast<const u32*>(from + 128 * n); };
  if constexpr (TYPE == F32 || TYPE == PAIRS) pair.raw = {word(0), word(1)};
  else if constexpr (TYPE == F16 || TYPE == BF16) pair.raw = word(0);
  else if constexpr (TYPE != NONE) pair.raw = u16(word(0) >> 16 * (g % 2));
  if constexpr (TYPE == BILEVEL || TYPE == LEVEL) pair.second = {word(1), word(2)};
}

// `own`: of a warp and a step. What it reads of codes is then behind it.
device void call_step(u8* own, const Arguments& a, Places& places, int step, int place, int lane) {
  u8* quads = own + 16 * lane;
  u8* pairs = own + TILES * LOADS * 512 + 4 * lane;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
#pragma unroll
    for (int l = 0; l < LOADS; ++l)
      copy_async(quads + (r * LOADS + l) * 512, places.codes[r][SPAN == 16 ? l % 2 : 0] + load_at(l), has_bytes(a, step, l, place));
#pragma unroll
    for (int which = 0; which < (SPAN == 16 ? 2 : 1); ++which) places.codes[r][which] = of_step(places.codes[r][which], 1);
#pragma unroll
    for (int p = 0; p < PARTS; p += 4) {
      if (p + lane % 4 >= PARTS) continue;
      const int group = group_of(a, step, p + lane % 4);
      const i64 index = places.scales[r] + i64(group) * 8;
      u8* to = pairs + (r * PAIR_WORDS + p / 4 * WORDS) * 128;
      call<SCALE>(to, a.scale, index, places.second[r] + group / SECOND_GROUPS);
      call<ZERO>(to + WORDS_OF_PAIR<SCALE> * 128, a.zero, index, nullptr);
    }
  }
}
device void take_step(Codes& codes, Scales& scales, const u8* own, int place, int lane) {
  const u8* quads = own + 16 * lane;
  const u8* pairs = own + TILES * LOADS * 512 + 4 * (lane / 4 * 4);
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
#pragma unroll
    for (int l = 0; l < LOADS; ++l) put(codes, r, l, *reinterpret_cast<const uint4*>(quads + (r * LOADS + l) * 512));
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      const u8* from = pairs + (r * PAIR_WORDS + p / 4 * WORDS) * 128 + p % 4 * 4;
      take(scales.scale[r][p], from, place / 4);
      take(scales.zero[r][p], from + WORDS_OF_PAIR<SCALE> * 128, place / 4);
    }
  }
}

// A lane's rows of a tile and its columns of a pair of blocks: other than lanes' order says, so that lanes which write
// together meet different banks, whatever the swizzle.
device int place_of_lane(int lane) {
  if constexpr (SPAN == 16) return lane;
  const int g = lane / 4;
  return 4 * (g % 2 * 4 + g / 2 % 2 * 2 + g / 4) + lane % 4;
}

// What a lane has of a stage: of its tiles, pairs of blocks and rows eight numbers.
struct Numbers { u32 at[TILES][2][2][4]; };

device void store(u32 to, const Numbers& numbers, int first_tile, int part, int place) {
  const int g = place / 4, t = place % 4;
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const u32 line = to + (16 * (first_tile + r) + g + 8 * which) * LINE;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const auto& own = numbers.at[r][n][which];
        if constexpr (SPAN == 4) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            store(line + ((2 * (2 * n + e) + t / 2 ^ g) << 4 | t % 2 << 3), uint2{own[2 * e], own[2 * e + 1]});
        } else {
          store(line + ((first_of(2 * part + n, t) % COLUMNS / 8 ^ g) << 4), uint4{own[0], own[1], own[2], own[3]});
        }
      }
    }
}

// From a row's codes to its weights, two at once. A scale is the sum of two bfloat16, and a code times the lesser is no
// longer than one or nearly so: the sum of both products is rounded once, without detours by float32. Where that cannot be
// (`!QUICK`) weights are formed as in `rarefy_dequantize`.
constexpr bool QUICK = (SCALE == F16 || (SCALE == BF16 && !HALF)) && (ZERO == NONE || ZERO == U8);

struct Weigher {
  u32 scale, rest, zero;  // pairs
  static u32 twice(float value) { return HALF ? half_pair(value, value) : bf16_pair(value, value); }
  template <class S, class Z> void prepare(const S& own_scale, const Z& own_zero, int which) {
    if constexpr (QUICK) {
      const float all = number(own_scale, which);
      scale = twice(all);
      if constexpr (SCALE == F16 && !HALF) rest = twice(all - widened(u16(scale)));
      if constexpr (ZERO == U8) zero = twice(CENTER - number(own_zero, which));
    }
  }
  template <class S, class Z> u32 weights(u32 codes, const S& own_scale, const Z& own_zero, int which) const {
    if constexpr (SCALE == NONE && ZERO == NONE) {
      return codes;
    } else if constexpr (QUICK) {
      if constexpr (ZERO == U8) codes = fused(codes, ONES, zero);
      return fused(codes, scale, SCALE == F16 && !HALF ? fused(codes, rest, 0) : 0);
    } else {
      const float low = contribution(own_scale, own_zero, which, widened(u16(codes)), 1.0f);
      const float high = contribution(own_scale, own_zero, which, widened(u16(codes >> 16)), 1.0f);
      return HALF ? half_pair(low, high) : bf16_pair(low, high);
    }
  }
};

// Stage `part` of a step: 64 columns of a warp's rows.
device void unpack(
    Numbers& numbers, const Codes& codes, const Scales& scales, Tables (&tables)[TILES], const Arguments& a, int first_tile,
    int step, int part, int g, int lane) {
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    Weigher weighers[2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int b = 4 * part + n;
      if (b % PART == 0 || n == 0) {
#pragma unroll
        for (int which = 0; which < 2; ++which)
          weighers[which].prepare(scales.scale[r][b / PART], scales.zero[r][b / PART], which);
      }
      if (GROUP != 0 && b % PART == 0) load(tables[r], a, tile_of(a, first_tile + r), group_of(a, step, b / PART), g);
      u32 weights[4];
      operands(weights, codes.at[r], b, 4 * lane, tables[r]);
#pragma unroll
      for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int q = 0; q < 2; ++q)
          numbers.at[r][n / 2][which][n % 2 * 2 + q] =
              weighers[which].weights(weights[2 * q + which], scales.scale[r][b / PART], scales.zero[r][b / PART], which);
    }
  }
}
device void fill(const Arguments& a, const Stages& stages, u8* coming, int warp, int lane) {
  const int place = place_of_lane(lane), own_tile = warp * TILES;
  const Tiles tiles(a);
  const Share share = share_of(a);
  const int count = stages_of(a, share), rounds = (count + IN_STEP - 1) / IN_STEP;
  Turn<STAGES> turn;
  turn.phase = 1;  // nobody has used a stage before
  Turn<DEPTH> arrival;
  // The step that is called for next.
  int called = rounds > 0 ? blockIdx.x : tiles.count, called_round = 0;
  const auto places_at = [&](int number) {
    Places found = places_of(a, tiles.at(number).row_tile + own_tile, place);
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int which = 0; which < (SPAN == 16 ? 2 : 1); ++which) found.codes[r][which] = of_step(found.codes[r][which], share.begin);
    return found;
  };
  Places called_places = places_at(blockIdx.x);
  const auto call_next = [&](int slot) {
    if (called < tiles.count) {
      call_step(coming + slot * STEP_ROOM, a, called_places, share.begin + called_round, place, lane);
      if (++called_round == rounds) {
        called_round = 0, called += gridDim.x;
        called_places = places_at(called);
      }
    }
    commit_copies();
  };
  for (int slot = 0; slot < DEPTH; ++slot) call_next(slot);
  for (int number = blockIdx.x; number < tiles.count; number += gridDim.x) {
    const Tile tile = tiles.at(number);
    Tables tables[TILES];
    load_tables(tables, a, tile.row_tile + own_tile, place / 4);
    for (int round = 0; round < rounds; ++round) {
      const int step = share.begin + round;
      Codes codes;
      Scales scales;
      wait_for_copies<DEPTH - 1>();
      warp_barrier();
      take_step(codes, scales, coming + arrival.stage * STEP_ROOM, place, lane);
      warp_barrier();
      call_next(arrival.stage);
      arrival.pass();
#pragma unroll
      for (int part = 0; part < IN_STEP; ++part) {
        if (round * IN_STEP + part >= count) break;
        // Whether there is room turns out while numbers are formed.
        const bool room = is_over(stages.empty(turn.stage), turn.phase);
        Numbers numbers;
        unpack(numbers, codes, scales, tables, a, tile.row_tile + own_tile, step, part, place / 4, lane);
        if (!room) wait_for(stages.empty(turn.stage), turn.phase);
        store(stages.weights(turn.stage), numbers, own_tile, part, place);
        warp_barrier();
        if (lane == 0) arrive_at(stages.full(turn.stage));
        turn.pass();
      }
    }
  }
}

// ---- Those that multiply. One thread of them brings tokens, as many stages ahead as there are, less two, whose products
// may still run.

struct Tokens {
  const Prompt& given;
  const Tiles& tiles;
  const Stages& stages;
  int count, number, part, first_part;
  Tile tile;
  Turn<STAGES> turn;

  Tokens(const Prompt& given, const Tiles& tiles, const Stages& stages, const Share& share, int count)
      : given(given), tiles(tiles), stages(stages), count(count), number(count > 0 ? blockIdx.x : tiles.count), part(0),
        first_part(share.begin * IN_STEP), tile(tiles.at(blockIdx.x)) {
    turn.phase = 1;  // nobody has used a stage before
  }
  void bring() {
    if (number >= tiles.count) return;
    wait_for(stages.empty(turn.stage), turn.phase);
    expect(stages.full(turn.stage), WIDTH * LINE);
    const int column = (first_part + part) * COLUMNS;
    copy_box(stages.tokens(turn.stage), &given.tokens, column, tile.first_token, stages.full(turn.stage));
    turn.pass();
    if (++part < count) return;
    part = 0, number += gridDim.x, tile = tiles.at(number);
  }
};

device void multiply_tile(
    float (&sums)[TOKENS][4], const Stages& stages, Turn<STAGES>& turn, Tokens& tokens_to_come, int& done, int count, int four,
    int lane) {
  const auto leave = [&](int stage) {
    warp_barrier();
    if (lane == 0) arrive_at(stages.empty(stage));
  };
  int before = 0;
  for (int n = 0; n < count; ++n) {
    wait_for(stages.full(turn.stage), turn.phase);
    // Here and not where weights are written: it waits for all that a thread has on its way, and those have codes.
    show_to_products();
    const u64 weights = lines_at(stages.weights(turn.stage) + four * 64 * LINE), tokens = lines_at(stages.tokens(turn.stage));
    begin_products();
#pragma unroll
    for (int k = 0; k < LINE / 32; ++k) multiply_lines(sums, weights + 2 * k, tokens + 2 * k, n + k > 0);
    commit_products();
    if (threadIdx.x == 0 && ++done > 2) tokens_to_come.bring();
    wait_for_products<1>();
    if (n > 0) leave(before);
    before = turn.stage;
    turn.pass();
  }
  wait_for_products<0>();
  if (count > 0) leave(before);
#pragma unroll
  for (int n = 0; n < TOKENS; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) settle(sums[n][j]);
}

device u32 results_of(float low, float high) { return HALF ? half_pair(low, high) : bf16_pair(low, high); }

// Results of a four of warps, 64 rows, some tokens after others; `own` is shared memory.
device void put_results(
    const Arguments& a, const float (&sums)[TOKENS][4], u8* own, const Tile& tile, int four, int lane) {
  const int warp = threadIdx.x / 32 % 4, first_row = tile.first_row + 64 * four;
#pragma unroll
  for (int piece = 0; piece < WIDTH / AT_ONCE; ++piece) {
    if (tile.first_token + piece * AT_ONCE >= a.tokens) break;
    barrier_of_four(four);  // those before have been read
#pragma unroll
    for (int n = 0; n < AT_ONCE / 8; n += 2) {
      u32 words[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* pair = sums[piece * (AT_ONCE / 8) + n + m / 2] + m % 2 * 2;
        words[m] = results_of(pair[0] * a.multiplier, pair[1] * a.multiplier);
      }
      put_transposed(own + (8 * n + lane / 16 * 8 + lane % 8) * PITCH + 2 * (16 * warp + lane / 8 % 2 * 8), words);
    }
    barrier_of_four(four);
#pragma unroll
    for (int n = 0; n < AT_ONCE * 8 / 128; ++n) {
      const int at = n * 128 + threadIdx.x % 128, row = first_row + at % 8 * 8, token = tile.first_token + piece * AT_ONCE + at / 8;
      if (token >= a.tokens || row >= a.rows) continue;
      const u8* from = own + at / 8 * PITCH + at % 8 * 16;
      u16* to = a.y + i64(token) * a.rows + row;
      if (a.rows % 8 == 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else for (int f = 0; f < 8 && row + f < a.rows; ++f) to[f] = reinterpret_cast<const u16*>(from)[f];
    }
  }
}

// The same where blocks share columns: each adds up a share of the tokens.
device void add_up(
    const Arguments& a, const float (&sums)[TOKENS][4], u8* shared, const Tile& tile, int four, int lane) {
  float* meeting = reinterpret_cast<float*>(shared);
  const int own_row = 64 * four + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < TOKENS; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) meeting[(8 * n + lane % 4 * 2 + j % 2) * SUM_PITCH + own_row + j / 2 * 8] = sums[n][j];
  cluster_barrier();
  constexpr int OWN = WIDTH * ROWS / SPLIT;  // numbers
#pragma unroll 4
  for (int n = 4 * threadIdx.x; n < OWN; n += 4 * 128 * MULTIPLIERS) {
    const int token = (blockIdx.y * OWN + n) / ROWS, row = tile.first_row + n % ROWS;
    if (tile.first_token + token >= a.tokens || row >= a.rows) continue;
    const uint4* at = reinterpret_cast<const uint4*>(meeting + token * SUM_PITCH + n % ROWS);
    float own[4] = {};
#pragma unroll
    for (int k = 0; k < SPLIT; ++k) {
      const uint4 more = load_of_block(at, k);
      own[0] += as_float(more.x), own[1] += as_float(more.y), own[2] += as_float(more.z), own[3] += as_float(more.w);
    }
    u16* to = a.y + i64(tile.first_token + token) * a.rows + row;
    u32 results[2];
#pragma unroll
    for (int f = 0; f < 2; ++f) results[f] = results_of(own[2 * f] * a.multiplier, own[2 * f + 1] * a.multiplier);
    if (a.rows % 4 == 0) *reinterpret_cast<uint2*>(to) = {results[0], results[1]};
    else for (int f = 0; f < 4 && row + f < a.rows; ++f) to[f] = u16(results[f / 2] >> 16 * (f % 2));
  }
}

extern "C" global __launch_bounds__(THREADS, 1) in_clusters_of(1, SPLIT)
void rarefy_prompt(const __grid_constant__ Prompt given) {
  const Arguments& a = given.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u8 *first = pool + TABLE_ROOM, *results = first + STAGES_ROOM, *coming = results + RESULTS_ROOM;
  u64 *full = reinterpret_cast<u64*>(coming + 4 * UNPACKERS * DEPTH * STEP_ROOM), *empty = full + STAGES;
  const Stages stages = {first, kept_address(first), kept_address(full), kept_address(empty)};

  if (threadIdx.x == 0) {
    for (int n = 0; n < STAGES; ++n) {
      prepare_barrier(full + n, 4 * UNPACKERS + 1);
      prepare_barrier(empty + n, 4 * MULTIPLIERS);
    }
    barriers_are_prepared();
  }
  if constexpr (TABLE == SHARED) copy_table(a);
  block_barrier();

  if (warp >= 4 * MULTIPLIERS) {
    const int own = warp - 4 * MULTIPLIERS;
    fill(a, stages, coming + own * DEPTH * STEP_ROOM, own, lane);
    return;
  }
  const int four = warp / 4, count = stages_of(a, share_of(a));
  const Tiles tiles(a);
  Turn<STAGES> turn;
  int done = 0;  // stages
  Tokens tokens(given, tiles, stages, share_of(a), count);
  if (threadIdx.x == 0) {
    start_later_kernels();
    wait_for_earlier_kernels();
    for (int n = 0; n < STAGES; ++n) tokens.bring();
  }
  for (int number = blockIdx.x; number < tiles.count; number += gridDim.x) {
    const Tile tile = tiles.at(number);
    float sums[TOKENS][4];
    if (SPLIT > 1 && count == 0) {
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    }
    multiply_tile(sums, stages, turn, tokens, done, count, four, lane);
    if constexpr (SPLIT == 1) {
      put_results(a, sums, results + four * AT_ONCE * PITCH, tile, four, lane);
    } else {
      barrier_of_both();  // nobody multiplies any more
      add_up(a, sums, first, tile, four, lane);
    }
  }
  if constexpr (SPLIT > 1) cluster_barrier();  // shared memory stays until all have read it
}
