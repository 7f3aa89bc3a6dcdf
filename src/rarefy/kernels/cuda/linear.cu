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
// (blocks over columns), HELD (tokens that wait in shared memory), BESIDE (blocks of columns that share the places of 8
// tokens; SPREAD: one token, all 8), LATE (later kernels may start when the sums are formed, not before), ROOM (for so
// many blocks on a multiprocessor; 0: as registers leave), STORED (see stored.cuh), IN_PLANES (see planes.cuh), and those
// of ending.cuh.

constexpr int THREADS = 32 * ACROSS * ALONG;

#include "codes.cuh"

constexpr int ROWS = 16 * TILES * ACROSS, COLUMNS = STEP * ALONG, WIDTH = 8 * TOKENS;
constexpr int PITCH = 2 * COLUMNS + (SPAN == 16 ? 16 : 64);  // bytes of a staged token; the rest keeps banks apart
constexpr int STAGE_TOKENS = WIDTH * PITCH;  // bytes
constexpr int EXTRA = SPREAD ? 1 : WIDTH;    // tokens that are any
constexpr int STAGE_CODES = STAGED ? ROWS / 16 * ALONG * LOADS * 512 : 0;  // bytes
constexpr int SUM_PITCH = ROWS + 4;
constexpr int MOST_HELD = 16384;
constexpr bool ALL_HELD = !SPREAD && HELD > 0 && HELD_COLUMNS < MOST_HELD;
constexpr bool SMALL = !SPREAD && PARTS > 4 && SCALE != NONE && SCALE != PAIRS;  // groups whose scales four lanes share
static_assert(BESIDE == 1 || (SMALL && ALL_HELD && HELD == 8 / BESIDE), "in the places of eight tokens");
constexpr bool CAN_LIFT = TABLE == NONE && BITS <= 4;
constexpr int LIFT = !CAN_LIFT ? LOWERED
                     : BESIDE > 1 || (SMALL && SUMS && BITS > 2) ? LIFTED_ALIKE
                     : SPREAD || (SMALL && TILES > 1) || (BITS == 1 && SUMS) ? LIFTED : LOWERED;

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
    if constexpr (LIFT != LOWERED) {
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

// ---- Several tokens and small groups: four lanes want the same scales, so each forms those of a quarter of the groups
// and leaves them in shared memory. Of two or four tokens four or two blocks of columns are beside each other, in the
// places of eight tokens, so that a lane has sums of other groups than its neighbours.

constexpr bool SHARES = SMALL && !(BESIDE == 4 && PART == 1);  // else a lane wants what it forms
constexpr int OWN_GROUPS = SMALL ? PARTS / 4 : 1;
constexpr int SHARES_OF_WARP = SHARES ? 128 * PARTS * TILES : 0;  // bytes
constexpr int MEETING_BYTES = 4 * ALONG * WIDTH * SUM_PITCH, STAGES_BYTES = STAGED ? STAGES * (STAGE_TOKENS + STAGE_CODES) : 0;
constexpr int AT_SHARES =
    (TABLE_BYTES + FACTOR_BYTES + (MEETING_BYTES > STAGES_BYTES ? MEETING_BYTES : STAGES_BYTES) + 15) / 16 * 16;
constexpr float UNIT = LIFT == LIFTED_ALIKE ? -1.0f / (MAGIC_VALUE + CENTER) : 1.0f;  // in which ones are counted

struct SharedScales {
  Pair<SCALE> scale[TILES][OWN_GROUPS];
  Pair<ZERO> zero[TILES][OWN_GROUPS];
};

device void fetch(SharedScales& scales, const Arguments& a, const Places& places, int step, int lane) {
#pragma unroll
  for (int own = 0; own < OWN_GROUPS; ++own) {
    i64 group = i64(step) * PARTS + lane % 4 + 4 * own;
    if (RAGGED && group >= a.groups) group = a.groups - 1;
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      load(scales.scale[r][own], a.scale, places.scales[r] + group * 8, places.second[r], group / SECOND_GROUPS);
      load(scales.zero[r][own], a.zero, places.scales[r] + group * 8, places.second[r], group / SECOND_GROUPS);
    }
  }
}

