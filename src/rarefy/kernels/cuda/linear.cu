// Y[token][row] = sum over columns of X[token][column] * W[row][column], W in code, on tensor cores (mma.m16n8k16).
//
// Weights are the 16-row side of the product, so that a token costs an eighth of a tile and codes become operands in
// the registers they were loaded into: layout.py stores them in the order in which a warp's lanes want them. A code is
// turned into a small whole number by putting it into the mantissa of a power of two and subtracting; scales and zeros
// enter afterwards, on float32 sums over a group, so no weight is ever rounded to 16 bits.
//
// The macros below are given at compile time (see tuning.py for what is chosen when).
//   BITS, GROUP (columns of a scale; 0: the whole row), STEP (columns that a warp takes at once), SPAN (neighbouring
//   columns of a lane; 16: bytes, row by row as they are stored), FLOAT8 (a byte is a number in E4M3), TABLE (codes are looked up: SHARED by all, or BY_ROW), SCALE, ZERO (types), CENTER (what is subtracted from a code),
//   RAGGED (the last step is not full of columns), OUTLIERS (type of single values that are added to the weight), HALF (float16 activations, else bfloat16),
//   TILES (of 16 rows for a warp), TOKENS (of 8 tokens), ACROSS (warps over rows), ALONG (warps over columns),
//   DEPTH (steps loaded ahead into registers), STAGED (codes and activations go through shared memory instead, STAGES
//   steps of them), WIDE (four warps multiply together, wgmma, which takes tokens from shared memory; compute capability
//   9.0 only), SPLIT (blocks over columns)

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
  const uint2* second;  // [tiles / second_rows][groups / second_groups], of BILEVEL and LEVEL: four float16
  const u32* table;     // SHARED: pairs of 16-bit numbers [1 << 2 * BITS]; BY_ROW: bytes [tiles][groups][8][2]
  const u16* x;         // [tokens][stride]
  u16* y;               // [tokens][rows]
  float* partial;       // [SPLIT][tokens][rows]
  u32* arrived;         // [blocks], zero before and after
  const u32* entries;   // outliers by row: a 16-bit value above its column
  const u32* row_ptr;   // [rows + 1]
  int rows, columns, steps, groups, tokens, stride, second_rows, second_groups, pitch;
  float multiplier;
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

shared_memory(pool);

constexpr int LOADS = STEP * BITS / 256;  // of 16 bytes, for a lane, tile and step
constexpr int BLOCKS = STEP / 16;         // of 16 columns
constexpr int PART = GROUP == 0 || GROUP > STEP ? BLOCKS : GROUP / 16;  // blocks that share a scale
constexpr int PARTS = BLOCKS / PART;
constexpr int THREADS = 32 * ACROSS * ALONG;
constexpr bool TWO_BLOCKS = WIDE && TILES * TOKENS <= 8 && THREADS <= 256;  // for one to load while one multiplies
constexpr int ROWS = 16 * TILES * ACROSS, COLUMNS = STEP * ALONG, WIDTH = 8 * TOKENS;
constexpr int PITCH = 2 * COLUMNS + (SPAN == 16 ? 16 : 64);  // bytes of a staged token; the rest keeps banks apart
// WIDE: tokens lie in pieces of 8 columns x 8 tokens, the columns in the order of the operands; between neighbours along
// the columns there are LEADING bytes, whose last 16 keep banks apart.
constexpr int LEADING = WIDTH * 16 + 16;
constexpr int STAGE_TOKENS = WIDE ? ALONG * STEP / 8 * LEADING : WIDTH * PITCH;  // bytes
constexpr int STAGE_CODES = STAGED ? ROWS / 16 * ALONG * LOADS * 512 : 0;  // bytes
constexpr int STAGE = STAGE_TOKENS + STAGE_CODES;
constexpr int SUM_PITCH = ROWS + 4;
constexpr int TABLE_BYTES = TABLE == SHARED ? 128 << (2 * BITS) : 0;  // 32 copies: each lane has a bank to itself
constexpr int ENTRIES = TABLE == BY_ROW ? 1 << (BITS - 1) : 1;  // words of a row's table
constexpr u32 MAGIC = HALF ? 0x64006400u : 0x43004300u;  // 1024 or 128, twice: codes fit below their mantissas' ends
constexpr u32 MAGIC_VALUE = HALF ? 1024 : 128;
constexpr u32 ONES = HALF ? 0x3C003C00u : 0x3F803F80u;

