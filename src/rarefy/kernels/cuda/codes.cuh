// Codes of weights: how they lie in memory and how they become operands of the tensor cores (m16n8k16 or wgmma).
//
// Macros, given at compile time (see program.py): BITS, GROUP (columns of a scale; 0: the whole row), STEP (columns that
// a warp takes at once), SPAN (neighbouring columns of a lane; 16: bytes, row by row as they are stored), FLOAT8 (a byte
// is a number in E4M3), TABLE (codes are looked up: SHARED by all, or BY_ROW), SCALE, ZERO (types), CENTER (what is
// subtracted from a code), SECOND_GROUPS (that share numbers of second order), RAGGED (the last step is not full of columns), HALF (float16 activations, else bfloat16),
// TILES (of 16 rows for a warp). THREADS: of a block.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

// PAIRS: instead of a scale, the two numbers that the codes 0 and 1 stand for. BILEVEL: codes of 4 bits of a scale and
// of a zero, with a step and a zero of their own for a tile of both; LEVEL: without the zero.
enum { SHARED = 1, BY_ROW = 2 };
enum { NONE = 0, F32 = 1, F16 = 2, BF16 = 3, U8 = 4, PAIRS = 5, BILEVEL = 6, LEVEL = 7 };

struct Arguments {
  const uint4* codes;   // [tiles][steps][LOADS][32], or bytes [rows][pitch]
  const void* scale;    // [tiles][groups][8][2]: rows g and g + 8 of a tile beside each other
  const void* zero;     // likewise
  const uint2* second;  // [tiles / second_rows][groups / SECOND_GROUPS], of BILEVEL and LEVEL: four float16
  const u32* table;     // SHARED: pairs of 16-bit numbers [1 << 2 * BITS]; BY_ROW: bytes [tiles][groups][8][2]
  const u16* x;         // [tokens][stride]
  u8* arranged;         // the same as gemm.cu wants it
  float* ones;          // and its sums by group
  u16* turned;          // and, for outliers, [token tiles][columns][WIDTH]
  float* extra;         // what outliers add there: [token tiles][rows][WIDTH]
  u16* y;               // [tokens][rows]
  float* partial;       // [SPLIT][tokens][rows]
  u32* arrived;         // [blocks], zero before and after
  const uint2* entries; // outliers [tiles][quads][32], see outliers.cuh
  const u32* rest;      // and those of long rows
  const u32* rest_ptr;  // [rows + 1], or null
  const float* squares; // sums of squares of the tokens' numbers, [tokens][parts]
  float* squared;       // those of what comes out, [tokens][rows / 16]
  u16* hidden;          // to which the result is added, [tokens][rows]
  const u16* gain;      // [rows]
  int rows, columns, steps, groups, tokens, stride, second_rows, pitch, parts, quads;
  float multiplier, eps;
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif
#include "float8.cuh"

shared_memory(pool);

constexpr int LOADS = STEP * BITS / 256;  // of 16 bytes, for a lane, tile and step
constexpr int BLOCKS = STEP / 16;         // of 16 columns
constexpr int PART = GROUP == 0 || GROUP > STEP ? BLOCKS : GROUP / 16;  // blocks that share a scale
constexpr int PARTS = BLOCKS / PART;
constexpr int TABLE_BYTES = TABLE == SHARED ? 128 << (2 * BITS) : 0;  // 32 copies: each lane has a bank to itself
constexpr int ENTRIES = TABLE == BY_ROW ? 1 << (BITS - 1) : 1;  // words of a row's table
constexpr u32 MAGIC = HALF ? 0x64006400u : 0x43004300u;  // 1024 or 128, twice: codes fit below their mantissas' ends
constexpr u32 MAGIC_VALUE = HALF ? 1024 : 128;
constexpr u32 ONES = HALF ? 0x3C003C00u : 0x3F803F80u;

// Minus a whole number below 256 (HALF: 2048) and 2 to the power n as 16-bit floats, twice.
device constexpr u32 minus(u32 number) {
  // Not counted in a loop, which the compiler has been seen to leave to the machine.
  const u32 exponent = (number > 1) + (number > 3) + (number > 7) + (number > 15) + (number > 31) + (number > 63) +
                       (number > 127) + (number > 255) + (number > 511) + (number > 1023);
  const u32 fraction = HALF ? number << 10 >> exponent & 1023 : number << 7 >> exponent & 127;
  return (0x8000u | (HALF ? 15 + exponent << 10 : 127 + exponent << 7) | fraction) * 0x10001u;
}
device constexpr u32 power(int n) { return u32(HALF ? 15 + n << 10 : 127 + n << 7) * 0x10001u; }

constexpr bool SUMS = ZERO != NONE || SCALE == PAIRS || SCALE == BILEVEL;  // whether activations are summed up too

// ---- Scales and zeros of rows g and g + 8.

template <int TYPE> struct Pair { u32 raw; };
template <> struct Pair<F32> { uint2 raw; };
template <> struct Pair<U8> { u16 raw; };
template <> struct Pair<NONE> {};
template <> struct Pair<PAIRS> { uint2 raw; };
template <> struct Pair<BILEVEL> { u32 raw; uint2 second; };
template <> struct Pair<LEVEL> { u32 raw; uint2 second; };

// STORED: weights are in shared memory (stored.cuh).
template <class Words> device Words load_weights(const Words* from) {
  if constexpr (STORED) return *from;
  else return load_once(from);
}
device u32 load_widened_weights(const u16* from) {
  if constexpr (STORED) return *from;
  else return load_once_widened(from);
}

template <int TYPE> device void load(Pair<TYPE>& pair, const void* base, i64 index, const uint2* second, i64 group) {
  if constexpr (TYPE == F32 || TYPE == PAIRS) {
    pair.raw = load_weights(static_cast<const uint2*>(base) + index);
  } else if constexpr (TYPE == BILEVEL || TYPE == LEVEL) {
    pair.raw = load_widened_weights(static_cast<const u16*>(base) + index);
    pair.second = load_weights(second + group);
  } else if constexpr (TYPE == U8) {
    pair.raw = load_weights(static_cast<const u16*>(base) + index);
  } else if constexpr (TYPE != NONE) {
    pair.raw = load_weights(static_cast<const u32*>(base) + index);
  }
}

device float half_of(u32 word, int which) { return half_value(u16(which ? word >> 16 : word)); }

template <int TYPE> device float number(const Pair<TYPE>& pair, int which) {
  if constexpr (TYPE == F32) return as_float(which ? pair.raw.y : pair.raw.x);
  else if constexpr (TYPE == U8) return float(which ? pair.raw >> 8 : pair.raw & 255);
  else if constexpr (TYPE == F16) return half_of(pair.raw, which);
  else if constexpr (TYPE == BF16) return as_float(which ? pair.raw & 0xFFFF0000u : pair.raw << 16);
  else if constexpr (TYPE == BILEVEL || TYPE == LEVEL)
    return half_of(pair.second.x, 0) * (float(pair.raw >> 8 * which & 15) - half_of(pair.second.x, 1));
  else return 1.0f;
}

// What one group adds to the sum of a row: `part` over (code - CENTER) * x, `ones` over x.
template <class S, class Z> device float contribution(const S& scale, const Z& zero, int which, float part, float ones) {
  if constexpr (SCALE == PAIRS) {
    const u32 values = which ? scale.raw.y : scale.raw.x;
    const float first = half_of(values, 0);
    return first * ones + (half_of(values, 1) - first) * part;
  } else {
    if constexpr (SCALE == BILEVEL)
      part += (CENTER - half_of(scale.second.y, 0) * (float(scale.raw >> (8 * which + 4) & 15) - half_of(scale.second.y, 1))) * ones;
    else if constexpr (ZERO != NONE) part += (CENTER - number(zero, which)) * ones;
    return number(scale, which) * part;
  }
}

// A word whose bit `from` is to be bit `to`.
device u32 moved(u32 word, int from, int to) { return from < to ? word << (to - from) : word >> (from - to); }

// Two levels where groups are small: what the rows of a tile have in common is formed once, and a code in the mantissa of
// 16 is a number of which that takes 16 off.
struct Levels { float scale_step, minus_scale, zero_step, zero; };

device Levels levels_of(const uint2& second, float unit = 1.0f) {
  const float scale_step = half_of(second.x, 0), zero_step = half_of(second.y, 0) * unit;
  return {scale_step, -scale_step * (16.0f + half_of(second.x, 1)), zero_step, zero_step * (16.0f + half_of(second.y, 1))};
}
device float above_16(u32 raw, int place) { return as_float(chosen(moved(raw, place, 19), 15u << 19, 0x41800000u)); }

// As `contribution`, of row g or g + 8.
device float contribution_of(const Levels& levels, u32 raw, int which, float part, float ones) {
  if constexpr (SCALE == BILEVEL) part += (levels.zero - levels.zero_step * above_16(raw, 8 * which + 4)) * ones;
  return (levels.scale_step * above_16(raw, 8 * which) + levels.minus_scale) * part;
}

// The same of rows g and g + 8 as `slope * (part + zero * ones)`, for ones that are counted in `unit`.
struct Line { float slope, zero; };

template <class S, class Z> device void lines_of(Line (&lines)[2], const S& scale, const Z& zero, float unit) {
  Levels levels;
  if constexpr (SCALE == BILEVEL || SCALE == LEVEL) levels = levels_of(scale.second, unit);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    Line& line = lines[which];
    line.zero = 0.0f;
    if constexpr (SCALE == BILEVEL || SCALE == LEVEL) {
      line.slope = levels.scale_step * above_16(scale.raw, 8 * which) + levels.minus_scale;
      if constexpr (SCALE == BILEVEL) line.zero = levels.zero - levels.zero_step * above_16(scale.raw, 8 * which + 4);
    } else {
      line.slope = number(scale, which);
      if constexpr (ZERO != NONE) line.zero = (CENTER - number(zero, which)) * unit;
    }
  }
}

