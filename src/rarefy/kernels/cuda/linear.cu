// Y[token][row] = sum over columns of X[token][column] * W[row][column], W in code, on tensor cores (mma.m16n8k16).
//
// Weights are the 16-row side of the product, so that a token costs an eighth of a tile and codes become operands in
// the registers they were loaded into: layout.py stores them in the order in which a warp's lanes want them. A code is
// turned into a small whole number by putting it into the mantissa of a power of two and subtracting; scales and zeros
// enter afterwards, on float32 sums over a group, so no weight is ever rounded to 16 bits.
//
// Macros besides those of codes.cuh (see tuning.py for what is chosen when): OUTLIERS (type of single values that are
// added to the weight), TOKENS (of 8 tokens), ACROSS (warps over rows), ALONG (warps over columns), DEPTH (steps loaded
// ahead into registers), STAGED (codes and activations go through shared memory instead, STAGES steps of them), SPLIT
// (blocks over columns), LATE (later kernels may start when the sums are formed, not before), and those of ending.cuh.

constexpr int THREADS = 32 * ACROSS * ALONG;

#include "codes.cuh"

constexpr int ROWS = 16 * TILES * ACROSS, COLUMNS = STEP * ALONG, WIDTH = 8 * TOKENS;
constexpr int PITCH = 2 * COLUMNS + (SPAN == 16 ? 16 : 64);  // bytes of a staged token; the rest keeps banks apart
constexpr int STAGE_TOKENS = WIDTH * PITCH;  // bytes
constexpr int EXTRA = SPREAD ? 1 : WIDTH;    // tokens that are any
constexpr int STAGE_CODES = STAGED ? ROWS / 16 * ALONG * LOADS * 512 : 0;  // bytes
constexpr int SUM_PITCH = ROWS + 4;
constexpr bool LIFT = TABLE == NONE && BITS <= 4 && (SPREAD || (BITS == 1 && SUMS));

#include "ending.cuh"

// ---- Activations: four words of one token for two blocks.

struct Words { u32 at[4]; };

device Words columns_of(const u8* token, int pair, int t) {
  Words found;
  if constexpr (SPAN != 4) {
    const uint4 all = *reinterpret_cast<const uint4*>(token + 2 * first_of(pair, t));
    found.at[0] = all.x, found.at[1] = all.y, found.at[2] = all.z, found.at[3] = all.w;
  } else {
    const uint2 first = *reinterpret_cast<const uint2*>(token + 64 * pair + 8 * t);
    const uint2 second = *reinterpret_cast<const uint2*>(token + 64 * pair + 32 + 8 * t);
    found.at[0] = first.x, found.at[1] = first.y, found.at[2] = second.x, found.at[3] = second.y;
  }
  return found;
}

struct Activations { Words at[TOKENS][BLOCKS / 2]; };

device void fetch(Activations& x, const Arguments& a, const u8* const (&tokens)[TOKENS], int step, int t) {
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
    const u8* row = tokens[n] + i64(step) * (2 * STEP);
#pragma unroll
    for (int pair = 0; pair < BLOCKS / 2; ++pair) {
      const int first = first_of(pair, 0), column = step * STEP + first_of(pair, t);
      u32* to = x.at[n][pair].at;
      if constexpr (SPAN != 4) {
        const uint4* from = reinterpret_cast<const uint4*>(row + 2 * first);
        const uint4 all = RAGGED ? load_shared_by_all(from, column < a.columns) : load_shared_by_all(from);
        to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
      } else {
        const uint2* from = reinterpret_cast<const uint2*>(row + 2 * first);
        const uint2 half = RAGGED ? load_shared_by_all(from, column < a.columns) : load_shared_by_all(from);
        const uint2 more = RAGGED ? load_shared_by_all(from + 4, column + 16 < a.columns) : load_shared_by_all(from + 4);
        to[0] = half.x, to[1] = half.y, to[2] = more.x, to[3] = more.y;
      }
    }
  }
}

// What a group adds to the sums of all tokens.
template <class S, class Z>
device void add_group(
    float (&sums)[TOKENS][4], const S& scale, const Z& zero, const float (&part)[TOKENS][4], const float (&lift)[TOKENS][4],
    const float (&ones)[TOKENS][4]) {
  if constexpr (SCALE == BILEVEL || SCALE == LEVEL) {
    const Levels levels = levels_of(scale.second);
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] += contribution_of(levels, scale.raw, j / 2, part[n][j] + lift[n][j], ones[n][j]);
  } else {
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] += contribution(scale, zero, j / 2, part[n][j] + lift[n][j], ones[n][j]);
  }
}

