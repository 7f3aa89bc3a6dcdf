// One token's way through a whole model in one launch.
//
// A block stays on each multiprocessor for the whole step. Its last warp does nothing but fetch: what the block will
// multiply is known beforehand, phase after phase, so weights flow through a ring in shared memory without a pause,
// while the other warps work, wait for each other and for other blocks. A phase is a product with what lies around it
// (the norm of its input before; activation or residual sum after), or attention with rotation and the cache's new row;
// after each, all blocks meet.
//
// Weights lie as linear.cu wants them (layout.py), so that neighbouring steps of a tile are one copy. Of each piece of a
// tile a warp takes one step; the warps' sums meet in shared memory, in one order.
//
// Macros: CODES (the kinds of codes, Code<...>, by commas), HALF (float16 activations, else bfloat16), WARPS (that
// multiply), EACH (steps of a stage that a warp takes), STAGES, STAGE (bytes), INPUT (bytes of a product's input), INPUT_SUMS (bytes of its sums over groups), WORK
// (bytes of all that is no ring), BATCH (tiles whose sums meet together), HEADS, KV_HEADS, CHANNELS (of attention), SPLITS
// (blocks that share a head's positions at most), ONE_SPLITS (the same of a
// query head; 0: there are fewer blocks than those), LEAST (positions that are worth a block), FLYING (stages that are on
// their way at most; 0: all).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

enum { NONE = 0, F32 = 1, F16 = 2, BF16 = 3, U8 = 4, PAIRS = 5, BILEVEL = 6, LEVEL = 7 };
enum { BY_ROW = 2 };
enum { PRODUCT = 0, ATTENTION = 1 };
enum { PLAIN = 1, CENTRED = 2 };
enum { SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4 };

struct __attribute__((aligned(16))) Phase {
  const u8* codes;       // as in linear.cu, and the next five
  const u8* scale;
  const u8* zero;
  const u8* table;
  const u8* second;
  const u32* entries;
  const u32* row_ptr;    // [rows, filled up to whole tiles, and four]
  const u16* x;          // [columns]; of attention: q, k and v
  const u16* gain;       // [columns], where `norm`; of attention: [CHANNELS], of q
  const u16* k_gain;     // [CHANNELS], where `k_norm`
  const u16* bias;       // [rows], or none
  u16* y;
  u16* keys;             // [KV_HEADS] of [CHANNELS] for each position
  u16* values;
  const u16* turns;      // [positions][2][CHANNELS / 2]
  i64 head_stride;
  int kind, code, rows, columns, steps, groups;
  int units;             // tiles, or pairs of them where `pair`
  int pair;              // tiles from a gate to what it opens; 0: no gates
  int norm, k_norm, add, activation, window, second_rows;
  int second_shift;      // groups that share second-order numbers, as a power of two
  float eps, k_eps, multiplier;
  float input_scale;     // a power of two that keeps a normed input in the range of float16
  float score_scale, softcap;  // in logarithms of two
  int filler[3];
};