// ---- From codes to operands.

// Two of the four bytes of one row.
device u32 bytes_as_numbers(u32 word, int pair) {
  if constexpr (FLOAT8) {
    return numbers_of_float8(word, pair);
  } else if constexpr (HALF) {
    return fused(permuted(word, MAGIC, pair ? 0x5352 : 0x5150), ONES, minus(MAGIC_VALUE + CENTER));
  } else {
    const float low = as_float(permuted(word, 0x4B000000u, pair ? 0x7442 : 0x7440)) - (8388608.0f + CENTER);
    const float high = as_float(permuted(word, 0x4B000000u, pair ? 0x7443 : 0x7441)) - (8388608.0f + CENTER);
    return bf16_pair(low, high);
  }
}

// Where pair i of block b lies in a 16-bit half of its word, of the places that a mantissa has room for (codes of up to
// four bits, three bits: but for the sixteenth pair, which is put together).
constexpr int MANTISSA = HALF ? 10 : 7, PLACES = BITS > MANTISSA ? 1 : MANTISSA / BITS;
device constexpr int pair_of(int b, int i) {
  return BITS == 4 ? i : BITS == 2 ? 4 * (b % 2) + i : BITS == 1 ? 2 * (b % 8) + i / 2 : 4 * (b % 4) + i;
}
device constexpr int place_of(int b, int i) {
  const int pair = pair_of(b, i);
  return BITS == 3 && pair == 15 ? 0 : BITS * ((BITS == 3 ? pair % 5 : pair) % PLACES);
}