// Adds the product of one step to `sums`; `tokens(n, pair)` answers with the words of eight tokens.
template <class Tokens>
device void multiply_step(
    float (&sums)[TILES][TOKENS][4], const Codes& codes, const Scales& scales, const Tokens& tokens,
    Tables (&tables)[TILES], const Arguments& a, int first_tile, int step, int lane) {
  float part[TILES][TOKENS][4], ones[TOKENS][4], lift[TOKENS][4];
  Words x[TOKENS];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    if (b % 2 == 0) {
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) x[n] = tokens(n, b / 2);
    }
    if (b % PART == 0) {
#pragma unroll
      for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ones[n][j] = lift[n][j] = 0.0f;
#pragma unroll
          for (int r = 0; r < TILES; ++r) part[r][n][j] = 0.0f;
        }
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      u32 weights[4];
      if (GROUP != 0 && b % PART == 0)
        load(tables[r], a, tile_of(a, first_tile + r), group_of(a, step, b / PART), lane / 4);
      operands<LIFT>(weights, codes.at[r], b, 4 * lane, tables[r]);
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) multiply(part[r][n], weights, x[n].at[2 * (b % 2)], x[n].at[2 * (b % 2) + 1]);
    }
    if constexpr (SUMS) {
      const u32 weights[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) multiply(ones[n], weights, x[n].at[2 * (b % 2)], x[n].at[2 * (b % 2) + 1]);
    }
    if constexpr (LIFT) {
      const u32 weights[4] = {minus_lift_of(b, 0), minus_lift_of(b, 1), minus_lift_of(b, 2), minus_lift_of(b, 3)};
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) multiply(lift[n], weights, x[n].at[2 * (b % 2)], x[n].at[2 * (b % 2) + 1]);
    }
    if (b % PART == PART - 1) {
#pragma unroll
      for (int r = 0; r < TILES; ++r) add_group(sums[r], scales.scale[r][b / PART], scales.zero[r][b / PART], part[r], lift, ones);
    }
  }
}

// ---- One token: its blocks of columns take the places of eight tokens. A lane then reads an eighth of the activations
// and has sums of other groups than its neighbours, not the same ones.

#if SPREAD
static_assert(TOKENS == 1, "of one token");
constexpr int SETS = BLOCKS / 8;
constexpr int OWN_PARTS = PART >= 8 ? PARTS : PART > 1 ? SETS : 2 * SETS;  // whose scales a lane needs
device constexpr int own_part(int set, int c) { return PART >= 8 ? set * 8 / PART : PART > 1 ? set : 2 * set + c; }

struct SpreadActivations { uint2 at[SETS]; };

// Of each block of a set all lanes take part in the product, but only its own have numbers, the others zeros. These stand
// in shared memory, eight places for a lane of which it fills only its own block's: one load instead of two selections.
constexpr int PLACES_OF_WARP = 8 * 32;
constexpr int AT_PLACES = (TABLE_BYTES + FACTOR_BYTES + 4 * ALONG * WIDTH * SUM_PITCH + 15) / 16 * 16;
device uint2* places_of_lane() { return reinterpret_cast<uint2*>(pool + AT_PLACES) + threadIdx.x / 32 * PLACES_OF_WARP + threadIdx.x % 32; }
device void clear_places() {
#pragma unroll
  for (int n = 0; n < 8; ++n) places_of_lane()[32 * n] = {0, 0};
}
struct SpreadScales {
  Pair<SCALE> scale[TILES][OWN_PARTS];
  Pair<ZERO> zero[TILES][OWN_PARTS];
};

device void fetch(SpreadActivations& x, const Arguments& a, int step, int lane) {
#pragma unroll
  for (int set = 0; set < SETS; ++set) {
    const int b = 8 * set + lane / 4, t = lane % 4;
    const int column = step * STEP + (SPAN == 4 ? 16 * b + 4 * t : first_of(b / 2, t) + b % 2 * 4);
    x.at[set] = load_shared_by_all(reinterpret_cast<const uint2*>(a.x + column), !RAGGED || column < a.columns);
  }
}