// Where the lines of rows g and g + 8 lie. What a quarter of a warp writes at once lies in different banks.
device float4& lines_at(int tile, int group, int g) {
  float4* own = reinterpret_cast<float4*>(pool + AT_SHARES + threadIdx.x / 32 * SHARES_OF_WARP);
  return own[(tile * PARTS + group) * 8 + (g ^ group % 4 * 2)];
}

device float4 own_lines(const SharedScales& scales, int tile, int own) {
  Line lines[2];
  lines_of(lines, scales.scale[tile][own], scales.zero[tile][own], UNIT);
  return {lines[0].slope, lines[0].zero, lines[1].slope, lines[1].zero};
}

device void share(const SharedScales& scales, int lane) {
  warp_barrier();  // all have read what lay there
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int own = 0; own < OWN_GROUPS; ++own) lines_at(r, 4 * own + lane % 4, lane / 4) = own_lines(scales, r, own);
  warp_barrier();
}

device void add_line(float (&sums)[4], const float4& lines, float (&part)[4], const float (&ones)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (SUMS) part[j] += (j < 2 ? lines.y : lines.w) * ones[j];
    sums[j] += (j < 2 ? lines.x : lines.z) * part[j];
  }
}

// What lifts all codes alike, or else sums activations up. In registers that are filled but once: if the compiler knew that
// nothing is added, it would copy the number into four of them before every product.
struct Constant { u32 at[4]; };

device Constant constant_of(const Arguments& a) {
  constexpr u32 VALUE = LIFT == LIFTED_ALIKE ? MINUS_ALIKE : ONES;
  return {{VALUE + (a.rows >> 31), VALUE + (a.columns >> 31), VALUE + (a.tokens >> 31), VALUE + (a.steps >> 31)}};
}

#if BESIDE > 1
// `words(to, set, real)` answers with those of the block and the token whose place a lane has, if they are wanted.
template <class WordsOfSet>
device void multiply_beside(
    float (&sums)[TILES][TOKENS][4], const Codes& codes, const SharedScales& scales, const WordsOfSet& words,
    const Tables (&tables)[TILES], const Arguments& a, int lane) {
  const Constant constant = constant_of(a);
  const int g = lane / 4, own_block = g * BESIDE / 8, block_of_sums = lane % 4 * BESIDE / 4;
  if constexpr (SHARES) share(scales, lane);
  uint2 only[BESIDE] = {};  // of each block, zeros in the places of others
#pragma unroll
  for (int set = 0; set < BLOCKS / BESIDE; ++set) {
    uint2 all;
    words(all, set, true);
#pragma unroll
    for (int k = 0; k < BESIDE; ++k) words(only[k], set, own_block == k);
    float ones[4] = {};
    if constexpr (LIFT == LIFTED_ALIKE || SUMS) multiply(ones, constant.at, all.x, all.y);
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      float part[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) part[j] = LIFT == LIFTED_ALIKE ? ones[j] : 0.0f;
#pragma unroll
      for (int k = 0; k < BESIDE; ++k) {
        u32 weights[4];
        operands<LIFT>(weights, codes.at[r], BESIDE * set + k, 4 * lane, tables[r]);
        multiply(part, weights, only[k].x, only[k].y);
      }
      add_line(sums[r][0], SHARES ? lines_at(r, (BESIDE * set + block_of_sums) / PART, g) : own_lines(scales, r, set % OWN_GROUPS), part, ones);
    }
  }
}

#endif

template <class Tokens>
device void multiply_step(
    float (&sums)[TILES][TOKENS][4], const Codes& codes, const SharedScales& scales, const Tokens& tokens,
    Tables (&tables)[TILES], const Arguments& a, int first_tile, int step, int lane) {
  share(scales, lane);
  const Constant constant = constant_of(a);
  Words x[TOKENS];
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    if (p * PART % 2 == 0) {
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) x[n] = tokens(n, p * PART / 2);
    }
    float lift[TOKENS][4] = {}, ones[TOKENS][4] = {};