// Minus a whole number below 256 (HALF: 2048) and 2 to the power n as 16-bit floats, twice.
device constexpr u32 minus(u32 number) {
  u32 exponent = 0;
  while (number >> (exponent + 1)) ++exponent;
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
template <> struct Pair<BILEVEL> { u16 raw; uint2 second; };
template <> struct Pair<LEVEL> { u16 raw; uint2 second; };

template <int TYPE> device void load(Pair<TYPE>& pair, const void* base, i64 index, const uint2* second, int group) {
  if constexpr (TYPE == F32 || TYPE == PAIRS) {
    pair.raw = load_once(static_cast<const uint2*>(base) + index);
  } else if constexpr (TYPE == BILEVEL || TYPE == LEVEL) {
    pair.raw = load_once(static_cast<const u16*>(base) + index);
    pair.second = load_once(second + group);
  } else if constexpr (TYPE == U8) {
    pair.raw = load_once(static_cast<const u16*>(base) + index);
  } else if constexpr (TYPE != NONE) {
    pair.raw = load_once(static_cast<const u32*>(base) + index);
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

// ---- From codes to operands.

// Two of the four bytes of one row.
device u32 bytes_as_numbers(u32 word, int pair) {
  if constexpr (FLOAT8) {
    const u32 high = permuted(word, 0, pair ? 0x3424 : 0x1404);  // exponents differ by a constant
    return fused(chosen(high >> (HALF ? 1 : 4), HALF ? 0x3F803F80u : 0x07F007F0u, high & 0x80008000u), power(HALF ? 8 : 120), 0x80008000u);
  } else if constexpr (HALF) {
    return fused(permuted(word, MAGIC, pair ? 0x5352 : 0x5150), ONES, minus(MAGIC_VALUE + CENTER));
  } else {
    const float low = as_float(permuted(word, 0x4B000000u, pair ? 0x7442 : 0x7440)) - (8388608.0f + CENTER);
    const float high = as_float(permuted(word, 0x4B000000u, pair ? 0x7443 : 0x7441)) - (8388608.0f + CENTER);
    return bf16_pair(low, high);
  }
}

// A word whose bit `from` is to be bit `to`.
device u32 moved(u32 word, int from, int to) { return from < to ? word << (to - from) : word >> (from - to); }

// The 16-bit numbers of pair i (0..3) of block b. Both codes of a pair lie at the same place of a word's two halves, or
// for a table beside each other, so that together they are one index.
device u32 operand(const u32* words, int b, int i, u32 bank) {
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
    constexpr int PLACES = (HALF ? 10 : 7) / BITS;
    constexpr u32 MASK = ((1u << BITS) - 1) * 0x10001u;
    u32 found;
    int place = 0;
    const int pair = BITS == 4 ? i : BITS == 2 ? 4 * (b % 2) + i : 4 * (b % 4) + i;
    if (BITS == 3 && pair == 15) {
      const u32* own = words + 3 * (b / 4);
      found = (own[0] >> 15 & 0x10001u) | (own[1] >> 14 & 0x20002u) | (own[2] >> 13 & 0x40004u) | MAGIC;
    } else {
      const u32 word = words[BITS == 4 ? b : BITS == 2 ? b / 2 : BITS == 3 ? 3 * (b / 4) + pair / 5 : b / 4];
      const int own = BITS == 3 ? pair % 5 : pair;
      place = BITS * (own % PLACES);
      found = chosen(word >> BITS * (own / PLACES * PLACES), MASK << place, MAGIC);
    }
    return fused(found, power(-place), minus((MAGIC_VALUE >> place) + CENTER));
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

// The four operands of block b. A byte permutation looks up four codes among eight bytes.
device void operands(u32 (&weights)[4], const u32* words, int b, u32 bank, const Tables& tables) {
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
    for (int i = 0; i < 4; ++i) weights[i] = operand(words, b, i, bank);
  }
}

// ---- Activations: four words of one token for two blocks.

struct Words { u32 at[4]; };

// The first column of a lane in a pair of blocks.
device int first_of(int pair, int t) {
  return SPAN == 16 ? pair / 2 * 64 + 16 * t + pair % 2 * 8 : 32 * pair + SPAN * t;
}

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

device Places places_of(const Arguments& a, int first_tile, int lane) {
  Places found;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const i64 tile = tile_of(a, first_tile + r);
#pragma unroll
    for (int which = 0; which < (SPAN == 16 ? 2 : 1); ++which) {
      found.codes[r][which] = codes_of(a, tile, lane, which);
      keep(found.codes[r][which]);
    }
    found.scales[r] = tile * a.groups * 8 + lane / 4;
    keep(found.scales[r]);
    if constexpr (SCALE == BILEVEL || SCALE == LEVEL)
      found.second[r] = a.second + tile / a.second_rows * ((a.groups + a.second_groups - 1) / a.second_groups);
  }
  return found;
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
      else put(codes, r, l, load_once(from));
    }
}

struct Scales {
  Pair<SCALE> scale[TILES][PARTS];
  Pair<ZERO> zero[TILES][PARTS];
};

device void fetch(Scales& scales, const Arguments& a, const Places& places, int step) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    const int group = group_of(a, step, p), above = a.second_groups == 1 ? group : group / a.second_groups;
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      load(scales.scale[r][p], a.scale, places.scales[r] + i64(group) * 8, places.second[r], above);
      load(scales.zero[r][p], a.zero, places.scales[r] + i64(group) * 8, places.second[r], above);
    }
  }
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