device void fetch(SpreadScales& scales, const Arguments& a, const Places& places, int step, int lane) {
  const i64 first = group_of(a, step, 0) + (PART >= 8 ? 0 : 2 * (lane % 4) / PART);
#pragma unroll
  for (int own = 0; own < OWN_PARTS; ++own) {
    i64 group = first + (PART >= 8 ? own : PART > 1 ? 8 * own / PART : own / 2 * 8 + own % 2);
    if (RAGGED && group >= a.groups) group = a.groups - 1;
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      load(scales.scale[r][own], a.scale, places.scales[r] + group * 8, places.second[r], group / SECOND_GROUPS);
      load(scales.zero[r][own], a.zero, places.scales[r] + group * 8, places.second[r], group / SECOND_GROUPS);
    }
  }
}

// What a group adds to the sums of rows g and g + 8.
template <class S, class Z>
device void add_contributions(float (&sums)[4], const S& scale, const Z& zero, float part, float part_below, float ones) {
  if constexpr (SCALE == BILEVEL || SCALE == LEVEL) {
    const Levels levels = levels_of(scale.second);
    sums[0] += contribution_of(levels, scale.raw, 0, part, ones);
    sums[2] += contribution_of(levels, scale.raw, 1, part_below, ones);
  } else if constexpr (SCALE == PAIRS) {  // `part` over what has the second number
    sums[0] += half_of(scale.raw.x, 0) * (ones - part);
    sums[0] += half_of(scale.raw.x, 1) * part;
    sums[2] += half_of(scale.raw.y, 0) * (ones - part_below);
    sums[2] += half_of(scale.raw.y, 1) * part_below;
  } else {
    sums[0] += contribution(scale, zero, 0, part, ones);
    sums[2] += contribution(scale, zero, 1, part_below, ones);
  }
}

device void multiply_step(
    float (&sums)[TILES][TOKENS][4], const Codes& codes, const SpreadScales& scales, const SpreadActivations& x,
    Tables (&tables)[TILES], const Arguments& a, int first_tile, int step, int lane) {
#pragma unroll
  for (int set = 0; set < SETS; ++set) {
    places_of_lane()[32 * (lane / 4)] = x.at[set];
    float part[TILES][4], ones[4] = {}, lift[4] = {};
    const u32 constant[4] = {ONES, ONES, ONES, ONES};
    if constexpr (SUMS) multiply(ones, constant, x.at[set].x, x.at[set].y);  // of all blocks, the same for all rows
#pragma unroll
    for (int n = 0; n < (LIFT ? LIFTS : 0); ++n) {
      const u32 lifts[4] = {minus_lift_of(n, 0), minus_lift_of(n, 1), minus_lift_of(n, 2), minus_lift_of(n, 3)};
      const bool own = lane / 4 % LIFTS == n;
      multiply(lift, lifts, own ? x.at[set].x : 0, own ? x.at[set].y : 0);
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) part[r][j] = lift[j];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int b = 8 * set + n;
      const uint2 own = places_of_lane()[32 * n];
#pragma unroll
      for (int r = 0; r < TILES; ++r) {
        u32 weights[4];
        if (GROUP != 0 && b % PART == 0)
          load(tables[r], a, tile_of(a, first_tile + r), group_of(a, step, b / PART), lane / 4);
        operands<LIFT>(weights, codes.at[r], b, 4 * lane, tables[r]);
        multiply(part[r], weights, own.x, own.y);
      }
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      if constexpr (PART >= 8) {  // the lane's blocks 2 * t and 2 * t + 1 are of one group
        const int own = own_part(set, 0);
        add_contributions(
            sums[r][0], scales.scale[r][own], scales.zero[r][own], part[r][0] + part[r][1], part[r][2] + part[r][3], ones[0] + ones[1]);
      } else {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int own = own_part(set, c);
          add_contributions(sums[r][0], scales.scale[r][own], scales.zero[r][own], part[r][c], part[r][2 + c], ones[c]);
        }
      }
    }
  }
}

typedef SpreadScales StepScales;
#else
typedef Scales StepScales;
#endif

// ---- Outliers: warps along the columns share a row's quads. A lane of one token adds its own entries to its own sums,
// which meet later; of more, lanes of a row pass each other's entries on and add all of them for their own tokens.
// Entries are on their way before activations are waited for, and what these meet before the product begins.

#if OUTLIERS
#include "outliers.cuh"

constexpr int WARPS_OF_ROW = ALONG * SPLIT, AHEAD = WARPS_OF_ROW < 8 && PARTS <= 4 ? 2 : 1;  // quads of a warp on their way