#pragma unroll
    for (int b = p * PART; b < p * PART + PART; ++b) {
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) {
        const u32 (&own)[4] = x[n].at;
        if constexpr (LIFT == LIFTED) {
          const u32 lifts[4] = {minus_lift_of(b, 0), minus_lift_of(b, 1), minus_lift_of(b, 2), minus_lift_of(b, 3)};
          multiply(lift[n], lifts, own[2 * (b % 2)], own[2 * (b % 2) + 1]);
        }
        if constexpr (LIFT == LIFTED_ALIKE) multiply(lift[n], constant.at, own[2 * (b % 2)], own[2 * (b % 2) + 1]);
        else if constexpr (SUMS) multiply(ones[n], constant.at, own[2 * (b % 2)], own[2 * (b % 2) + 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      const float4 lines = lines_at(r, p, lane / 4);
      float part[TOKENS][4];
#pragma unroll
      for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) part[n][j] = lift[n][j];
#pragma unroll
      for (int b = p * PART; b < p * PART + PART; ++b) {
        u32 weights[4];
        if (GROUP != 0 && b % PART == 0) load(tables[r], a, tile_of(a, first_tile + r), group_of(a, step, p), lane / 4);
        operands<LIFT>(weights, codes.at[r], b, 4 * lane, tables[r]);
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) multiply(part[n], weights, x[n].at[2 * (b % 2)], x[n].at[2 * (b % 2) + 1]);
      }
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) add_line(sums[r][n], lines, part[n], LIFT == LIFTED_ALIKE ? lift[n] : ones[n]);
    }
  }
}

template <bool SHARED_BY_LANES> struct OfStep { typedef Scales type; };
template <> struct OfStep<true> { typedef SharedScales type; };

// ---- One token: its blocks of columns take the places of eight tokens. A lane then reads an eighth of the activations
// and has sums of other groups than its neighbours, not the same ones.

#if SPREAD
static_assert(TOKENS == 1, "of one token");
constexpr int SETS = BLOCKS / 8;
constexpr int OWN_PARTS = PART >= 8 ? PARTS : PART > 1 ? SETS : 2 * SETS;  // whose scales a lane needs
device constexpr int own_part(int set, int c) { return PART >= 8 ? set * 8 / PART : PART > 1 ? set : 2 * set + c; }

constexpr int AT_PLACES = (TABLE_BYTES + FACTOR_BYTES + 4 * ALONG * SUM_PITCH + 15) / 16 * 16;
constexpr int PLACES_BYTES = IN_PLANES ? 2 * DEPTH * ALONG * (8 + 16 * PLANES) : 8 * 8 * THREADS;

struct SpreadScales {
  Pair<SCALE> scale[TILES][OWN_PARTS];
  Pair<ZERO> zero[TILES][OWN_PARTS];
};

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

#if IN_PLANES
#include "planes.cuh"
#else
// Of each block of a set all lanes take part in the product, but only its own have numbers, the others zeros. These stand
// in shared memory, eight places for a lane of which it fills only its own block's: one load instead of two selections.
constexpr int PLACES_OF_WARP = 8 * 32;
device uint2* places_of_lane() { return reinterpret_cast<uint2*>(pool + AT_PLACES) + threadIdx.x / 32 * PLACES_OF_WARP + threadIdx.x % 32; }
device void clear_places() {
#pragma unroll
  for (int n = 0; n < 8; ++n) places_of_lane()[32 * n] = {0, 0};
}

struct SpreadActivations { uint2 at[SETS]; };