// A code can stay in a mantissa if its power of two is such that the code counts what it is: the number is then more by
// that power. It is the same for all rows, so that what is too much in the sums, with the code that means zero, is formed
// but once.
constexpr int LIFTS = BITS == 4 ? 1 : BITS == 2 ? 2 : BITS == 1 ? 8 : 4;  // blocks that are so far apart are lifted alike
device constexpr u32 minus_lift_of(int b, int i) { return minus((1u << (MANTISSA - place_of(b, i))) + CENTER); }

// Or every code is shifted to the end of its mantissa: then what is too much says how much ones would be.
enum { LOWERED = 0, LIFTED = 1, LIFTED_ALIKE = 2 };
constexpr u32 MINUS_ALIKE = minus(MAGIC_VALUE + CENTER);

// The 16-bit numbers of pair i (0..3) of block b, LIFTED by minus `minus_lift_of` of the same pair. Both codes of a pair lie at the
// same place of a word's two halves, or for a table beside each other, so that together they are one index.
template <int LIFT_ = LOWERED> device u32 operand(const u32* words, int b, int i, u32 bank) {
  if constexpr (TABLE == SHARED) {
    // Copies of an entry fill 128 bytes, so an index is wanted seven bits up; `bank` is the lane's place among them.
    constexpr u32 MASK = ((1u << 2 * BITS) - 1) << 7;
    constexpr int PAIRS = BITS == 3 ? 5 : 16 / BITS;  // in a word
    const int pair = BITS == 3 ? 4 * (b % 4) + i : 4 * b + i;
    const u32* own = words + (BITS == 3 ? 3 * (b / 4) : 0);
    u32 index;
    if (BITS == 3 && pair == 15) {
      index = (own[0] >> 30 | own[1] >> 30 << 2 | own[2] >> 30 << 4) << 7;
    } else {
      const int place = 2 * BITS * (pair % PAIRS);
      index = place < 7 ? own[pair / PAIRS] << (7 - place) : own[pair / PAIRS] >> (place - 7);
    }
    return *reinterpret_cast<const u32*>(pool + chosen(index, MASK, bank));
  } else if constexpr (BITS == 8) {
    return bytes_as_numbers(words[2 * b + i / 2], i % 2);
  } else if constexpr (BITS > 4) {
    // Words of the low four bits, of the next two, of the last one: put together below the mantissa's end.
    u32 found = chosen(words[b] >> 4 * i, 0x000F000Fu, MAGIC);
    const u32* rest = words + BLOCKS;
    if constexpr (BITS > 5) {
      const int place = 2 * (4 * (b % 2) + i);
      found = chosen(moved(rest[b / 2], place, 4), 0x00300030u, found);
      rest += BLOCKS / 2;
    }
    if constexpr (BITS % 2 == 1) found = chosen(moved(rest[b / 4], 4 * (b % 4) + i, BITS - 1), 0x10001u << (BITS - 1), found);
    return fused(found, ONES, minus(MAGIC_VALUE + CENTER));
  } else {
    // Places of a 16-bit half that lie below the mantissa's end need no shift: the product takes their factor out.
    constexpr u32 MASK = ((1u << BITS) - 1) * 0x10001u;
    const int pair = pair_of(b, i), place = LIFT_ == LIFTED_ALIKE ? 0 : place_of(b, i);
    u32 found;
    if (BITS == 3 && pair == 15) {
      const u32* own = words + 3 * (b / 4);
      found = (own[0] >> 15 & 0x10001u) | (own[1] >> 14 & 0x20002u) | (own[2] >> 13 & 0x40004u) | MAGIC;
    } else {
      const u32 word = words[BITS == 4 ? b : BITS == 2 ? b / 2 : BITS == 3 ? 3 * (b / 4) + pair / 5 : 2 * (b / 8) + i % 2];
      const int own = BITS == 3 ? pair % 5 : pair;
      found = LIFT_ == LIFTED_ALIKE ? chosen(word >> BITS * own, MASK, MAGIC)
                                    : chosen(word >> BITS * (own / PLACES * PLACES), MASK << place, LIFT_ ? power(MANTISSA - place) : MAGIC);
    }
    return LIFT_ ? found : fused(found, power(-place), minus((MAGIC_VALUE >> place) + CENTER));
  }
}