struct Outliers {
  int first;  // quad of this warp
  uint2 entries[TILES][AHEAD];
  u16 met[SPREAD ? TILES : 1][AHEAD][2];
};

device void begin_outliers(Outliers& own, const Arguments& a, int first_tile, int along, int lane) {
  own.first = blockIdx.y * ALONG + along;
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      own.entries[r][k] = entries_of(a, tile_of(a, first_tile + r), own.first + k * WARPS_OF_ROW, lane);
}

#if SPREAD
// The first HELD_TOKENS activations wait in shared memory, where lanes find them a few at once, not each in a line of its own.
constexpr int MOST_HELD = 16384;
constexpr int AT_HELD = AT_PLACES + 8 * PLACES_OF_WARP * ACROSS * ALONG;
device void hold_tokens(const Arguments& a) {
  for (int n = threadIdx.x; n < HELD_TOKENS / 8 && 8 * n < a.columns; n += THREADS) copy_async(pool + AT_HELD + 16 * n, a.x + 8 * n, true);
  commit_copies();
}
device u16 activation_of(const Arguments& a, u32 entry) {
  const int column = entry & 0xFFFF;
  if (HELD_TOKENS == MOST_HELD && column >= HELD_TOKENS) return a.x[column];
  return reinterpret_cast<const u16*>(pool + AT_HELD)[column];
}

device void meet_tokens(Outliers& own, const Arguments& a) {
  wait_for_copies<0>();
  block_barrier();
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      own.met[r][k][0] = activation_of(a, own.entries[r][k].x);
      own.met[r][k][1] = activation_of(a, own.entries[r][k].y);
    }
}

device void add_entry(float& sum, const Arguments& a, u32 entry) { sum += value_of(entry) * widened(activation_of(a, entry)); }
#endif

// Both entries of a lane, by those lanes that have sums of their rows.
device void add_pair(float (&sums)[TOKENS][4], const Arguments& a, const uint2& pair, int first_token, int lane) {
#if SPREAD
  add_entry(sums[0][0], a, pair.x);
  add_entry(sums[0][2], a, pair.y);
#else
#pragma unroll
  for (int from = 0; from < 4; ++from)
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const u32 entry = of_lane(which ? pair.y : pair.x, (lane & ~3) + from);
      const float value = value_of(entry);
#pragma unroll
      for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = first_token + 8 * n + lane % 4 * 2 + j;
          const i64 row = i64(token < a.tokens ? token : a.tokens - 1) * a.stride;
          sums[n][2 * which + j] += value * widened(a.x[row + (entry & 0xFFFF)]);
        }
    }
#endif
}

device void add_outliers(
    float (&sums)[TILES][TOKENS][4], const Outliers& own, const Arguments& a, int first_tile, int first_token, int lane) {
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const i64 tile = tile_of(a, first_tile + r);
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
#if SPREAD
      sums[r][0][0] += value_of(own.entries[r][k].x) * widened(own.met[r][k][0]);
      sums[r][0][2] += value_of(own.entries[r][k].y) * widened(own.met[r][k][1]);
#else
      add_pair(sums[r], a, own.entries[r][k], first_token, lane);
#endif
    }
    // Others come as they are met: quads of rows that have many, then the rest of long rows, four at once like these.
    int quad = own.first + AHEAD * WARPS_OF_ROW;
    if (quad >= a.quads && a.rest_ptr == nullptr) continue;
    const Rest rest[2] = {rest_of(a, int(tile) * 16 + lane / 4), rest_of(a, int(tile) * 16 + lane / 4 + 8)};
    const u32 lengths[2] = {rest[0].end - rest[0].begin, rest[1].end - rest[1].begin};
    const u32 longest = max_of_warp(lengths[0] > lengths[1] ? lengths[0] : lengths[1]);
    const int quads = a.quads > AHEAD * WARPS_OF_ROW ? a.quads : AHEAD * WARPS_OF_ROW;  // from which the rest is counted
    for (const int last = quads + int(longest + 3) / 4; quad < last; quad += WARPS_OF_ROW) {
      const int beyond = 4 * (quad - quads) + lane % 4;
      const auto entry = [&](const Rest& own) { return own.begin + beyond < own.end ? a.rest[own.begin + beyond] : 0; };
      add_pair(sums[r], a, quad < quads ? entries_of(a, tile, quad, lane) : uint2{entry(rest[0]), entry(rest[1])}, first_token, lane);
    }
  }
}
#endif