device void fetch(SpreadActivations& x, const Arguments& a, int step, int lane) {
#pragma unroll
  for (int set = 0; set < SETS; ++set) {
    const int b = 8 * set + lane / 4, t = lane % 4;
    const int column = step * STEP + (SPAN == 4 ? 16 * b + 4 * t : first_of(b / 2, t) + b % 2 * 4);
    x.at[set] = load_shared_by_all(reinterpret_cast<const uint2*>(a.x + column), !RAGGED || column < a.columns);
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

#endif

typedef SpreadScales StepScales;
#else
typedef OfStep<SMALL>::type StepScales;
#endif

// ---- Activations that wait in shared memory: of one token for outliers, and of HELD tokens for the product too, unless
// these are so long that only the first HELD_COLUMNS have room. Outliers find them there a few at once, not each in a line
// of its own. Tokens are so far from each other that columns which are read together lie in different banks.

constexpr int HELD_PITCH = 2 * HELD_COLUMNS + (SPREAD ? 0 : SPAN == 4 ? 32 : 64);
constexpr bool HOLDS = SPREAD ? OUTLIERS : HELD > 0;
constexpr bool MEET_FIRST = SPREAD && OUTLIERS && TABLE == BY_ROW && !STORED;  // see below
static_assert(HELD == 0 || !STAGED, "either");
#if SPREAD
constexpr int AT_HELD = AT_PLACES + PLACES_BYTES;
#else
constexpr int AT_HELD = AT_SHARES + SHARES_OF_WARP * ACROSS * ALONG;
#endif

device void hold_tokens(const Arguments& a, int first_token) {
#if SPREAD
  // In a loop: copies that are unrolled are begun before the product's own activations, which then come after them.
#pragma unroll 1
  for (int n = threadIdx.x; n < HELD_COLUMNS / 8 && 8 * n < a.columns; n += THREADS) copy_async(pool + AT_HELD + 16 * n, a.x + 8 * n, true);
#else
  const u16* from = a.x + i64(first_token) * a.stride + 8 * threadIdx.x;
  u8* to = pool + AT_HELD + 16 * threadIdx.x;
#pragma unroll
  for (int token = 0; token < HELD; ++token) {
    if (first_token + token >= a.tokens) break;
#pragma unroll
    for (int n = 0; n < HELD_COLUMNS / 8; n += THREADS) {
      if (HELD_COLUMNS / 8 % THREADS && n + int(threadIdx.x) >= HELD_COLUMNS / 8) break;
      const bool real = 8 * (n + int(threadIdx.x)) < a.columns;
      if (real || RAGGED) copy_async(to + token * HELD_PITCH + 16 * n, real ? from + 8 * n : a.x, real);
    }
    from += a.stride;
  }
#endif
  commit_copies();
}
device void wait_for_tokens() {
  wait_for_copies<0>();
  block_barrier();
}

#if STORED
static_assert(SPREAD, "of one token");
#include "stored.cuh"
#endif

device const u8* held_of(int token) { return pool + AT_HELD + (HELD > 0 && token > HELD - 1 ? HELD - 1 : token) * HELD_PITCH; }

// ---- Outliers: warps along the columns share a row's quads. A lane of one token adds its own entries to its own sums,
// which meet later; of more, the lanes that have sums of a row share its entries and add them for their own tokens.
// Entries are on their way before activations are waited for. Those of one token are added when the product is done:
// the activations that they meet come meanwhile, and the product waits for nobody else's. Where rows have tables, blocks
// are so many that what they wait for is their weights, and what entries meet is read meanwhile (MEET_FIRST).

#if OUTLIERS
#include "outliers.cuh"

// Quads of a warp that are on their way from the start: all of what most rows have, or a few.
constexpr int WARPS_OF_ROW = ALONG * SPLIT, EACH_QUADS = (QUADS + WARPS_OF_ROW - 1) / WARPS_OF_ROW;
constexpr int MOST_AHEAD = STORED ? 0 : SPREAD && PARTS <= 4 ? 4 : WARPS_OF_ROW < 8 ? 2 : 1;
constexpr int AHEAD = EACH_QUADS < MOST_AHEAD ? EACH_QUADS : MOST_AHEAD;

#if SPREAD
typedef uint2 Entries;
#else
typedef Quad Entries;
#endif
struct Outliers {
  int first;  // quad of this warp
  Entries entries[TILES][AHEAD > 0 ? AHEAD : 1];
  u16 met[MEET_FIRST ? TILES : 1][AHEAD > 0 ? AHEAD : 1][2];
};

device void begin_outliers(Outliers& own, const Arguments& a, int first_tile, int along, int lane) {
  own.first = blockIdx.y * ALONG + along;
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const i64 tile = tile_of(a, first_tile + r);
      const int quad = own.first + k * WARPS_OF_ROW;
#if SPREAD
      own.entries[r][k] = entries_of(a, tile, quad, lane);
#else
      own.entries[r][k] = quad_of(a, tile, quad, lane);
#endif
    }
}

#if SPREAD
device u16 activation_of(const Arguments& a, u32 entry) {
  const int column = entry & 0xFFFF;
  if (HELD_COLUMNS == MOST_HELD && column >= HELD_COLUMNS) return a.x[column];
  return reinterpret_cast<const u16*>(pool + AT_HELD)[column];
}
device void meet_tokens(Outliers& own, const Arguments& a) {
#pragma unroll
  for (int r = 0; r < (MEET_FIRST ? TILES : 0); ++r)
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      own.met[r][k][0] = activation_of(a, own.entries[r][k].x);
      own.met[r][k][1] = activation_of(a, own.entries[r][k].y);
    }
}
device void add_entry(float& sum, const Arguments& a, u32 entry) { sum += value_of(entry) * widened(activation_of(a, entry)); }