// The table to the start of shared memory, an entry's copies in an order that keeps threads in different banks.
device void copy_table(const Arguments& a) {
  for (int entry = threadIdx.x; entry < 1 << (2 * BITS); entry += THREADS) {
    const u32 word = a.table[entry];
    uint4* copies = reinterpret_cast<uint4*>(pool) + 8 * entry;
#pragma unroll
    for (int n = 0; n < 8; ++n) copies[(n + entry) % 8] = {word, word, word, word};
  }
}

// Tables of the rows g and g + 8: of all entries the low bytes, then the high ones.
struct Tables { u32 at[2][ENTRIES]; };

device void load(Tables& tables, const Arguments& a, i64 tile, int group, int g) {
  if constexpr (TABLE == BY_ROW) {
    const uint4* from = reinterpret_cast<const uint4*>(a.table) + ((tile * a.groups + group) * 8 + g) * (ENTRIES / 2);
#pragma unroll
    for (int n = 0; n < ENTRIES / 2; ++n) {
      const uint4 all = load_shared_by_all(from + n, true);
      u32* to = tables.at[n * 4 / ENTRIES] + n * 4 % ENTRIES;
      to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    }
  }
}

// The four operands of block b (lifted: see above). A byte permutation looks up four codes among eight bytes.
template <int LIFT_ = LOWERED> device void operands(u32 (&weights)[4], const u32* words, int b, u32 bank, const Tables& tables) {
  if constexpr (TABLE == BY_ROW) {
    u32 codes, halves = 0;
    if constexpr (BITS == 4) {
      codes = words[b];
      halves = chosen(codes >> 1, 0x44444444u, 0x32103210u);  // which eight of sixteen
    } else {
      const u32* own = words + 3 * (b / 4);
      codes = b % 4 < 3 ? own[b % 4]
                        : chosen(own[0] >> 3, 0x11111111u, chosen(own[1] >> 2, 0x22222222u, own[2] >> 1 & 0x44444444u));
    }
    codes &= 0x77777777u;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const u32* own = tables.at[which];
      u32 found[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const u32* bytes = own + part * ENTRIES / 2;
        found[part] = permuted(bytes[0], bytes[1], codes >> 16 * which);
        if constexpr (BITS == 4)
          found[part] = permuted(found[part], permuted(bytes[2], bytes[3], codes >> 16 * which), halves >> 16 * which);
      }
      weights[which] = permuted(found[0], found[1], 0x5140);
      weights[which + 2] = permuted(found[0], found[1], 0x7362);
    }
  } else if constexpr (SPAN == 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = bytes_as_numbers(words[4 * (b / 4 * 2 + i % 2) + b % 4], i / 2);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = operand<LIFT_>(words, b, i, bank);
  }
}