// Adds the product of one step to `sums`; `tokens(n, pair)` answers with the words of eight tokens.
template <class Tokens>
device void multiply_step(
    float (&sums)[TILES][TOKENS][4], const Codes& codes, const Scales& scales, const Tokens& tokens,
    Tables (&tables)[TILES], const Arguments& a, int first_tile, int step, int lane) {
  float part[TILES][TOKENS][4], ones[TOKENS][4];
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
          ones[n][j] = 0.0f;
#pragma unroll
          for (int r = 0; r < TILES; ++r) part[r][n][j] = 0.0f;
        }
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      u32 weights[4];
      if (GROUP != 0 && b % PART == 0)
        load(tables[r], a, tile_of(a, first_tile + r), group_of(a, step, b / PART), lane / 4);
      operands(weights, codes.at[r], b, 4 * lane, tables[r]);
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) multiply(part[r][n], weights, x[n].at[2 * (b % 2)], x[n].at[2 * (b % 2) + 1]);
    }
    if constexpr (SUMS) {
      const u32 weights[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) multiply(ones[n], weights, x[n].at[2 * (b % 2)], x[n].at[2 * (b % 2) + 1]);
    }
    if (b % PART == PART - 1) {
#pragma unroll
      for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int n = 0; n < TOKENS; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[r][n][j] += contribution(
                scales.scale[r][b / PART], scales.zero[r][b / PART], j / 2, part[r][n][j], ones[n][j]);
    }
  }
}

// The same with four warps at once and tokens from shared memory.
device void multiply_step_wide(
    float (&sums)[TILES][TOKENS][4], const Codes& codes, const Scales& scales, const u8* tokens, Tables (&tables)[TILES],
    const Arguments& a, int first_tile, int step, int lane) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    u32 weights[TILES][PART][4];
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      if (GROUP != 0) load(tables[r], a, tile_of(a, first_tile + r), group_of(a, step, p), lane / 4);
#pragma unroll
      for (int b = 0; b < PART; ++b) {
        operands(weights[r][b], codes.at[r], p * PART + b, 4 * lane, tables[r]);
#pragma unroll
        for (int i = 0; i < 4; ++i) settle(weights[r][b][i]);
      }
    }
    float part[TILES][TOKENS][4], ones[TOKENS][4];
    begin_wide();
#pragma unroll
    for (int b = 0; b < PART; ++b) {
      const u8* block = tokens + (p * PART + b) * 2 * LEADING;
#pragma unroll
      for (int r = 0; r < TILES; ++r) multiply_wide<TOKENS>(part[r], weights[r][b], block, LEADING, b > 0);
      if constexpr (SUMS) {
        const u32 constant[4] = {ONES, ONES, ONES, ONES};
        multiply_wide<TOKENS>(ones, constant, block, LEADING, b > 0);
      }
    }
    end_wide();
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          settle(part[r][n][j]);
          if constexpr (SUMS) settle(ones[n][j]);
          sums[r][n][j] += contribution(
              scales.scale[r][p], scales.zero[r][p], j / 2, part[r][n][j], SUMS ? ones[n][j] : 0.0f);
        }
  }
}

// ---- Outliers: eight lanes a row, each with every eighth entry; the block's first share of columns takes them all.

constexpr int TURNS = (ROWS * 8 + THREADS - 1) / THREADS;
constexpr int EXTRA = OUTLIERS != NONE ? TURNS * WIDTH : 1;