// Both entries of a lane.
device void add_entries(float (&sums)[TOKENS][4], const Arguments& a, const uint2& pair, int, int) {
  add_entry(sums[0][0], a, pair.x);
  add_entry(sums[0][2], a, pair.y);
}
#else
// An activation of a lane's first and second token of eight. Tokens beyond the last are any.
device u16 activation_of(const Arguments& a, int column, int first_token, int token) {
  if (HELD > 0 && (HELD_COLUMNS < MOST_HELD || column < HELD_COLUMNS))
    return *reinterpret_cast<const u16*>(pool + AT_HELD + token * HELD_PITCH + 2 * column);
  token += first_token;
  return a.x[i64(token < a.tokens ? token : a.tokens - 1) * a.stride + column];
}

// All entries of a quad for a lane's tokens.
device void add_entries(float (&sums)[TOKENS][4], const Arguments& a, const Quad& quad, int first_token, int lane) {
#pragma unroll
  for (int k = 0; k < 8 / BESIDE; ++k) {
    const u32 entry = quad.at[k];
    const float value = value_of(entry);
#pragma unroll
    for (int n = 0; n < TOKENS; ++n) {
      const int own = 8 * n + lane % 4 * 2;
      const int first = BESIDE > 1 ? own % (8 / BESIDE) : HELD > 0 && own > HELD - 2 ? HELD - 2 : own;
#pragma unroll
      for (int j = 0; j < 2; ++j) sums[n][k % 2 * 2 + j] += value * widened(activation_of(a, entry & 0xFFFF, first_token, first + j));
    }
  }
}
#endif

device void add_outliers(float (&sums)[TILES][TOKENS][4], const Outliers& own, const Arguments& a, int first_token, int lane) {
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
#if SPREAD
      if constexpr (MEET_FIRST) {
        sums[r][0][0] += value_of(own.entries[r][k].x) * widened(own.met[r][k][0]);
        sums[r][0][2] += value_of(own.entries[r][k].y) * widened(own.met[r][k][1]);
        continue;
      }
#endif
      add_entries(sums[r], a, own.entries[r][k], first_token, lane);
    }
}
#if STORED
device void add_stored_outliers(float (&sums)[TILES][TOKENS][4], Outliers& own, const Arguments& weights, int first_tile, int lane) {
  for (; own.first < weights.quads; own.first += WARPS_OF_ROW)
#pragma unroll
    for (int r = 0; r < TILES; ++r) add_entries(sums[r], weights, entries_of(weights, first_tile + r, own.first, lane), 0, lane);
}
#endif

// Others come as they are met: quads of rows that have many, then the rest of long rows, four at once like these.
device void add_other_outliers(
    float (&sums)[TILES][TOKENS][4], const Outliers& own, const Arguments& a, int first_tile, int first_token, int lane) {
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const i64 tile = tile_of(a, first_tile + r);
    int quad = own.first + AHEAD * WARPS_OF_ROW;
    if (quad >= a.quads && a.rest_ptr == nullptr) continue;
    const Rest rest[2] = {rest_of(a, int(tile) * 16 + lane / 4), rest_of(a, int(tile) * 16 + lane / 4 + 8)};
    const u32 lengths[2] = {rest[0].end - rest[0].begin, rest[1].end - rest[1].begin};
    const u32 longest = max_of_warp(lengths[0] > lengths[1] ? lengths[0] : lengths[1]);
    const int quads = a.quads > AHEAD * WARPS_OF_ROW ? a.quads : AHEAD * WARPS_OF_ROW;  // from which the rest is counted
    for (const int last = quads + int(longest + 3) / 4; quad < last; quad += WARPS_OF_ROW) {
      const int beyond = 4 * (quad - quads);
      const auto entry = [&](const Rest& own, int n) { return own.begin + beyond + n < own.end ? a.rest[own.begin + beyond + n] : 0; };
#if SPREAD
      const uint2 more = quad < quads ? entries_of(a, tile, quad, lane) : uint2{entry(rest[0], lane % 4), entry(rest[1], lane % 4)};
#else
      Quad more = quad_of(a, tile, quad, lane);
      if (quad >= quads) {
#pragma unroll
        for (int k = 0; k < 8 / BESIDE; ++k) more.at[k] = entry(rest[k % 2], lane % 4 * BESIDE / 4 * (4 / BESIDE) + k / 2);
      }
#endif
      add_entries(sums[r], a, more, first_token, lane);
    }
  }
}
#endif