struct Step {
  const Phase* phases;
  const int* position;
  u32* met;              // [2], zero before and after
  u32* heads_met;        // [HEADS], zero before and after
  float* part;           // [blocks][HEADS / KV_HEADS][CHANNELS]
  float* part_log;       // [blocks][HEADS / KV_HEADS]
  i64* times;            // [phases][blocks][3]: cycles when a phase begins, has its input and is done; or none
  int count;
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#include "stream.cuh"
#endif

shared_memory(pool);

constexpr int MEMBERS = HEADS / KV_HEADS, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 32;
constexpr int LANES_OF_HEAD = CHANNELS / 8, AT_ONCE = 32 / LANES_OF_HEAD;  // a lane takes eight channels
constexpr int PIECE = WARPS * EACH;  // steps of a stage
constexpr float NOTHING = -1e30f;

// Bytes of 16 numbers: rows g and g + 8 beside each other.
device constexpr int bytes_of(int type) {
  return type == NONE ? 0 : type == F32 || type == PAIRS ? 64 : type == F16 || type == BF16 ? 32 : 16;
}

template <int BITS_, int GROUP_, int SPAN_, int TABLE_, int SCALE_, int ZERO_, int CENTER_, int OUTLIERS_, int ENTRIES_>
struct Code {
  static constexpr int BITS = BITS_, GROUP = GROUP_, SPAN = SPAN_, TABLE = TABLE_, SCALE = SCALE_, ZERO = ZERO_;
  static constexpr int CENTER = CENTER_, OUTLIERS = OUTLIERS_;
  static constexpr int STEP = BITS % 2 ? 256 : 128, LOADS = STEP * BITS / 256, BYTES = LOADS * 512;
  static constexpr int BLOCKS = STEP / 16, PART = GROUP == 0 || GROUP > STEP ? BLOCKS : GROUP / 16, PARTS = BLOCKS / PART;
  // All tokens of an operand are the same one, so that the lanes of a row hold the same sums: with many groups in a step
  // each of the four lanes applies the scales of every fourth.
  static constexpr bool IN_TURNS = PARTS % 4 == 0;
  // A stage: codes of a piece of a tile, and what belongs to them.
  static constexpr int MOST_GROUPS = GROUP == 0 ? 1 : GROUP > STEP ? (PIECE - 1) / (GROUP > STEP ? GROUP / STEP : 1) + 2 : PIECE * PARTS;
  static constexpr int SCALES_AT = PIECE * BYTES;
  static constexpr int ZEROS_AT = SCALES_AT + MOST_GROUPS * bytes_of(SCALE);
  static constexpr int TABLE_AT = ZEROS_AT + MOST_GROUPS * bytes_of(ZERO);
  static constexpr int TABLE_BYTES = TABLE == BY_ROW ? 32 << BITS : 0;
  static constexpr bool SECONDS = SCALE == BILEVEL || SCALE == LEVEL;
  static constexpr int SECONDS_AT = TABLE_AT + MOST_GROUPS * TABLE_BYTES;
  static constexpr int POINTERS_AT = SECONDS_AT + (SECONDS ? (MOST_GROUPS / 2 + 2) * 16 : 0);
  static constexpr int ENTRIES_AT = POINTERS_AT + (OUTLIERS != NONE ? 80 : 0);
  static constexpr int END = ENTRIES_AT + (OUTLIERS != NONE ? 4 * ENTRIES_ : 0);
  static_assert(END <= STAGE, "a stage is too small");
};

template <class C> device int group_of(int step, int part) {
  constexpr int STEPS = C::GROUP > C::STEP ? C::GROUP / C::STEP : 1;
  return C::GROUP == 0 ? 0 : C::GROUP > C::STEP ? step / STEPS : step * C::PARTS + part;
}

// ---- The ring.

struct Ring {
  u8* stages;
  u64 *full, *empty;
  int at;
  u32 parity;
};

device void go_on(Ring& ring) {
  if (++ring.at == STAGES) ring.at = 0, ring.parity ^= 1;
}

// A block's units: every so many, so that at any time all blocks read what lies together.
device int units_of(int units) { return (units - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x); }
device int unit_at(int number) { return blockIdx.x + number * gridDim.x; }

// The next stage of the ring, when it is empty and no more than so many bytes are on their way: a queue that is longer
// than memory needs only makes everybody else wait.
struct Filling { Ring next, oldest; int flying; };

device u8* begin_stage(Filling& filling, u32 bytes) {
  if (FLYING && filling.flying == FLYING) {
    wait_for(filling.oldest.full + filling.oldest.at, filling.oldest.parity);
    go_on(filling.oldest);
    --filling.flying;
  }
  Ring& ring = filling.next;
  wait_for(ring.empty + ring.at, ring.parity ^ 1);
  expect(ring.full + ring.at, bytes);
  ++filling.flying;
  return ring.stages + ring.at * STAGE;
}

// Where the second-order numbers of a tile's group are.
device i64 second_of(const Phase& p, i64 tile, int group) {
  const int all = (p.groups + (1 << p.second_shift) - 1) >> p.second_shift;
  return tile / p.second_rows * all + (group >> p.second_shift);
}

// Of the entries [first, last) of a tile those that go with piece `piece` of `pieces`, to whole 16 bytes.
device u32 entry_at(u32 first, u32 last, int piece, int pieces) {
  const u32 share = u32(float(last - first) * (1.0f / pieces)) + 1, at = first + piece * share;
  return piece == pieces || at >= last ? last : at & ~3u;
}

template <class C> device void fetch(const Phase& p, Filling& filling, u64 policy) {
  const int pieces = (p.steps + PIECE - 1) / PIECE, halves = p.pair ? 2 : 1, tiles = units_of(p.units) * halves;
  u32 next_entry = 0, end_entry = 0;
  const auto tile_at = [&](int n) { return i64(unit_at(n / halves)) + n % halves * p.pair; };
  const auto look_ahead = [&](i64 tile) {
    if constexpr (C::OUTLIERS != NONE) next_entry = p.row_ptr[tile * 16], end_entry = p.row_ptr[tile * 16 + 16];
  };
  if (tiles > 0) look_ahead(tile_at(0));
  for (int n = 0; n < tiles; ++n) {
    const i64 tile = tile_at(n);
    const u32 first_entry = next_entry, last_entry = end_entry;
    if (n + 1 < tiles) look_ahead(tile_at(n + 1));
    for (int piece = 0; piece < pieces; ++piece) {
      const int first = piece * PIECE, count = p.steps - first < PIECE ? p.steps - first : PIECE;
      const int group = group_of<C>(first, 0), after = group_of<C>(first + count - 1, C::PARTS - 1) + 1;
      const u32 groups = (after < p.groups ? after : p.groups) - group;
      u32 bytes = count * C::BYTES + groups * (bytes_of(C::SCALE) + bytes_of(C::ZERO) + C::TABLE_BYTES);
      u32 entry = 0, entries = 0, seconds = 0;
      i64 second = 0;
      if constexpr (C::SECONDS) {
        second = second_of(p, tile, group) & ~1ll;
        seconds = ((second_of(p, tile, group + groups - 1) | 1) + 1 - second) * 8;
        bytes += seconds;
      }
      if constexpr (C::OUTLIERS != NONE) {
        entry = entry_at(first_entry, last_entry, piece, pieces);
        entries = (entry_at(first_entry, last_entry, piece + 1, pieces) - entry + 3 & ~3u) * 4;
        bytes += 80 + entries;
      }
      u64* full = filling.next.full + filling.next.at;
      u8* to = begin_stage(filling, bytes);
      copy_bulk(to, p.codes + (tile * p.steps + first) * C::BYTES, count * C::BYTES, full, policy);
      const i64 place = tile * p.groups + group;
      if constexpr (C::SCALE != NONE)
        copy_bulk(to + C::SCALES_AT, p.scale + place * bytes_of(C::SCALE), groups * bytes_of(C::SCALE), full, policy);
      if constexpr (C::ZERO != NONE)
        copy_bulk(to + C::ZEROS_AT, p.zero + place * bytes_of(C::ZERO), groups * bytes_of(C::ZERO), full, policy);
      if constexpr (C::TABLE == BY_ROW)
        copy_bulk(to + C::TABLE_AT, p.table + place * C::TABLE_BYTES, groups * C::TABLE_BYTES, full, policy);
      if constexpr (C::SECONDS) copy_bulk(to + C::SECONDS_AT, p.second + second * 8, seconds, full, policy);
      if constexpr (C::OUTLIERS != NONE) {
        copy_bulk(to + C::POINTERS_AT, p.row_ptr + tile * 16, 80, full, policy);
        if (entries) copy_bulk(to + C::ENTRIES_AT, p.entries + entry, entries, full, policy);
      }
      go_on(filling.next);
    }
  }
}

// ---- From codes to operands. A code is the mantissa of a float16 whose exponent is zero, which makes it that number of
// the smallest steps: nothing but a mask has to be applied. Codes of row g + 8 lie higher by their width.

template <class C> constexpr float ONE = C::TABLE == BY_ROW ? 1.0f : 16777216.0f;  // the number of steps in one
template <class C> constexpr float ONE_ABOVE = C::TABLE == BY_ROW || C::BITS == 8 ? ONE<C> : ONE<C> / (1 << C::BITS);

template <class C> device u32 operand(const u32* words, int b, int i) {
  if constexpr (C::BITS == 8) {
    return permuted(words[2 * b + i / 2], 0, i % 2 ? 0x4342 : 0x4140);
  } else if constexpr (C::BITS == 3) {
    constexpr u32 MASK = 0x00070007u;
    const u32* own = words + 3 * (b / 4);
    const int pair = 4 * (b % 4) + i, even = pair & ~1;
    if (pair == 15) return (own[0] >> 12 & 0x00080008u) | (own[1] >> 11 & 0x00100010u) | (own[2] >> 10 & 0x00200020u);
    if (pair == 5) return own[1] << 3 & MASK << 3;
    return own[even / 5] >> 3 * (even % 5) & (i % 2 ? MASK << 3 : MASK);
  } else {
    constexpr int BITS = C::BITS;
    constexpr u32 MASK = ((1u << BITS) - 1) * 0x10001u;
    const u32 word = words[BITS == 4 ? b : BITS == 2 ? b / 2 : b / 4];
    const int even = (BITS == 4 ? i : BITS == 2 ? 4 * (b % 2) + i : 4 * (b % 4) + i) & ~1;
    return word >> BITS * even & (i % 2 ? MASK << BITS : MASK);
  }
}

template <class C> struct Tables { u32 at[2][C::TABLE == BY_ROW ? 1 << (C::BITS - 1) : 1]; };

template <class C> device void load(Tables<C>& tables, const u8* from, int g) {
  if constexpr (C::TABLE == BY_ROW) {
    constexpr int WORDS = 1 << (C::BITS - 1);
    const uint4* own = reinterpret_cast<const uint4*>(from) + g * (WORDS / 2);
#pragma unroll
    for (int n = 0; n < WORDS / 2; ++n) {
      const uint4 all = own[n];
      u32* to = tables.at[n * 4 / WORDS] + n * 4 % WORDS;
      to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    }
  }
}

template <class C> device void operands(u32 (&weights)[4], const u32* words, int b, const Tables<C>& tables) {
  if constexpr (C::TABLE == BY_ROW) {
    constexpr int ENTRIES = 1 << (C::BITS - 1);
    u32 codes, halves = 0;
    if constexpr (C::BITS == 4) {
      codes = words[b];
      halves = chosen(codes >> 1, 0x44444444u, 0x32103210u);
    } else {
      const u32* own = words + 3 * (b / 4);
      codes = b % 4 < 3 ? own[b % 4]
                        : chosen(own[0] >> 3, 0x11111111u, chosen(own[1] >> 2, 0x22222222u, own[2] >> 1 & 0x44444444u));
    }
    codes &= 0x77777777u;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      u32 found[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const u32* bytes = tables.at[which] + part * ENTRIES / 2;
        found[part] = permuted(bytes[0], bytes[1], codes >> 16 * which);
        if constexpr (C::BITS == 4)
          found[part] = permuted(found[part], permuted(bytes[2], bytes[3], codes >> 16 * which), halves >> 16 * which);
      }
      weights[which] = permuted(found[0], found[1], 0x5140);
      weights[which + 2] = permuted(found[0], found[1], 0x7362);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = operand<C>(words, b, i);
  }
}

// ---- Scales and zeros of rows g and g + 8, and what a group adds to the sums of both.

device float half_of(u32 word, int which) { return half_value(u16(which ? word >> 16 : word)); }

// A number below 2 to the power 23, as the mantissa of that power.
device float small(u32 number) { return as_float(number | 0x4B000000u) - 8388608.0f; }

template <int TYPE> device float number(const u8* from, int which) {
  if constexpr (TYPE == F32) return reinterpret_cast<const float*>(from)[which];
  else if constexpr (TYPE == F16) return half_value(reinterpret_cast<const u16*>(from)[which]);
  else if constexpr (TYPE == BF16) return as_float(u32(reinterpret_cast<const u16*>(from)[which]) << 16);
  else return small(from[which]);
}

// `part`: of rows g and g + 8, over code * x; `ones` over x.
template <class C>
device void contribute(
    float (&sums)[2], const float (&part)[2], float ones, const u8* stage, const uint2* second_numbers, int local, int g) {
  const u8* scales = stage + C::SCALES_AT + (local * 8 + g) * (bytes_of(C::SCALE) / 8);
  const u8* zeros = stage + C::ZEROS_AT + (local * 8 + g) * (bytes_of(C::ZERO) / 8);
  if constexpr (C::SCALE == NONE) {
    sums[0] += part[0] - C::CENTER * ones, sums[1] += part[1] - C::CENTER * ones;
  } else if constexpr (C::SCALE == PAIRS) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const u32 values = reinterpret_cast<const u32*>(scales)[which];
      const float first = half_of(values, 0);
      sums[which] += first * ones + (half_of(values, 1) - first) * part[which];
    }
  } else if constexpr (C::SCALE == BILEVEL || C::SCALE == LEVEL) {
    const uint2 second = *second_numbers;
    const u32 octets = *reinterpret_cast<const u16*>(scales);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float sum = part[which];
      if constexpr (C::SCALE == BILEVEL)
        sum -= half_of(second.y, 0) * (small(octets >> (8 * which + 4) & 15) - half_of(second.y, 1)) * ones;
      else
        sum -= C::CENTER * ones;
      sums[which] += half_of(second.x, 0) * (small(octets >> 8 * which & 15) - half_of(second.x, 1)) * sum;
    }
  } else {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float sum = part[which];
      if constexpr (C::ZERO != NONE) sum -= number<C::ZERO>(zeros, which) * ones;
      else sum -= C::CENTER * ones;
      sums[which] += number<C::SCALE>(scales, which) * sum;
    }
  }
}