// Blocks that a multiprocessor is to have room for; 0: as many as registers happen to leave. Small groups of two-level
// scales would take all of them for one.
constexpr int TOGETHER = SPREAD && SCALE == BILEVEL && TILES == 2 ? 2 : 0;

extern "C" global __launch_bounds__(THREADS, TOGETHER) void rarefy_linear(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = warp % ACROSS, along = warp / ACROSS, g = lane / 4, t = lane % 4;
  const int first_tile = tile_of_block(a, across * TILES), first_token = blockIdx.z * WIDTH;
  const Share share = share_of(a);
  const int begin = share.begin, end = share.end;
  const int rounds = end > begin ? (end - begin + ALONG - 1) / ALONG : 0;
  float* factors = reinterpret_cast<float*>(pool + TABLE_BYTES);
  u8* stages = pool + TABLE_BYTES + FACTOR_BYTES;

  const Places places = places_of(a, first_tile, lane);
  const auto step_at = [&](int round) { return begin + round * ALONG + along; };

  // What the weights are is on its way before anything is waited for.
  Codes codes[DEPTH];
  StepScales scales[DEPTH];
#if STAGED
  constexpr int STAGE = STAGE_TOKENS + STAGE_CODES;
  const auto stage_codes = [&](int round) {
    u8* target = stages + round % STAGES * STAGE + STAGE_TOKENS;
    for (int n = threadIdx.x; round < rounds && n < STAGE_CODES / 16; n += THREADS) {
      const int tile = n / (ALONG * LOADS * 32), step = n / (LOADS * 32) % ALONG, load = n / 32 % LOADS;
      const int at = begin + round * ALONG + step;
      const bool real = at < end && has_bytes(a, at, load, n % 32);
      const uint4* from = codes_of(a, tile_of(a, tile_of_block(a, tile)), n % 32, load % 2);
      copy_async(target + 16 * n, real ? of_step(from, at) + load_at(load) : a.codes, real);
    }
  };
  for (int round = 0; round < STAGES - 1; ++round) stage_codes(round);
  if (step_at(0) < end) fetch(scales[0], a, places, step_at(0), lane);
#else
#pragma unroll
  for (int d = 0; d < DEPTH; ++d)
    if (step_at(d) < end) {
      fetch(codes[d], a, places, step_at(d), lane);
      fetch(scales[d], a, places, step_at(d), lane);
    }
#endif

#if OUTLIERS
  Outliers outliers;
  begin_outliers(outliers, a, first_tile, along, lane);
#endif
  if constexpr (TABLE == SHARED) {
    copy_table(a);
    block_barrier();
  }
#if SPREAD
  clear_places();
#endif
  Tables tables[TILES];
  load_tables(tables, a, first_tile, g);
  Beside beside;
  fetch_gain(beside, a, first_token);
  if constexpr (!LATE) start_later_kernels();
  wait_for_earlier_kernels();  // weights never depend on them
#if OUTLIERS && SPREAD
  hold_tokens(a);
#endif

  float sums[TILES][TOKENS][4] = {};
#if STAGED
  constexpr int UNIT = 8, UNITS = COLUMNS / UNIT;  // columns of a copy, copies of a token
  constexpr int AT_ONCE = UNITS < THREADS ? UNITS : THREADS, APART = THREADS / AT_ONCE;
  constexpr int TURNS_OF_TOKENS = (WIDTH + APART - 1) / APART;
  int offsets[TURNS_OF_TOKENS];
#pragma unroll
  for (int n = 0; n < TURNS_OF_TOKENS; ++n) {
    const int token = first_token + threadIdx.x / AT_ONCE + n * APART;
    offsets[n] = (token < a.tokens ? token : a.tokens - 1) * a.stride;
  }
  const auto stage_tokens = [&](int round) {
    u8* target = stages + round % STAGES * STAGE;
    for (int unit = threadIdx.x % AT_ONCE; round < rounds && unit < UNITS; unit += AT_ONCE) {
      const int column = (begin + round * ALONG) * STEP + unit * UNIT;
      const bool real = (unit * UNIT / STEP + begin + round * ALONG < end) && (!RAGGED || column < a.columns);
      u8* to = target + threadIdx.x / AT_ONCE * PITCH + 2 * unit * UNIT;
      const u16* from = a.x + (real ? column : 0);
#pragma unroll
      for (int n = 0; n < TURNS_OF_TOKENS; ++n) {
        if (WIDTH % APART != 0 && threadIdx.x / AT_ONCE + n * APART >= WIDTH) break;
        copy_async(to + n * APART * PITCH, from + offsets[n], real);
      }
    }
    commit_copies();
  };
  for (int round = 0; round < STAGES - 1; ++round) stage_tokens(round);
  fetch_rest(beside, factors, a, first_token);
#if OUTLIERS
  add_outliers(sums, outliers, a, first_tile, first_token, lane);
#endif
  for (int round = 0; round < rounds; ++round) {
    wait_for_copies<STAGES - 2>();
    block_barrier();
    stage_codes(round + STAGES - 1);
    stage_tokens(round + STAGES - 1);
    if (step_at(round) >= end) continue;
    const Scales now = scales[0];
    if (step_at(round + 1) < end) fetch(scales[0], a, places, step_at(round + 1), lane);
    const u8* stage = stages + round % STAGES * STAGE;
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int l = 0; l < LOADS; ++l) {
        const int place = (((across * TILES + r) * ALONG + along) * LOADS + l) * 32 + lane;
        put(codes[0], r, l, reinterpret_cast<const uint4*>(stage + STAGE_TOKENS)[place]);
      }
    const u8* own = stage + g * PITCH + along * STEP * 2;
    const auto tokens = [&](int n, int pair) { return columns_of(own + 8 * n * PITCH, pair, t); };
    multiply_step(sums, codes[0], now, tokens, tables, a, first_tile, step_at(round), lane);
  }