device void add_outliers(float (&extra)[EXTRA], const Arguments& a, int first_row, int first_token) {
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int row = first_row + (turn * THREADS + threadIdx.x) / 8;
    float* own = extra + turn * WIDTH;
#pragma unroll
    for (int n = 0; n < WIDTH; ++n) own[n] = 0.0f;
    const bool real = row < a.rows && row < first_row + ROWS && blockIdx.y == 0;
    const u32 end = real ? a.row_ptr[row + 1] : 0;
    for (u32 at = (real ? a.row_ptr[row] : 0) + threadIdx.x % 8; at < end; at += 8) {
      const u32 entry = load_once(a.entries + at);
      const float value = OUTLIERS == F16 ? half_value(u16(entry >> 16)) : as_float(entry & 0xFFFF0000u);
      const u16* x = a.x + i64(first_token) * a.stride + (entry & 0xFFFF);
#pragma unroll
      for (int n = 0; n < WIDTH; ++n)
        if (first_token + n < a.tokens) own[n] += value * widened(x[i64(n) * a.stride]);
    }
#pragma unroll
    for (int n = 0; n < WIDTH; ++n) own[n] = sum_of_eight(own[n]);
  }
}

device void leave_outliers(const float (&extra)[EXTRA], float* meeting) {
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int row = (turn * THREADS + threadIdx.x) / 8;
    if (row >= ROWS || threadIdx.x % 8) continue;
#pragma unroll
    for (int n = 0; n < WIDTH; ++n) meeting[n * SUM_PITCH + row] = extra[turn * WIDTH + n];
  }
}