// ---- A product.

template <class C>
device void multiply_step(
    float (&sums)[2], const u8* stage, const u8* input, const Phase& p, i64 tile, int step, int slot, int first_group, int lane) {
  const int g = lane / 4, t = lane % 4;
  u32 words[4 * C::LOADS];
#pragma unroll
  for (int l = 0; l < C::LOADS; ++l) {
    const uint4 all = reinterpret_cast<const uint4*>(stage + slot * C::BYTES)[l * 32 + lane];
    words[4 * l] = all.x, words[4 * l + 1] = all.y, words[4 * l + 2] = all.z, words[4 * l + 3] = all.w;
  }
  const u8* own = input + step * (2 * C::STEP);
  const i64 first_second = C::SECONDS ? second_of(p, tile, 0) - (second_of(p, tile, first_group) & ~1ll) : 0;
  const uint2* seconds = reinterpret_cast<const uint2*>(stage + C::SECONDS_AT) + first_second;
  Tables<C> tables;
  const float* input_sums = reinterpret_cast<const float*>(input + INPUT);
  constexpr int CHAINS = C::PART >= 4 ? 2 : 1;  // of sums that do not wait for each other
  float part[CHAINS][4], kept[2];
  u32 x[4];
#pragma unroll
  for (int b = 0; b < C::BLOCKS; ++b) {
    if (b % 2 == 0) {
      if constexpr (C::SPAN != 4) {
        const uint4 all = *reinterpret_cast<const uint4*>(own + 2 * (16 * b + 8 * t));
        x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
      } else {
        const uint2 one = *reinterpret_cast<const uint2*>(own + 32 * b + 8 * t);
        const uint2 two = *reinterpret_cast<const uint2*>(own + 32 * b + 32 + 8 * t);
        x[0] = one.x, x[1] = one.y, x[2] = two.x, x[3] = two.y;
      }
    }
    int group = group_of<C>(step, b / C::PART);
    group = group < p.groups ? group : p.groups - 1;
    if (b % C::PART == 0) {
#pragma unroll
      for (int j = 0; j < 4 * CHAINS; ++j) part[j / 4][j % 4] = 0.0f;
      load(tables, stage + C::TABLE_AT + (group - first_group) * C::TABLE_BYTES, g);
    }
    u32 weights[4];
    operands<C>(weights, words, b, tables);
    multiply_halves(part[b % CHAINS], weights, x[2 * (b % 2)], x[2 * (b % 2) + 1]);
    if (b % C::PART != C::PART - 1) continue;
    const int which = b / C::PART;
    const float sum = part[0][0] + (CHAINS > 1 ? part[CHAINS - 1][0] : 0.0f);
    const float sum_above = part[0][2] + (CHAINS > 1 ? part[CHAINS - 1][2] : 0.0f);
    if (!C::IN_TURNS || which % 4 == t) kept[0] = sum * ONE<C>, kept[1] = sum_above * ONE_ABOVE<C>;
    if (C::IN_TURNS && which % 4 != 3) continue;
    const int own_part = C::IN_TURNS ? which - 3 + t : which;
    group = group_of<C>(step, own_part);
    group = group < p.groups ? group : p.groups - 1;
    contribute<C>(
        sums, kept, C::TABLE == BY_ROW ? 0.0f : input_sums[step * C::PARTS + own_part], stage, seconds + (group >> p.second_shift),
        group - first_group, g);
  }
}