#else
#if SPREAD
  SpreadActivations x[DEPTH];
  const auto fetch_tokens = [&](int d, int step) { fetch(x[d], a, step, lane); };
#else
  const u8* token_rows[TOKENS];
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
    const int token = first_token + 8 * n + g;
    const u16* row = a.x + i64(token < a.tokens ? token : a.tokens - 1) * a.stride;
    token_rows[n] = reinterpret_cast<const u8*>(row + first_of(0, t));
    keep(token_rows[n]);
  }
  Activations x[DEPTH];
  const auto fetch_tokens = [&](int d, int step) { fetch(x[d], a, token_rows, step, t); };
#endif
#pragma unroll
  for (int d = 0; d < DEPTH; ++d)
    if (step_at(d) < end) fetch_tokens(d, step_at(d));
  fetch_rest(beside, factors, a, first_token);
#if OUTLIERS && SPREAD
  meet_tokens(outliers, a);
#elif OUTLIERS
  add_outliers(sums, outliers, a, first_tile, first_token, lane);
#endif
  for (int base = 0; base < rounds; base += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int round = base + d, next = step_at(round + DEPTH);
      if (step_at(round) >= end) break;
#if SPREAD
      multiply_step(sums, codes[d], scales[d], x[d], tables, a, first_tile, step_at(round), lane);
#else
      const auto tokens = [&](int n, int pair) { return x[d].at[n][pair]; };
      multiply_step(sums, codes[d], scales[d], tokens, tables, a, first_tile, step_at(round), lane);
#endif
      if (next < end) {
        fetch(codes[d], a, places, next, lane);
        fetch(scales[d], a, places, next, lane);
        fetch_tokens(d, next);
      }
    }
  }
#endif
#if SPREAD
#if OUTLIERS
  add_outliers(sums, outliers, a, first_tile, first_token, lane);
#endif
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    sums[r][0][0] = sum_of_four(sums[r][0][0]);
    sums[r][0][2] = sum_of_four(sums[r][0][2]);
  }
#endif

  if constexpr (LATE) start_later_kernels();

  // Warps along the columns meet in shared memory, blocks along the columns in device memory, always in one order.
  if constexpr (STAGED) {
    wait_for_copies<0>();
    block_barrier();
  }
  float* meeting = reinterpret_cast<float*>(stages);
  put_sums(meeting + along * WIDTH * SUM_PITCH, sums, SUM_PITCH, across * TILES * 16, 1, lane);
  block_barrier();
  const auto total_of_block = [&](int token, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < ALONG; ++k) sum += meeting[(k * WIDTH + token) * SUM_PITCH + row];
    return sum;
  };
  if constexpr (SPLIT == 1) {
    finish(beside, factors, a, first_token, total_of_block);
  } else {
    const i64 all = i64(a.tokens) * a.rows;
    const auto place = [&](int token, int row) { return i64(first_token + token) * a.rows + row_of_block(a, row); };
    for (int n = threadIdx.x; n < EXTRA * ROWS; n += THREADS) {
      const int token = n / ROWS, row = n % ROWS;
      if (first_token + token < a.tokens && row_of_block(a, row) < a.rows)
        a.partial[blockIdx.y * all + place(token, row)] = total_of_block(token, row);
    }
    if (!last_to_arrive(a.arrived + blockIdx.z * gridDim.x + blockIdx.x, SPLIT)) return;
    finish(beside, factors, a, first_token, [&](int token, int row) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < SPLIT; ++k) sum += load_fresh(a.partial + k * all + place(token, row));
      return sum;
    });
  }
}