extern "C" global __launch_bounds__(THREADS, ROOM) void rarefy_linear(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = warp % ACROSS, along = warp / ACROSS, g = lane / 4, t = lane % 4;
  const int first_tile = tile_of_block(a, across * TILES), first_token = blockIdx.z * WIDTH;
  const Share share = share_of(a);
  const int begin = share.begin, end = share.end;
  const int rounds = end > begin ? (end - begin + ALONG - 1) / ALONG : 0;
  float* factors = reinterpret_cast<float*>(pool + TABLE_BYTES);
  u8* stages = pool + TABLE_BYTES + FACTOR_BYTES;

#if STORED
  const int first_stored = across * TILES;
  const Stored stored = stored_of(a, share);
  if (rounds > 0) store_weights(a, share, stored);
  const Arguments weights = stored_arguments(a, stored);
  const Places places = stored_places(stored, first_stored, begin, lane);
#else
  const Arguments& weights = a;
  const Places places = places_of(a, first_tile, lane);
#endif
  const auto step_at = [&](int round) { return begin + round * ALONG + along; };

  // What the weights are is on its way before anything is waited for.
  Codes codes[DEPTH];
#if IN_PLANES
  static_assert(DEPTH == 1 || DEPTH == 2 || DEPTH == 4, "a step for each lane of a row");
  SpreadScales scales[1];
  const auto step_of_lane = [&](int base) {
    const int step = step_at(base + (t < DEPTH ? t : DEPTH - 1));
    return step < end ? step : end - 1;
  };
  if (!STORED && rounds > 0) fetch(scales[0], a, places, step_of_lane(0), lane);
#else
  StepScales scales[DEPTH];
#endif
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
#elif !STORED
#pragma unroll
  for (int d = 0; d < DEPTH; ++d)
    if (step_at(d) < end) {
      fetch(codes[d], a, places, step_at(d), lane);
#if !IN_PLANES
      fetch(scales[d], a, places, step_at(d), lane);
#endif
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
#if SPREAD && !IN_PLANES
  clear_places();
#endif
  Tables tables[TILES];
  load_tables(tables, a, first_tile, g);
  Beside beside;
  fetch_gain(beside, a, first_token);
  if constexpr (STORED) block_barrier();  // which are to wait for it see the barrier of what is stored
  if constexpr (!LATE) start_later_kernels();
  wait_for_earlier_kernels();  // weights never depend on them
  if constexpr (HOLDS && (!SPREAD || MEET_FIRST)) hold_tokens(a, first_token);

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
  add_outliers(sums, outliers, a, first_token, lane);
  add_other_outliers(sums, outliers, a, first_tile, first_token, lane);
#endif
  for (int round = 0; round < rounds; ++round) {
    wait_for_copies<STAGES - 2>();
    block_barrier();
    stage_codes(round + STAGES - 1);
    stage_tokens(round + STAGES - 1);
    if (step_at(round) >= end) continue;
    const StepScales now = scales[0];
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
#if IN_PLANES
  PlaneTokens x;
  fetch(x, a, begin, end);
  const auto fetch_tokens = [](int, int) {};  // they came for DEPTH rounds of all warps at once
#elif SPREAD
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
  Activations x[ALL_HELD ? 1 : DEPTH];
  const auto fetch_tokens = [&](int d, int step) {
    if constexpr (!ALL_HELD) fetch(x[d], a, token_rows, step, t);
  };
#endif
#pragma unroll
  for (int d = 0; d < DEPTH; ++d)
    if (step_at(d) < end) fetch_tokens(d, step_at(d));
  if constexpr (HOLDS && SPREAD && !MEET_FIRST) hold_tokens(a, first_token);
  fetch_rest(beside, factors, a, first_token);
#if STORED && !IN_PLANES
  if (rounds > 0) wait_for(weights_arrived(), 0);
#endif
  if constexpr (HOLDS && (!SPREAD || MEET_FIRST)) wait_for_tokens();
#if SPREAD && OUTLIERS
  if constexpr (MEET_FIRST) meet_tokens(outliers, a);
#endif
#if OUTLIERS && !SPREAD
  add_outliers(sums, outliers, a, first_token, lane);
  add_other_outliers(sums, outliers, a, first_tile, first_token, lane);
#endif
#if IN_PLANES
  for (int base = 0; base < rounds; base += DEPTH) {
    if (base > 0) block_barrier();
    make_planes(x);
    block_barrier();
    fetch(x, a, begin + (base + DEPTH) * ALONG, end);
#if STORED
    if (base == 0) wait_for(weights_arrived(), 0);
#endif
    float parts[TILES][4] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int round = base + d, next = step_at(round + DEPTH);
      if (step_at(round) >= end) break;
      if (STORED) fetch(codes[d], weights, places, step_at(round), lane);
      count_step(parts, codes[d], d * ALONG + along, d, lane);
      if (!STORED && next < end) fetch(codes[d], weights, places, next, lane);
    }
    if (STORED) fetch(scales[0], weights, places, step_of_lane(base), lane);
    add_parts(sums, parts, scales[0], along, t);
    if (!STORED && base + DEPTH < rounds) fetch(scales[0], weights, places, step_of_lane(base + DEPTH), lane);
  }
#else
  for (int base = 0; base < rounds; base += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int round = base + d, next = step_at(round + DEPTH);
      if (step_at(round) >= end) break;
      if (STORED) {
        fetch(codes[d], weights, places, step_at(round), lane);
        fetch(scales[d], weights, places, step_at(round), lane);
      }
#if SPREAD
      multiply_step(sums, codes[d], scales[d], x[d], tables, a, first_tile, step_at(round), lane);
#elif BESIDE > 1
      const int block = g * BESIDE / 8;
      const int column = SPAN == 4 ? 16 * block + 4 * t : 32 * (block / 2) + 4 * (block % 2) + 8 * t;
      const u8* own = held_of(g % HELD) + 2 * (step_at(round) * STEP + column);
      const auto words = [&](uint2& to, int set, bool real) { load_held(to, own + 32 * BESIDE * set, real); };
      multiply_beside(sums, codes[d], scales[d], words, tables, a, lane);
#else
      const auto tokens = [&](int n, int pair) {
        if constexpr (ALL_HELD) return columns_of(held_of(8 * n + g) + 2 * STEP * step_at(round), pair, t);
        return x[ALL_HELD ? 0 : d].at[n][pair];
      };
      multiply_step(sums, codes[d], scales[d], tokens, tables, a, first_tile, step_at(round), lane);
#endif
      if (next < end) {
        if (!STORED) {
          fetch(codes[d], weights, places, next, lane);
          fetch(scales[d], weights, places, next, lane);
        }
        fetch_tokens(d, next);
      }
    }
  }
#endif
#pragma unroll
  for (int distance = 2; BESIDE > 1 && distance >= 4 / BESIDE; distance /= 2)
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[r][0][j] += of_lane_xor(sums[r][0][j], distance);
#endif
#if SPREAD && OUTLIERS
  if constexpr (!MEET_FIRST) wait_for_tokens();
  add_outliers(sums, outliers, a, first_token, lane);
#if STORED
  add_stored_outliers(sums, outliers, weights, first_stored, lane);
#endif
  add_other_outliers(sums, outliers, a, first_tile, first_token, lane);
#endif

  if constexpr (LATE) start_later_kernels();

  // Warps along the columns meet in shared memory, blocks along the columns in device memory, always in one order.
  if constexpr (STAGED) {
    wait_for_copies<0>();
    block_barrier();
  }
  float* meeting = reinterpret_cast<float*>(stages);
#if SPREAD
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const float sum = sum_of_four(sums[r][0][0]), sum_below = sum_of_four(sums[r][0][2]);
    float* own = meeting + along * SUM_PITCH + (across * TILES + r) * 16 + g;
    if (t == 0) own[0] = sum, own[8] = sum_below;
  }