// The first column of a lane in a pair of blocks.
device int first_of(int pair, int t) {
  return SPAN == 16 ? pair / 2 * 64 + 16 * t + pair % 2 * 8 : 32 * pair + SPAN * t;
}

// ---- Which steps are a block's.

struct Share { int begin, end; };

device Share share_of(const Arguments& a) {
  const int each = (a.steps + SPLIT - 1) / SPLIT, begin = blockIdx.y * each;
  return {begin, begin + each < a.steps ? begin + each : a.steps};
}

// ---- What a warp needs of one step.

device i64 tile_of(const Arguments& a, int tile) {
  const int tiles = (a.rows + 15) / 16;
  return tile < tiles ? tile : tiles - 1;
}

device int group_of(const Arguments& a, int step, int part) {
  const int group = GROUP == 0 ? 0 : GROUP > STEP ? step / (GROUP > STEP ? GROUP / STEP : 1) : step * PARTS + part;
  return !RAGGED || group < a.groups ? group : a.groups - 1;  // columns that fill up the last step
}

// Where a lane's codes of a tile begin: its first 16 bytes, or those of its row g or g + 8. Rows and tokens beyond the
// last are the last again; nobody asks for their results.
device const uint4* codes_of(const Arguments& a, i64 tile, int lane, int which) {
  if constexpr (SPAN != 16) return a.codes + tile * a.steps * LOADS * 32 + lane;
  const i64 row = tile * 16 + lane / 4 + 8 * which;
  return a.codes + ((row < a.rows ? row : a.rows - 1) * a.pitch + lane % 4 * 16) / 16;
}