// The weight for products of many tokens, [rows][columns] at `y`: in the type of the activations, or in bytes of E4M3
// with a step for each row, float32 at `partial`. A warp takes some steps of a tile, all of which it loads at once.
constexpr int AT_ONCE = PARTS > 4 ? 1 : 4;

#include "bytes.cuh"

// In the type of the activations.
struct Halves {
  static constexpr int SIZE = 2, PIECE = 4;
  Pair<SCALE> scale;
  Pair<ZERO> zero;
  float multiplier;

  void prepare(const Arguments& a, const Places&, int, int, bool, int) { multiplier = a.multiplier; }
  void begin_group(const Pair<SCALE>& own_scale, const Pair<ZERO>& own_zero) { scale = own_scale, zero = own_zero; }
  u32 number(u16 code, int which) const {
    return rounded<HALF>(contribution(scale, zero, which, widened(code), 1.0f) * multiplier);
  }
  void put(u8* to, u32 first, u32 second, int which) const {
    *reinterpret_cast<uint2*>(to) = {number(u16(first), which) | number(u16(first >> 16), which) << 16,
                                     number(u16(second), which) | number(u16(second >> 16), which) << 16};
  }
};

template <int BYTES_> struct Piece { typedef uint2 type; };
template <> struct Piece<16> { typedef uint4 type; };

template <class Numbers> device void dequantize(const Arguments& a) {
  constexpr int SIZE = Numbers::SIZE, PIECE = Numbers::PIECE;
  constexpr int PITCH_OF_ROW = SIZE * (STEP + 32);  // bytes; the rest keeps banks apart
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32 unit = u32(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32, shares = (a.steps + AT_ONCE - 1) / AT_ONCE;
  if constexpr (TABLE == SHARED) {
    copy_table(a);
    block_barrier();
  }
  const int tile = unit / shares, begin = unit % shares * AT_ONCE;
  if (tile * 16 >= a.rows) return;
  Codes codes[AT_ONCE];
  Scales scales[AT_ONCE];
  const Places places = places_of(a, tile, lane);
#pragma unroll
  for (int k = 0; k < AT_ONCE; ++k)
    if (begin + k < a.steps) {
      fetch(codes[k], a, places, begin + k, lane);
      fetch(scales[k], a, places, begin + k, lane);
    }
  const int rows = a.rows - tile * 16;
  const i64 pitch = a.columns;
  u8* y = reinterpret_cast<u8*>(a.y) + SIZE * (tile * 16 * pitch);
  Numbers numbers;
  numbers.prepare(a, places, 0, tile, begin == 0, lane);
  Tables tables;
  u8* own = pool + TABLE_BYTES + threadIdx.x / 32 * 16 * PITCH_OF_ROW;
#pragma unroll
  for (int k = 0; k < AT_ONCE; ++k) {
    const int step = begin + k;
    if (step >= a.steps) break;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      if (b % PART == 0) {
        load(tables, a, tile, group_of(a, step, b / PART), g);
        numbers.begin_group(scales[k].scale[0][b / PART], scales[k].zero[0][b / PART]);
      }
      u32 weights[4];
      operands(weights, codes[k].at[0], b, 4 * lane, tables);
      const int column = SPAN == 4 ? 32 * (b / 2) + 4 * t + 16 * (b % 2) : first_of(b / 2, t) + 4 * (b % 2);
#pragma unroll
      for (int which = 0; which < 2; ++which)
        numbers.put(own + (g + 8 * which) * PITCH_OF_ROW + SIZE * column, weights[which], weights[which + 2], which);
    }
    warp_barrier();
#pragma unroll
    for (int n = 0; n < 16 * STEP / 32 / PIECE; ++n) {  // whole rows, as memory likes them
      const int at = n * 32 + lane, within = at % (STEP / PIECE) * PIECE, row = at / (STEP / PIECE);
      typedef typename Piece<SIZE * PIECE>::type Own;
      const Own whole = *reinterpret_cast<const Own*>(own + row * PITCH_OF_ROW + SIZE * within);
      u8* to = y + SIZE * (row * pitch + step * STEP + within);
      if (row < rows && (!RAGGED || step * STEP + within < a.columns)) *reinterpret_cast<Own*>(to) = whole;
    }
    warp_barrier();
  }
}