#else
  put_sums(meeting + along * WIDTH * SUM_PITCH, sums, SUM_PITCH, across * TILES * 16, 1, lane);
#endif
  block_barrier();
  const auto total_of_block = [&](int token, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < ALONG; ++k) sum += meeting[(k * EXTRA + token) * SUM_PITCH + row];
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

// Of E4M3: what a code stands for is `factor * (code + shift) + offset` in float16, for rows g and g + 8. A shift is a
// zero point, so that what means zero stays zero.
struct Bytes {
  static constexpr int SIZE = 1, PIECE = 16;  // bytes of a number, numbers of a lane
  float most[2];
  u32 factor[2], shift[2], offset[2];

  // The largest number that a row may hold, of all its groups, by four lanes.
  void prepare(const Arguments& a, const Places& places, int tile, bool is_first, int lane) {
    most[0] = most[1] = 0.0f;
    for (int group = lane % 4; group < a.groups; group += 4) {
      Pair<SCALE> scale;
      Pair<ZERO> zero;
      load(scale, a.scale, places.scales[0] + group * 8, places.second[0], group / SECOND_GROUPS);
      load(zero, a.zero, places.scales[0] + group * 8, places.second[0], group / SECOND_GROUPS);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const float low = contribution(scale, zero, which, -CENTER, 1.0f);
        const float high = contribution(scale, zero, which, (1 << BITS) - 1 - CENTER, 1.0f);
        most[which] = max_of(most[which], max_of(absolute(low), absolute(high)));
      }
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) most[which] = max_of(most[which], of_lane_xor(most[which], distance));
      const int row = tile * 16 + lane / 4 + 8 * which;
      if (is_first && lane % 4 == 0 && row < a.rows) a.partial[row] = most[which] / 448.0f * a.multiplier;
    }
  }
  void begin_group(const Pair<SCALE>& scale, const Pair<ZERO>& zero, const Arguments&) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float unit = most[which] > 0.0f ? 448.0f / most[which] : 0.0f, none = contribution(scale, zero, which, 0.0f, 1.0f);
      const float slope = contribution(scale, zero, which, 1.0f, 1.0f) - none;
      factor[which] = rounded<true>(slope * unit) * 0x10001u;
      shift[which] = rounded<true>(slope == 0.0f ? 0.0f : none / slope) * 0x10001u;
      offset[which] = rounded<true>(none * unit) * 0x10001u;
    }
  }
  // Four numbers of a row from two pairs of codes.
  void put(u8* to, u32 first, u32 second, int which) const {
#if defined(RAREFY_EMULATED) || __CUDA_ARCH__ >= 890
    *reinterpret_cast<u32*>(to) = e4m3_of_halves(number(first, which)) | u32(e4m3_of_halves(number(second, which))) << 16;
#endif
  }
  u32 number(u32 codes, int which) const {
    if constexpr (SCALE == PAIRS) return fused(codes, factor[which], offset[which]);
    else return fused(SUMS ? fused(codes, ONES, shift[which]) : codes, factor[which], 0);
  }
};