// From there a step's loads.
device const uint4* of_step(const uint4* codes, int step) { return codes + i64(step) * (SPAN == 16 ? STEP / 16 : LOADS * 32); }
device constexpr int load_at(int load) { return SPAN == 16 ? load / 2 * 4 : load * 32; }

// Whether a row still has those bytes.
device bool has_bytes(const Arguments& a, int step, int load, int lane) {
  return SPAN != 16 || !RAGGED || step * STEP + load / 2 * 64 + lane % 4 * 16 < a.pitch;
}

// A warp's places in memory, from which steps are counted.
struct Places {
  const uint4* codes[TILES][SPAN == 16 ? 2 : 1];
  i64 scales[TILES];
  const uint2* second[TILES];
};

// `apart`: from one tile of the warp to its next.
device Places places_of(const Arguments& a, int first_tile, int lane, int apart = 1) {
  Places found;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const i64 tile = tile_of(a, first_tile + apart * r);
#pragma unroll
    for (int which = 0; which < (SPAN == 16 ? 2 : 1); ++which) {
      found.codes[r][which] = codes_of(a, tile, lane, which);
      keep(found.codes[r][which]);
    }
    found.scales[r] = tile * a.groups * 8 + lane / 4;
    keep(found.scales[r]);
    if constexpr (SCALE == BILEVEL || SCALE == LEVEL)
      found.second[r] = a.second + (a.second_rows == 1 ? tile : int(tile) / a.second_rows) * ((a.groups + SECOND_GROUPS - 1) / SECOND_GROUPS);
  }
  return found;
}

// Tables of whole rows, once for all steps.
device void load_tables(Tables (&tables)[TILES], const Arguments& a, int first_tile, int g, int apart = 1) {
#pragma unroll
  for (int r = 0; r < (GROUP == 0 ? TILES : 0); ++r) load(tables[r], a, tile_of(a, first_tile + apart * r), 0, g);
}

struct Codes { u32 at[TILES][4 * LOADS]; };

device void put(Codes& codes, int tile, int load, const uint4& words) {
  u32* to = codes.at[tile] + 4 * load;
  to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
}

device void fetch(Codes& codes, const Arguments& a, const Places& places, int step, int lane) {
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int l = 0; l < LOADS; ++l) {
      const uint4* from = of_step(places.codes[r][SPAN == 16 ? l % 2 : 0], step) + load_at(l);
      if constexpr (SPAN == 16 && RAGGED) put(codes, r, l, load_once(from, has_bytes(a, step, l, lane)));
      else put(codes, r, l, load_weights(from));
    }
}

struct Scales {
  Pair<SCALE> scale[TILES][PARTS];
  Pair<ZERO> zero[TILES][PARTS];
};

device void fetch(Scales& scales, const Arguments& a, const Places& places, int step, int lane) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    const int group = group_of(a, step, p), above = group / SECOND_GROUPS;
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      load(scales.scale[r][p], a.scale, places.scales[r] + i64(group) * 8, places.second[r], above);
      load(scales.zero[r][p], a.zero, places.scales[r] + i64(group) * 8, places.second[r], above);
    }
  }
}

// ---- Where warps meet: their sums in shared memory, `pitch` numbers from a token to the next.

device void put_sums(float* meeting, const float (&sums)[TILES][TOKENS][4], int pitch, int first_row, int apart, int lane) {
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        meeting[(8 * n + lane % 4 * 2 + j % 2) * pitch + first_row + 16 * apart * r + lane / 4 + j / 2 * 8] = sums[r][n][j];
}