// The sum of a row's outliers in this piece, in all lanes of the warp that has the row.
template <class C>
device float outliers_of(const u8* stage, const u8* input, int row, int piece, int pieces, int lane) {
  const u32* pointers = reinterpret_cast<const u32*>(stage + C::POINTERS_AT);
  const u32* entries = reinterpret_cast<const u32*>(stage + C::ENTRIES_AT);
  const u32 from = entry_at(pointers[0], pointers[16], piece, pieces), to = entry_at(pointers[0], pointers[16], piece + 1, pieces);
  const u32 begin = pointers[row] > from ? pointers[row] : from, end = pointers[row + 1] < to ? pointers[row + 1] : to;
  float sum = 0.0f;
  for (u32 at = begin + lane; at < end; at += 32) {
    const u32 entry = entries[at - from];
    const float value = C::OUTLIERS == F16 ? half_value(u16(entry >> 16)) : as_float(entry & 0xFFFF0000u);
    sum += value * half_value(reinterpret_cast<const u16*>(input)[entry & 0xFFFF]);
  }
  return end > begin ? sum_over<32>(sum) : 0.0f;
}

device float activated(float x, int kind) {
  if (kind == SILU) return x / (1.0f + exponential(-x));
  if (kind == GELU) return 0.5f * x * (1.0f + error_function(x * 0.7071067811865476f));
  if (kind == GELU_TANH) return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  return x > 0.0f ? x : 0.0f;
}

device float sum_of(const uint4& all, bool squared) {
  const u32 words[4] = {all.x, all.y, all.z, all.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = widened(u16(words[i / 2] >> 16 * (i % 2)));
    sum += squared ? value * value : value;
  }
  return sum;
}