// In the type of the activations.
struct Halves {
  static constexpr int SIZE = 2, PIECE = 4;
  Pair<SCALE> scale;
  Pair<ZERO> zero;
  float multiplier;

  void prepare(const Arguments& a, const Places&, int, bool, int) { multiplier = a.multiplier; }
  void begin_group(const Pair<SCALE>& own_scale, const Pair<ZERO>& own_zero, const Arguments&) { scale = own_scale, zero = own_zero; }
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
  numbers.prepare(a, places, tile, begin == 0, lane);
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
        numbers.begin_group(scales[k].scale[0][b / PART], scales[k].zero[0][b / PART], a);
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
constexpr int KEPT = 4;  // pieces of eight columns of a thread
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
  uint4 held[KEPT];
#pragma unroll
  for (int k = 0; k < KEPT; ++k) held[k] = piece(threadIdx.x + k * THREADS);
#pragma unroll
  for (int k = 0; k < KEPT; ++k) measure(held[k], threadIdx.x + k * THREADS);
  for (int at = threadIdx.x + KEPT * THREADS; at < pieces; at += THREADS) measure(piece(at), at);
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
  for (int k = 0; k < KEPT; ++k)
    if (int(threadIdx.x) + k * THREADS < pieces) put(held[k], threadIdx.x + k * THREADS);
  for (int at = threadIdx.x + KEPT * THREADS; at < pieces; at += THREADS) put(piece(at), at);
}
#endif