extern "C" global __launch_bounds__(THREADS) void rarefy_dequantize(const Arguments a) { dequantize<Halves>(a); }
extern "C" global __launch_bounds__(THREADS) void rarefy_dequantize_to_bytes(const Arguments a) {
  if constexpr (TABLE == NONE && !FLOAT8 && HALF) dequantize<Bytes>(a);
}

// ---- Activations in 8 bits, for products of bytes.

#if FLOAT8 && (defined(RAREFY_EMULATED) || __CUDA_ARCH__ >= 890)
// Tokens [tokens][columns] as bytes in E4M3 at `y` and what they are multiplied by, float32 [tokens] at `partial`. With a
// `scale` [columns] they are normalized first, by the root of their mean square plus `multiplier`. A block takes a token
// and keeps what it has read, unless that is too long.
constexpr int HELD = 4;  // pieces of eight columns of a thread
extern "C" global __launch_bounds__(THREADS) void rarefy_quantize(const Arguments a) {
  const u16* x = a.x + i64(blockIdx.x) * a.stride;
  const uint4* gain = static_cast<const uint4*>(a.scale);
  const int pieces = a.columns / 8;
  start_later_kernels();
  wait_for_earlier_kernels();
  const auto piece = [&](int at) { return load_shared_by_all(reinterpret_cast<const uint4*>(x) + at, at < pieces); };
  const auto values_of = [&](float (&values)[8], const uint4& all, int at) {
    const u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int n = 0; n < 8; ++n) values[n] = widened(u16(words[n / 2] >> 16 * (n % 2)));
    if (gain == nullptr || at >= pieces) return;
    const uint4 own = gain[at];
    const u32 gains[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
    for (int n = 0; n < 8; ++n) values[n] *= widened(u16(gains[n / 2] >> 16 * (n % 2)));
  };
  float squares = 0.0f, most = 0.0f;
  const auto measure = [&](const uint4& all, int at) {
    float values[8];
    if (gain != nullptr) {
      const u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float value = widened(u16(words[n / 2] >> 16 * (n % 2)));
        squares += value * value;
      }
    }
    values_of(values, all, at);
#pragma unroll
    for (int n = 0; n < 8; ++n) most = max_of(most, absolute(values[n]));
  };
  uint4 held[HELD];
#pragma unroll
  for (int k = 0; k < HELD; ++k) held[k] = piece(threadIdx.x + k * THREADS);
#pragma unroll
  for (int k = 0; k < HELD; ++k) measure(held[k], threadIdx.x + k * THREADS);
  for (int at = threadIdx.x + HELD * THREADS; at < pieces; at += THREADS) measure(piece(at), at);
  reduce_over_block(squares, most, reinterpret_cast<float*>(pool));
  const float norm = gain ? inverse_root(squares / a.columns + a.multiplier) : 1.0f;
  const float step = max_of(most * norm, 1e-12f) / 448.0f, factor = norm / step;
  if (threadIdx.x == 0) a.partial[blockIdx.x] = step;
  uint2* y = reinterpret_cast<uint2*>(a.y) + i64(blockIdx.x) * pieces;
  const auto put = [&](const uint4& all, int at) {
    float values[8];
    values_of(values, all, at);
    u32 bytes[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      bytes[n] = e4m3_pair(values[4 * n] * factor, values[4 * n + 1] * factor) |
                 u32(e4m3_pair(values[4 * n + 2] * factor, values[4 * n + 3] * factor)) << 16;
    y[at] = {bytes[0], bytes[1]};
  };
#pragma unroll
  for (int k = 0; k < HELD; ++k)
    if (int(threadIdx.x) + k * THREADS < pieces) put(held[k], threadIdx.x + k * THREADS);
  for (int at = threadIdx.x + HELD * THREADS; at < pieces; at += THREADS) put(piece(at), at);
}
#endif