// A norm's factor and gain for eight numbers, rounded as the model does.
device uint4 normed(const uint4& all, const uint4& gains, float factor, bool centred) {
  const u32 words[4] = {all.x, all.y, all.z, all.w}, factors[4] = {gains.x, gains.y, gains.z, gains.w};
  u32 made[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    made[i] = 0;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const float value = widened(u16(words[i] >> 16 * f)) * factor, gain = widened(u16(factors[i] >> 16 * f));
      made[i] |= u32(centred ? rounded<HALF>(value * (1.0f + gain)) : rounded<HALF>(gain * widened(rounded<HALF>(value)))) << 16 * f;
    }
  }
  return {made[0], made[1], made[2], made[3]};
}

// Eight numbers as float16, times a power of two.
device uint4 halves_of(const uint4& all, float scale) {
  if constexpr (HALF) return all;
  const u32 words[4] = {all.x, all.y, all.z, all.w};
  u32 made[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    made[i] = rounded<true>(widened(u16(words[i])) * scale) | u32(rounded<true>(widened(u16(words[i] >> 16)) * scale)) << 16;
  return {made[0], made[1], made[2], made[3]};
}

device float sum_of_halves(const uint4& all) {
  const u32 words[4] = {all.x, all.y, all.z, all.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += half_of(words[i], 0) + half_of(words[i], 1);
  return sum;
}

device u32 largest_of(const uint4& all) {
  const u32 words[4] = {all.x, all.y, all.z, all.w};
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 low = words[i] & 0x7FFF, high = words[i] >> 16 & 0x7FFF;
    most = most > low ? most : low;
    most = most > high ? most : high;
  }
  return most;
}

// The input of a product into shared memory: normed where that is wanted, in float16 times a power of two that keeps it
// in range, zeros behind it; and beside it the sums over groups. Returns what undoes the power.
template <class C> device float take_input(const Phase& p, u8* input, float* shared) {
  constexpr int TURNS = (INPUT / 16 + CONSUMERS - 1) / CONSUMERS;
  const int thread = threadIdx.x, pieces = p.columns / 8, filled = p.steps * C::STEP / 8;
  uint4* to = reinterpret_cast<uint4*>(input);
  float* sums = reinterpret_cast<float*>(input + INPUT);
  uint4 own[TURNS], gains[TURNS];
#pragma unroll
  for (int k = 0; k < TURNS; ++k) {
    own[k] = gains[k] = {0, 0, 0, 0};
    if (k * CONSUMERS >= filled) continue;
    const int n = thread + k * CONSUMERS;
    if (n < pieces) own[k] = fresh(reinterpret_cast<const uint4*>(p.x) + n);
    if (n < pieces && p.norm) gains[k] = load_shared_by_all(reinterpret_cast<const uint4*>(p.gain) + n);
  }
  float scale = p.norm ? p.input_scale : 1.0f;
  if (p.norm) {
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < TURNS; ++k)
      if (k * CONSUMERS < filled) squares += sum_of(own[k], true);
    squares = sum_over<32>(squares);
    if (thread % 32 == 0) shared[thread / 32] = squares;
    barrier_of<CONSUMERS>();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += shared[w];
    const float factor = inverse_root(total / p.columns + p.eps);
#pragma unroll
    for (int k = 0; k < TURNS; ++k)
      if (k * CONSUMERS < filled) own[k] = normed(own[k], gains[k], factor, p.norm == CENTRED);
  } else if (!HALF) {
    u32 most = 0;
#pragma unroll
    for (int k = 0; k < TURNS; ++k) {
      if (k * CONSUMERS >= filled) continue;
      const u32 here = largest_of(own[k]);
      most = most > here ? most : here;
    }
    most = largest_of_warp(most);
    u32* numbers = reinterpret_cast<u32*>(shared);
    if (thread % 32 == 0) numbers[thread / 32] = most;
    barrier_of<CONSUMERS>();
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most = most > numbers[w] ? most : numbers[w];
    const int exponent = most >> 7;  // of a number below 2 to the power of it minus 126; to become one below 2 to the 14
    scale = exponent == 0 ? 1.0f : as_float(u32(exponent < 30 ? 237 : 267 - exponent) << 23);
  }
#pragma unroll
  for (int k = 0; k < TURNS; ++k) {
    if (k * CONSUMERS >= filled) continue;
    const int n = thread + k * CONSUMERS;
    const uint4 made = halves_of(own[k], scale);
    if (n < filled) to[n] = made;
    if constexpr (C::TABLE != BY_ROW) {
      const float sum = sum_over<2 * C::PART>(sum_of_halves(made));
      if (n < filled && n % (2 * C::PART) == 0) sums[n / (2 * C::PART)] = sum;
    }
  }
  barrier_of<CONSUMERS>();
  return HALF ? 1.0f : 1.0f / scale;
}

// Sums of the warps over `tiles` tiles, from unit `first` of this block's on.
device void finish(const Phase& p, const float* sums, int first, int tiles, float factor) {
  const auto total = [&](int tile, int row, int place) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[(tile * WARPS + w) * 16 + row];
    const u16 own = rounded<HALF>(sum * factor);
    return p.bias ? rounded<HALF>(widened(own) + widened(p.bias[place])) : own;
  };
  const int units = p.pair ? tiles / 2 : tiles;
  for (int n = threadIdx.x; n < units * 16; n += CONSUMERS) {
    const int unit = n / 16, row = n % 16, place = unit_at(first + unit) * 16 + row;
    if (p.pair) {
      const float gate = widened(total(2 * unit, row, place));
      const float up = widened(total(2 * unit + 1, row, place + p.pair * 16));
      p.y[place] = rounded<HALF>(widened(rounded<HALF>(activated(gate, p.activation))) * up);
    } else if (place < p.rows) {
      const u16 own = total(unit, row, place);
      p.y[place] = p.add ? rounded<HALF>(widened(fresh(p.y + place)) + widened(own)) : own;
    }
  }
}

device void note(i64* times, int which) {
  if (times && threadIdx.x == 0) times[which] = cycles();
}