extern "C" global __launch_bounds__(THREADS, TWO_BLOCKS ? 2 : 1) void rarefy_linear(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = warp % ACROSS, along = warp / ACROSS, g = lane / 4, t = lane % 4;
  const int first_tile = (blockIdx.x * ACROSS + across) * TILES;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.z * WIDTH;
  const int share = (a.steps + SPLIT - 1) / SPLIT;
  const int begin = blockIdx.y * share, end = begin + share < a.steps ? begin + share : a.steps;
  const int rounds = end > begin ? (end - begin + ALONG - 1) / ALONG : 0;
  u8* stages = pool + TABLE_BYTES;

  const Places places = places_of(a, first_tile, lane);
  const auto step_at = [&](int round) { return begin + round * ALONG + along; };

  // What the weights are is on its way before anything is waited for.
  Codes codes[DEPTH];
  Scales scales[DEPTH];
  const auto stage_codes = [&](int round) {
    u8* target = stages + round % STAGES * STAGE + STAGE_TOKENS;
    for (int n = threadIdx.x; round < rounds && n < STAGE_CODES / 16; n += THREADS) {
      const int tile = n / (ALONG * LOADS * 32), step = n / (LOADS * 32) % ALONG, load = n / 32 % LOADS;
      const int at = begin + round * ALONG + step;
      const bool real = at < end && has_bytes(a, at, load, n % 32);
      const uint4* from = codes_of(a, tile_of(a, blockIdx.x * TILES * ACROSS + tile), n % 32, load % 2);
      copy_async(target + 16 * n, real ? of_step(from, at) + load_at(load) : a.codes, real);
    }
  };
  if constexpr (STAGED) {
    for (int round = 0; round < STAGES - 1; ++round) stage_codes(round);
    if (step_at(0) < end) fetch(scales[0], a, places, step_at(0));
  } else {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
      if (step_at(d) < end) {
        fetch(codes[d], a, places, step_at(d), lane);
        fetch(scales[d], a, places, step_at(d));
      }
  }

  if constexpr (TABLE == SHARED) {
    copy_table(a);
    block_barrier();
  }
  Tables tables[TILES];
  if constexpr (GROUP == 0) {
#pragma unroll
    for (int r = 0; r < TILES; ++r) load(tables[r], a, tile_of(a, first_tile + r), 0, g);
  }
  wait_for_earlier_kernels();  // weights never depend on them
  float extra[EXTRA];
  if constexpr (OUTLIERS != NONE) add_outliers(extra, a, first_row, first_token);

  float sums[TILES][TOKENS][4] = {};
  if constexpr (STAGED) {
    constexpr int UNIT = WIDE ? 2 : 8, UNITS = COLUMNS / UNIT;  // columns of a copy, copies of a token
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
        // Of wide steps: the pair of columns that a lane t of block b multiplies first or second.
        const int own = unit % (STEP / 2), b = own / (2 * SPAN) * (SPAN / 4) + own % (SPAN / 2) / 2;
        const int piece = unit / (STEP / 2) * (STEP / 8) + 2 * b + own % 2, t = own % (2 * SPAN) / (SPAN / 2);
        u8* to = threadIdx.x / AT_ONCE * (WIDE ? 16 : PITCH) + (WIDE ? target + piece * LEADING + 4 * t : target + 2 * unit * UNIT);
        const u16* from = a.x + (real ? column : 0);
#pragma unroll
        for (int n = 0; n < TURNS_OF_TOKENS; ++n) {
          if (WIDTH % APART != 0 && threadIdx.x / AT_ONCE + n * APART >= WIDTH) break;
          if constexpr (WIDE) copy_word_async(to + n * APART * 16, from + offsets[n], real);
          else copy_async(to + n * APART * PITCH, from + offsets[n], real);
        }
      }
      commit_copies();
    };
    for (int round = 0; round < STAGES - 1; ++round) stage_tokens(round);
    for (int round = 0; round < rounds; ++round) {
      wait_for_copies<STAGES - 2>();
      if constexpr (WIDE) show_copies();
      block_barrier();
      stage_codes(round + STAGES - 1);
      stage_tokens(round + STAGES - 1);
      if (step_at(round) >= end) continue;
      const Scales now = scales[0];
      if (step_at(round + 1) < end) fetch(scales[0], a, places, step_at(round + 1));
      const u8* stage = stages + round % STAGES * STAGE;
#pragma unroll
      for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int l = 0; l < LOADS; ++l) {
          const int place = (((across * TILES + r) * ALONG + along) * LOADS + l) * 32 + lane;
          put(codes[0], r, l, reinterpret_cast<const uint4*>(stage + STAGE_TOKENS)[place]);
        }
      if constexpr (WIDE) {
        const u8* own = stage + along * (STEP / 8) * LEADING;
        multiply_step_wide(sums, codes[0], now, own, tables, a, first_tile, step_at(round), lane);
      } else {
        const u8* own = stage + g * PITCH + along * STEP * 2;
        const auto tokens = [&](int n, int pair) { return columns_of(own + 8 * n * PITCH, pair, t); };
        multiply_step(sums, codes[0], now, tokens, tables, a, first_tile, step_at(round), lane);
      }
    }
  } else {
    const u8* token_rows[TOKENS];
#pragma unroll
    for (int n = 0; n < TOKENS; ++n) {
      const int token = first_token + 8 * n + g;
      const u16* row = a.x + i64(token < a.tokens ? token : a.tokens - 1) * a.stride;
      token_rows[n] = reinterpret_cast<const u8*>(row + first_of(0, t));
      keep(token_rows[n]);
    }
    Activations x[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
      if (step_at(d) < end) fetch(x[d], a, token_rows, step_at(d), t);
    for (int base = 0; base < rounds; base += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        if (step_at(base + d) >= end) break;
        const auto tokens = [&](int n, int pair) { return x[d].at[n][pair]; };
        multiply_step(sums, codes[d], scales[d], tokens, tables, a, first_tile, step_at(base + d), lane);
        const int next = step_at(base + d + DEPTH);
        if (next < end) {
          fetch(codes[d], a, places, next, lane);
          fetch(scales[d], a, places, next);
          fetch(x[d], a, token_rows, next, t);
        }
      }
    }
  }

  // Warps along the columns meet in shared memory, blocks along the columns in device memory, always in one order.
  if constexpr (STAGED) {
    wait_for_copies<0>();
    block_barrier();
  }
  float* meeting = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = (across * TILES + r) * 16 + g + j / 2 * 8, token = 8 * n + 2 * t + j % 2;
        meeting[(along * WIDTH + token) * SUM_PITCH + row] = sums[r][n][j];
      }
  if constexpr (OUTLIERS != NONE) leave_outliers(extra, meeting + ALONG * WIDTH * SUM_PITCH);
  block_barrier();
  for (int n = threadIdx.x; n < WIDTH * ROWS; n += THREADS) {
    const int token = n / ROWS, row = n % ROWS;
    if (first_token + token >= a.tokens || first_row + row >= a.rows) continue;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < ALONG + (OUTLIERS != NONE); ++k) sum += meeting[(k * WIDTH + token) * SUM_PITCH + row];
    const i64 place = i64(first_token + token) * a.rows + first_row + row;
    if constexpr (SPLIT == 1) a.y[place] = rounded<HALF>(sum * a.multiplier);
    else a.partial[i64(blockIdx.y) * a.tokens * a.rows + place] = sum;
  }
  if constexpr (SPLIT > 1) {
    if (!last_to_arrive(a.arrived + blockIdx.z * gridDim.x + blockIdx.x, SPLIT)) return;
    for (int n = threadIdx.x; n < WIDTH * ROWS; n += THREADS) {
      const int token = n / ROWS, row = n % ROWS;
      if (first_token + token >= a.tokens || first_row + row >= a.rows) continue;
      const i64 place = i64(first_token + token) * a.rows + first_row + row;
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < SPLIT; ++k) sum += load_fresh(a.partial + i64(k) * a.tokens * a.rows + place);
      a.y[place] = rounded<HALF>(sum * a.multiplier);
    }
  }
}