template <class C>
device void multiply_all(const Phase& p, Ring& ring, u8* input, float* meeting, i64* times) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float factor = take_input<C>(p, input, meeting) * p.multiplier;
  note(times, 1);
  const int pieces = (p.steps + PIECE - 1) / PIECE, units = units_of(p.units);
  int tiles = 0, first_unit = 0;
  for (int unit = 0; unit < units; ++unit) {
    for (int half = 0; half < (p.pair ? 2 : 1); ++half) {
      const i64 tile = i64(unit_at(unit)) + half * p.pair;
      float sums[2] = {0.0f, 0.0f};
      for (int piece = 0; piece < pieces; ++piece) {
        const int first = piece * PIECE, group = group_of<C>(first, 0);
        const u8* stage = ring.stages + ring.at * STAGE;
        wait_for(ring.full + ring.at, ring.parity);
        if (first + PIECE <= p.steps) {  // no branches between steps, so that they overlap
#pragma unroll
          for (int n = 0; n < EACH; ++n)
            multiply_step<C>(sums, stage, input, p, tile, first + n * WARPS + warp, n * WARPS + warp, group, lane);
        } else {
          for (int slot = warp; first + slot < p.steps; slot += WARPS)
            multiply_step<C>(sums, stage, input, p, tile, first + slot, slot, group, lane);
        }
        if constexpr (C::OUTLIERS != NONE) {
#pragma unroll
          for (int row = warp; row < 16; row += WARPS) {
            const float extra = outliers_of<C>(stage, input, row, piece, pieces, lane);
            sums[0] += row < 8 && lane == row * 4 ? extra : 0.0f;
            sums[1] += row >= 8 && lane == row * 4 - 32 ? extra : 0.0f;
          }
        }
        warp_barrier();
        if (lane == 0) arrive(ring.empty + ring.at);
        go_on(ring);
      }
      if constexpr (C::IN_TURNS) sums[0] = sum_over<4>(sums[0]), sums[1] = sum_over<4>(sums[1]);
      if (lane % 4 == 0) {
        float* to = meeting + (tiles * WARPS + warp) * 16 + lane / 4;
        to[0] = sums[0], to[8] = sums[1];
      }
      ++tiles;
    }
    if (tiles + 2 > BATCH || unit + 1 == units) {
      barrier_of<CONSUMERS>();
      finish(p, meeting, first_unit, tiles, factor);
      if (unit + 1 < units) barrier_of<CONSUMERS>();
      tiles = 0, first_unit = unit + 1;
    }
  }
}

// ---- Attention of one token.

struct Eight { float at[8]; };

device Eight widened(const uint4& all) {
  const u32 words[4] = {all.x, all.y, all.z, all.w};
  Eight found;
#pragma unroll
  for (int i = 0; i < 8; ++i) found.at[i] = widened(u16(words[i / 2] >> 16 * (i % 2)));
  return found;
}

// Eight channels of a head, normed where that is wanted and turned, rounded as the model does; `lane` of LANES_OF_HEAD.
device Eight turned(uint4 raw, const Eight& cosine, const Eight& sine, const u16* gain, int norm, float eps, int lane) {
  constexpr int HALF_OF = LANES_OF_HEAD / 2;
  if (norm) {
    const float factor = inverse_root(sum_over<LANES_OF_HEAD>(sum_of(raw, true)) / CHANNELS + eps);
    raw = normed(raw, load_shared_by_all(reinterpret_cast<const uint4*>(gain) + lane), factor, norm == CENTRED);
  }
  const Eight own = widened(raw);
  Eight found;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float other = other_lane(own.at[i], HALF_OF), sign = lane < HALF_OF ? -sine.at[i] : sine.at[i];
    found.at[i] = widened(rounded<HALF>(own.at[i] * cosine.at[i] + other * sign));
  }
  return found;
}

device uint4 narrowed(const Eight& values) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = rounded<HALF>(values.at[2 * i]) | u32(rounded<HALF>(values.at[2 * i + 1])) << 16;
  return {words[0], words[1], words[2], words[3]};
}

template <int M> struct Mixed {
  float top[M], total[M];
  Eight at[M];
};

// One more token, where `real`.
template <int M> device void see(Mixed<M>& mixed, const float (&scores)[M], const Eight& value, bool real) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const float highest = real ? max_of(mixed.top[m], scores[m]) : mixed.top[m];
    const float fade = power_of_two(mixed.top[m] - highest), share = real ? power_of_two(scores[m] - highest) : 0.0f;
    mixed.total[m] = mixed.total[m] * fade + share;
#pragma unroll
    for (int i = 0; i < 8; ++i) mixed.at[m].at[i] = mixed.at[m].at[i] * fade + share * value.at[i];
    mixed.top[m] = highest;
  }
}

template <int M> device void score(float (&scores)[M], const Eight (&query)[M], const Eight& key, float softcap) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += query[m].at[i] * key.at[i];
    sum = sum_over<LANES_OF_HEAD>(sum);
    scores[m] = softcap > 0.0f ? softcap * (2.0f / (1.0f + exponential(-2.0f * sum / softcap)) - 1.0f) : sum;
  }
}

// What a block attends to: positions before the token's own, of one head, for M of its query heads. Few positions are
// read by a block for each query head, which has little to do then; many are read once. None where there are not as
// many blocks.
struct Share { int head, member, unit, split, splits, active, begin, end; };

constexpr bool CAN_BE_ONE = ONE_SPLITS > 0 && MEMBERS > 1;
device bool is_one(int length) { return CAN_BE_ONE && length <= ONE_SPLITS * LEAST; }

template <int M> device Share share_of(const Phase& p, int position) {
  constexpr int MOST = M == MEMBERS ? SPLITS : ONE_SPLITS, UNITS = HEADS / M;
  const int start = p.window > 0 && position - p.window + 1 > 0 ? position - p.window + 1 : 0, length = position - start;
  Share own;
  own.unit = blockIdx.x / MOST, own.split = blockIdx.x % MOST, own.splits = MOST;
  own.head = own.unit * M / MEMBERS, own.member = own.unit * M % MEMBERS;
  own.active = (length + LEAST - 1) / LEAST;
  own.active = own.active < 1 ? 1 : own.active > MOST ? MOST : own.active;
  own.begin = own.end = 0;
  if (own.unit >= UNITS || own.split >= own.active) {
    own.active = 0;
    return own;
  }
  const int each = (length + own.active - 1) / own.active;
  own.begin = start + own.split * each;
  own.end = own.begin + each < position ? own.begin + each : position;
  return own;
}

device int length_of(const Phase& p, int position) {
  return p.window > 0 && p.window <= position ? p.window - 1 : position;
}

device Share share_of(const Phase& p, int position) {
  if constexpr (CAN_BE_ONE)
    if (is_one(length_of(p, position))) return share_of<1>(p, position);
  return share_of<MEMBERS>(p, position);
}

constexpr int ROW = 2 * CHANNELS, TOKENS = STAGE / (2 * ROW) / AT_ONCE * AT_ONCE;  // bytes, tokens of a stage

device void fetch_cache(const Phase& p, Filling& filling, int position, u64 policy) {
  const Share own = share_of(p, position);
  if (!own.active) return;
  for (int first = own.begin; first < own.end; first += TOKENS) {
    const u32 bytes = (own.end - first < TOKENS ? own.end - first : TOKENS) * ROW;
    const i64 place = own.head * p.head_stride + i64(first) * CHANNELS;
    u64* full = filling.next.full + filling.next.at;
    u8* to = begin_stage(filling, 2 * bytes);
    copy_bulk(to, p.keys + place, bytes, full, policy);
    copy_bulk(to + TOKENS * ROW, p.values + place, bytes, full, policy);
    go_on(filling.next);
  }
}

template <int M> device void attend(const Phase& p, const Step& s, Ring& ring, u8* memory, int position, const Share& share) {
  if (!share.active) return;
  const int head = share.head, split = share.split, active = share.active, first_head = head * MEMBERS + share.member;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, own = lane % LANES_OF_HEAD, which = lane / LANES_OF_HEAD;
  const bool first_of_all = split == 0 && warp == 0, stores = first_of_all && share.member == 0;
  const uint4* turn = reinterpret_cast<const uint4*>(p.turns + i64(position) * CHANNELS) + own % (LANES_OF_HEAD / 2);
  const u16* new_key = p.x + (HEADS + head) * CHANNELS;
  uint4 raw[M], raw_key = {0, 0, 0, 0}, new_value = {0, 0, 0, 0};
#pragma unroll
  for (int m = 0; m < M; ++m) raw[m] = fresh(reinterpret_cast<const uint4*>(p.x + (first_head + m) * CHANNELS) + own);
  if (first_of_all) {
    raw_key = fresh(reinterpret_cast<const uint4*>(new_key) + own);
    new_value = fresh(reinterpret_cast<const uint4*>(new_key + KV_HEADS * CHANNELS) + own);
  }
  const Eight cosine = widened(load_shared_by_all(turn)), sine = widened(load_shared_by_all(turn + LANES_OF_HEAD / 2));
  Eight query[M];
  Mixed<M> mixed;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    query[m] = turned(raw[m], cosine, sine, p.gain, p.norm, p.eps, own);
    mixed.top[m] = NOTHING, mixed.total[m] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) query[m].at[i] *= p.score_scale, mixed.at[m].at[i] = 0.0f;
  }
  if (first_of_all) {  // the token's own key and value, which the cache gets too
    const Eight key = turned(raw_key, cosine, sine, p.k_gain, p.k_norm, p.k_eps, own);
    const i64 place = head * p.head_stride + i64(position) * CHANNELS;
    if (which == 0 && stores) {
      reinterpret_cast<uint4*>(p.keys + place)[own] = narrowed(key);
      reinterpret_cast<uint4*>(p.values + place)[own] = new_value;
    }
    float scores[M];
    score(scores, query, key, p.softcap);
    see(mixed, scores, widened(new_value), which == 0);
  }
  for (int first = share.begin; first < share.end; first += TOKENS) {
    const u8* stage = ring.stages + ring.at * STAGE;
    const int count = share.end - first < TOKENS ? share.end - first : TOKENS;
    wait_for(ring.full + ring.at, ring.parity);
    for (int token = warp * AT_ONCE; token < count; token += WARPS * AT_ONCE) {
      const bool real = token + which < count;
      const u8* key = stage + (real ? token + which : token) * ROW;
      float scores[M];
      score(scores, query, widened(reinterpret_cast<const uint4*>(key)[own]), p.softcap);
      see(mixed, scores, widened(reinterpret_cast<const uint4*>(key + TOKENS * ROW)[own]), real);
    }
    warp_barrier();
    if (lane == 0) arrive(ring.empty + ring.at);
    go_on(ring);
  }
  // Those of a warp that saw other tokens, then warps, then blocks.
#pragma unroll
  for (int distance = 16; distance >= LANES_OF_HEAD; distance /= 2)
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float top = other_lane(mixed.top[m], distance), highest = max_of(top, mixed.top[m]);
      const float mine = power_of_two(mixed.top[m] - highest), others = power_of_two(top - highest);
      mixed.total[m] = mixed.total[m] * mine + other_lane(mixed.total[m], distance) * others;