// The weight in the type of the activations, [rows][columns] at `y`; what many tokens are multiplied by. A warp takes
// one step of a tile.
extern "C" global __launch_bounds__(THREADS) void rarefy_dequantize(const Arguments a) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const i64 unit = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  if constexpr (TABLE == SHARED) {
    copy_table(a);
    block_barrier();
  }
  const int tile = unit / a.steps, step = unit % a.steps;
  if (tile * 16 >= a.rows) return;
  Codes codes;
  Scales scales;
  const Places places = places_of(a, tile, lane);
  fetch(codes, a, places, step, lane);
  fetch(scales, a, places, step);
  Tables tables;
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    if (b % PART == 0) load(tables, a, tile, group_of(a, step, b / PART), g);
    u32 weights[4];
    operands(weights, codes.at[0], b, 4 * lane, tables);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int row = tile * 16 + g + 8 * which;
      const int column = step * STEP + (SPAN == 4 ? b * 16 + 4 * t : first_of(b / 2, t) + b % 2 * 4);
      u32 pairs[2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float values[2];
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          const float code = widened(u16(weights[which + 2 * q] >> 16 * f));
          values[f] = contribution(scales.scale[0][b / PART], scales.zero[0][b / PART], which, code, 1.0f) * a.multiplier;
        }
        pairs[q] = rounded<HALF>(values[0]) | u32(rounded<HALF>(values[1])) << 16;
      }
      if (row < a.rows && column < a.columns)
        *reinterpret_cast<uint2*>(a.y + i64(row) * a.columns + column) = {pairs[0], pairs[1]};
    }
  }
}

// ---- Activations in 8 bits, for products of bytes.

#if FLOAT8 && (defined(RAREFY_EMULATED) || __CUDA_ARCH__ >= 890)
// Tokens [tokens][columns] as bytes in E4M3 at `y` and what they are multiplied by, float32 [tokens] at `partial`. With a
// `scale` [columns] they are normalized first, by the root of their mean square plus `multiplier`.
extern "C" global __launch_bounds__(THREADS) void rarefy_quantize(const Arguments a) {
  float* shared = reinterpret_cast<float*>(pool);
  const u16* x = a.x + i64(blockIdx.x) * a.stride;
  const u16* gain = static_cast<const u16*>(a.scale);
  wait_for_earlier_kernels();
  float squares = 0.0f, most = 0.0f;
  for (int first = threadIdx.x * 8; first < a.columns; first += THREADS * 8) {
    const uint4 all = load_shared_by_all(reinterpret_cast<const uint4*>(x + first), true);
    const u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float value = widened(u16(words[n / 2] >> 16 * (n % 2)));
      squares += value * value;
      most = max_of(most, absolute(gain ? value * widened(gain[first + n]) : value));
    }
  }
  reduce_over_block(squares, most, shared);
  const float norm = gain ? inverse_root(squares / a.columns + a.multiplier) : 1.0f;
  const float step = max_of(most * norm, 1e-12f) / 448.0f;
  if (threadIdx.x == 0) a.partial[blockIdx.x] = step;
  uint2* y = reinterpret_cast<uint2*>(a.y) + i64(blockIdx.x) * (a.columns / 8);
  for (int first = threadIdx.x * 8; first < a.columns; first += THREADS * 8) {
    const uint4 all = load_shared_by_all(reinterpret_cast<const uint4*>(x + first), true);
    const u32 words[4] = {all.x, all.y, all.z, all.w};
    u32 bytes[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float value = widened(u16(words[n / 2] >> 16 * (n % 2))) * norm;
      if (gain) value *= widened(gain[first + n]);
      bytes[n / 4] |= u32(e4m3(value / step)) << 8 * (n % 4);
    }
    y[first / 8] = {bytes[0], bytes[1]};
  }
}
#endif