#pragma unroll
      for (int i = 0; i < 8; ++i) mixed.at[m].at[i] = mixed.at[m].at[i] * mine + other_lane(mixed.at[m].at[i], distance) * others;
      mixed.top[m] = highest;
    }
  float* sums = reinterpret_cast<float*>(memory);              // [WARPS][M][CHANNELS]
  float* tops = sums + WARPS * M * CHANNELS;             // [WARPS][M][2]
  if (which == 0) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float* to = sums + (warp * M + m) * CHANNELS + 8 * own;
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = mixed.at[m].at[i];
      if (own == 0) tops[(warp * M + m) * 2] = mixed.top[m], tops[(warp * M + m) * 2 + 1] = mixed.total[m];
    }
  }
  barrier_of<CONSUMERS>();
  for (int n = thread; n < M * CHANNELS; n += CONSUMERS) {
    const int m = n / CHANNELS;
    float highest = NOTHING, total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) highest = max_of(highest, tops[(w * M + m) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float weight = power_of_two(tops[(w * M + m) * 2] - highest);
      total += weight * tops[(w * M + m) * 2 + 1];
      sum += weight * sums[w * M * CHANNELS + n];
    }
    if (active == 1) {
      p.y[first_head * CHANNELS + n] = rounded<HALF>(sum / total);
    } else {
      const int place = (share.unit * share.splits + split) * M;
      s.part[place * CHANNELS + n] = sum / total;
      if (n % CHANNELS == 0) s.part_log[place + m] = highest + log_of_two(total);
    }
  }
  if (active == 1) return;
  u32* last = reinterpret_cast<u32*>(tops + WARPS * M * 2);
  barrier_of<CONSUMERS>();
  if (thread == 0) {
    *last = counted(s.heads_met + share.unit) == u32(active - 1);
    if (*last) s.heads_met[share.unit] = 0;
  }
  barrier_of<CONSUMERS>();
  if (!*last) return;
  for (int n = thread; n < M * CHANNELS; n += CONSUMERS) {
    const float* logs = s.part_log + share.unit * share.splits * M + n / CHANNELS;
    float highest = NOTHING, total = 0.0f, sum = 0.0f;
    for (int k = 0; k < active; ++k) highest = max_of(highest, fresh(logs + k * M));
    for (int k = 0; k < active; ++k) {
      const float weight = power_of_two(fresh(logs + k * M) - highest);
      total += weight;
      sum += weight * fresh(s.part + (share.unit * share.splits + k) * M * CHANNELS + n);
    }
    p.y[first_head * CHANNELS + n] = rounded<HALF>(sum / total);
  }
}

device void attend(const Phase& p, const Step& s, Ring& ring, u8* memory, int position) {
  const Share share = share_of(p, position);
  if constexpr (CAN_BE_ONE) {
    if (is_one(length_of(p, position))) return attend<1>(p, s, ring, memory, position, share);
  }
  attend<MEMBERS>(p, s, ring, memory, position, share);
}

// ---- The step.

template <class... All> device void fetch_any(const Phase& p, Filling& filling, u64 policy) {
  int n = 0;
  ((p.code == n++ ? fetch<All>(p, filling, policy) : void()), ...);
}
template <class... All>
device void multiply_any(const Phase& p, Ring& ring, u8* input, float* meeting, i64* times) {
  int n = 0;
  ((p.code == n++ ? multiply_all<All>(p, ring, input, meeting, times) : void()), ...);
}

constexpr int RING = STAGES * STAGE, PHASE_WORDS = sizeof(Phase) / 16;

extern "C" global __launch_bounds__(THREADS, 1) void rarefy_step(const Step s) {
  u8* input = pool + RING;
  float* meeting = reinterpret_cast<float*>(input + INPUT + INPUT_SUMS);
  Phase* phases = reinterpret_cast<Phase*>(pool + RING + WORK);  // two, in turn
  u64* barriers = reinterpret_cast<u64*>(phases + 2);
  const int thread = threadIdx.x, warp = thread / 32;
  Ring ring = {pool, barriers, barriers + STAGES, 0, 0};
  if (thread == 0) {
    for (int n = 0; n < STAGES; ++n) start_barrier(ring.full + n, 1), start_barrier(ring.empty + n, WARPS);
    show_barriers();
  }
  const auto get_phase = [&](int n) {
    u8* to = reinterpret_cast<u8*>(phases + n % 2);
    if (thread < PHASE_WORDS) copy_async(to + 16 * thread, reinterpret_cast<const uint4*>(s.phases + n) + thread, true);
    commit_copies();
  };
  get_phase(0);
  wait_for_copies<0>();
  block_barrier();
  if (warp == WARPS) {
    if (thread % 32 == 0) {
      const u64 policy = read_once();
      Filling filling = {ring, ring, 0};
      int position = -1;
      for (int n = 0; n < s.count; ++n) {
        const Phase p = s.phases[n];
        if (p.kind == PRODUCT) {
          fetch_any<CODES>(p, filling, policy);
        } else {
          if (position < 0) {
            wait_for_kernels_before();  // weights never depend on them, but what is cached does
            position = fresh(s.position);
          }
          fetch_cache(p, filling, position, policy);
        }
      }
    }
    return;
  }
  wait_for_kernels_before();
  const int position = fresh(s.position);
  for (int n = 0; n < s.count; ++n) {
    const Phase& p = phases[n % 2];
    if (n + 1 < s.count) get_phase(n + 1);
    i64* times = s.times ? s.times + (i64(n) * gridDim.x + blockIdx.x) * 3 : nullptr;
    note(times, 0);
    if (p.kind == PRODUCT) multiply_any<CODES>(p, ring, input, meeting, times);
    else attend(p, s, ring, input, position);
    wait_for_copies<0>();
    barrier_of<CONSUMERS>();
    note(times, 2);
    if (thread == 0) {
      leave(s.met);
      if (n + 1 < s.count) {
        const u32 wanted = gridDim.x * u32(n + 1);
        while (seen(s.met) < wanted) wait_a_little();
      } else if (counted(s.met + 1) == gridDim.x - 1) {
        s.met[0] = s.met[1] = 0;
      }
    }
    barrier_of<CONSUMERS>();
  }
  all_may_begin();
}
