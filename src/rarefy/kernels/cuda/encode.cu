// Codes of keys or values, as the codecs of kv/ have them, bit for bit: no product is fused with a sum, and sums are
// taken in the codecs' order.
//
// A thread has 32 numbers, neighbouring channels of a token or neighbouring tokens of a channel, and packs their codes by
// itself. Threads of one vector are neighbours (of a token), or meet in shared memory (of a channel).
//
// Macros: KIND, BITS, GROUP (numbers that share a scale), BLOCK (tokens of a block of a channel), D, X (type of the
// numbers), ROTATED, HEADS (of a row), ENTRIES (outliers of a row), INDEX_BYTES; HALF is 1.

#include "encode_types.cuh"

enum { CHANNEL = 1, TOKEN = 2, NORM = 3, RANGE = 4, PRODUCT = 5, ROW_SPREAD = 6, ROW_RANGE = 7, FLOAT8 = 8 };

struct Arguments {
  const void* x;        // [batch][heads][tokens][D], with strides
  const int* source;    // [batch][tokens]: the token that is read in the place of each, -1: zeros; or null
  const float* signs;   // [D]
  const float* middles; // [2^BITS - 1], between neighbours of a table
  const float* lut;     // [2^BITS], or of products [heads][D / 2][4][256]: see there
  const float* decoded; // [2^BITS]: what codes stand for
  const float* center;  // [HEADS * D]
  const float* spread;
  const float* counts;  // [HEADS * D]: what errors of channels are multiplied by before they are compared
  const u16* order;     // [heads][D]: channels in the order in which products take them; or null
  u32* codes;
  u16* scale;
  u16* zero;
  u16* values;          // [batch][tokens][ENTRIES]
  void* indices;
  u32* faults;
  i64 batch_stride, head_stride;
  int tokens, heads;
};

constexpr bool ROWS = KIND == ROW_SPREAD || KIND == ROW_RANGE;  // of all heads
constexpr int PARTS = ROWS ? HEADS * D / MINE : KIND == CHANNEL ? (BLOCK < 128 ? BLOCK : 128) / MINE : D / MINE;  // threads of a vector
constexpr int THREADS = KIND == CHANNEL ? D * PARTS : 128;
constexpr int TOGETHER = KIND == CHANNEL || KIND == TOKEN ? GROUP / MINE : PARTS;  // threads of a group

#include "encode_codes.cuh"

template <int COUNT> device bool finite(const float (&x)[COUNT]) {
  bool all = true;
#pragma unroll
  for (int n = 0; n < COUNT; ++n) all &= absolute(x[n]) <= 3.4028234e38f;
  return all;
}
// Numbers of a token or a channel from `first` on, as many as 16 bytes have or a multiple of that.
template <int COUNT> device bool load_numbers(float (&x)[COUNT], const Arguments& a, i64 batch, i64 head, int token, int channel) {
  const i64 base = batch * a.batch_stride + head * a.head_stride;
  if constexpr (KIND == CHANNEL) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const int from = a.source != nullptr ? a.source[batch * a.tokens + token + n] : token + n;
      x[n] = from < 0 ? 0.0f : number_at<X>(a.x, base + i64(from) * D + channel);
    }
  } else {
    const int from = a.source != nullptr ? a.source[batch * a.tokens + token] : token;
    if (KIND == PRODUCT && a.order != nullptr) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
        x[n] = from < 0 ? 0.0f : number_at<X>(a.x, base + i64(from) * D + a.order[head * D + channel + n]);
      return finite(x);
    }
    constexpr int EACH = X == F32 ? 4 : 8;
    const uint4* at = static_cast<const uint4*>(a.x) + (base + i64(from) * D + channel) / EACH;
#pragma unroll
    for (int n = 0; n < COUNT / EACH; ++n) {
      const uint4 all = load_once(at + n, from >= 0);
      const u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
      for (int k = 0; k < EACH; ++k) x[n * EACH + k] = X == F32 ? as_float(words[k % 4]) : number_of<X>(words[k / 2 % 4] >> 16 * (k % 2));
    }
  }
  return finite(x);
}

device void load_four(float (&x)[4], const float* from) {
  const uint4 all = *reinterpret_cast<const uint4*>(from);
  x[0] = as_float(all.x), x[1] = as_float(all.y), x[2] = as_float(all.z), x[3] = as_float(all.w);
}

device u32 level_of(const float* middles, float value) {
  u32 code = 0;
#pragma unroll
  for (int n = 0; n < LEVELS - 1; ++n) code += !(middles[n] >= value);
  return code;
}

// Numbers that are added in pairs half a vector apart, then half of that, and so on.
device float tree(float (&x)[MINE]) {
#pragma unroll
  for (int distance = PARTS / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int n = 0; n < MINE; ++n) x[n] += of_lane_xor(x[n], distance);
#pragma unroll
  for (int half = MINE / 2; half > 0; half /= 2)
#pragma unroll
    for (int n = 0; n < half; ++n) x[n] += x[n + half];
  return x[0];
}

device void rotate(float (&x)[MINE], const float* signs, int channel, int part) {
#pragma unroll
  for (int n = 0; n < MINE; ++n) x[n] *= signs[channel + n];
#pragma unroll
  for (int half = 1; half < MINE; half *= 2)
#pragma unroll
    for (int n = 0; n < MINE; ++n)
      if ((n & half) == 0) {
        const float first = x[n], second = x[n + half];
        x[n] = first + second, x[n + half] = first - second;
      }
#pragma unroll
  for (int distance = 1; distance < PARTS; distance *= 2)
#pragma unroll
    for (int n = 0; n < MINE; ++n) {
      const float other = of_lane_xor(x[n], distance);
      x[n] = part & distance ? other - x[n] : x[n] + other;
    }
#pragma unroll
  for (int n = 0; n < MINE; ++n) x[n] *= D == 128 ? 0.08838834764831845f : 0.125f;
}

#if KIND <= 4 || KIND == 8
// How many of 252 ascending boundaries are below a number.
device int place_of(const float* boundaries, float value) {
  int place = 0;
#pragma unroll
  for (int step = 128; step > 0; step /= 2)
    if (place + step <= 252 && boundaries[place + step - 1] < value) place += step;
  return place;
}

extern "C" global __launch_bounds__(THREADS) void rarefy_encode(const Arguments a) {
  const i64 pair = blockIdx.y, batch = pair / a.heads, head = pair % a.heads;
  const int thread = threadIdx.x;
  float x[MINE];
  u32 codes[MINE];

  if constexpr (KIND == CHANNEL) {
    const int channel = thread % D, part = thread / D, token = blockIdx.x * PARTS * MINE + part * MINE;
    bool fine = load_numbers(x, a, batch, head, token, channel);
    float low = x[0], high = x[0];
#pragma unroll
    for (int n = 1; n < MINE; ++n) low = smaller(low, x[n]), high = larger(high, x[n]);
    if constexpr (TOGETHER > 1) {
      float* lows = reinterpret_cast<float*>(pool);
      float* highs = lows + THREADS;
      lows[thread] = low, highs[thread] = high;
      block_barrier();
      const int first = part / TOGETHER * TOGETHER * D + channel;
#pragma unroll
      for (int n = 0; n < TOGETHER; ++n) low = smaller(low, lows[first + n * D]), high = larger(high, highs[first + n * D]);
    }
    const Steps steps = steps_of(low, high);
    const float scale = half_value(steps.scale), zero = half_value(steps.zero);
#pragma unroll
    for (int n = 0; n < MINE; ++n) codes[n] = code_of(x[n], scale, zero);
    const i64 row = (pair * (a.tokens / BLOCK) + token / BLOCK) * D + channel;
    store_codes(a.codes + (row * (BLOCK / MINE) + token % BLOCK / MINE) * BITS, codes);
    if (part % TOGETHER == 0) {
      const i64 group = row * (BLOCK / GROUP) + token % BLOCK / GROUP;
      a.scale[group] = steps.scale, a.zero[group] = steps.zero;
    }
    const u32 fault = (fine ? 0 : NOT_FINITE) | overflow_of(scale, zero);
    if (fault) raise(a.faults, fault);
    return;
  }

  const int at = blockIdx.x * THREADS + thread, part = at % PARTS, channel = part * MINE;
  const bool real = at / PARTS < a.tokens;
  const int token = real ? at / PARTS : a.tokens - 1;  // all lanes of a warp take part in exchanges
  const i64 row = pair * a.tokens + token;
  u32 fault = load_numbers(x, a, batch, head, token, channel) ? 0 : NOT_FINITE;
  if constexpr (ROTATED) rotate(x, a.signs, channel, part);

  if constexpr (KIND == TOKEN || KIND == RANGE || KIND == FLOAT8) {
    float low = x[0], high = x[0];
#pragma unroll
    for (int n = 1; n < MINE; ++n) low = smaller(low, x[n]), high = larger(high, x[n]);
#pragma unroll
    for (int distance = 1; distance < TOGETHER; distance *= 2) {
      low = smaller(low, of_lane_xor(low, distance));
      high = larger(high, of_lane_xor(high, distance));
    }
    if constexpr (KIND == TOKEN) {
      const Steps steps = steps_of(low, high);
      const float scale = half_value(steps.scale), zero = half_value(steps.zero);
#pragma unroll
      for (int n = 0; n < MINE; ++n) codes[n] = code_of(x[n], scale, zero);
      fault |= overflow_of(scale, zero);
      if (real && part % TOGETHER == 0) {
        const i64 group = row * (D / GROUP) + part / TOGETHER;
        a.scale[group] = steps.scale, a.zero[group] = steps.zero;
      }
    } else if constexpr (KIND == FLOAT8) {
      const u16 half = rounded<true>(larger(larger(high, 0.0f) / 448.0f, smaller(low, 0.0f) / -448.0f));
      const float scale = half_value(half);
#pragma unroll
      for (int n = 0; n < MINE; ++n) codes[n] = u32(a.lut[place_of(a.middles, scale == 0.0f ? 0.0f : x[n] / scale)]);
      if (!(scale <= 65504.0f)) fault |= OVERFLOWS;
      if (real && part == 0) a.scale[row] = half;
    } else {
      const u16 half = rounded<true>(at_most((high - low) / 2.0f)), middle = rounded<true>(at_most((high + low) / 2.0f));
      const float scale = half_value(half), offset = half_value(middle);
#pragma unroll
      for (int n = 0; n < MINE; ++n) codes[n] = level_of(a.middles, (x[n] - offset) / (scale == 0.0f ? 1.0f : scale));
      if (real && part == 0) a.scale[row] = half, a.zero[row] = middle;
    }
  }
  if constexpr (KIND == NORM) {
    float squares[MINE];
#pragma unroll
    for (int n = 0; n < MINE; ++n) squares[n] = x[n] * x[n];
    const float norm = root(tree(squares));
    const float up = 1.0f / larger(norm, 1.1754943508222875e-38f) * (D == 128 ? 11.313708498984761f : 8.0f);
#pragma unroll
    for (int n = 0; n < MINE; ++n) {
      codes[n] = level_of(a.middles, x[n] * up);
      const float coded = a.lut[codes[n]];
      squares[n] = coded * coded;
    }
    const float coded = root(tree(squares));
    if (real && part == 0) a.scale[row] = rounded<true>(at_most(norm / coded));
  }
  if (real) store_codes(a.codes + (row * PARTS + part) * BITS, codes);
  if (real && fault) raise(a.faults, fault);
}

#elif KIND >= 6
// A row of all heads: a table's codes, between the extremes that are left when half of ENTRIES are taken away at both
// ends or around the centers of channels, and the ENTRIES largest errors.
extern "C" global __launch_bounds__(THREADS) void rarefy_encode_rows(const Arguments a) {
  const i64 batch = blockIdx.y;
  const int at = blockIdx.x * THREADS + threadIdx.x, part = at % PARTS, head = part * MINE / D, channel = part * MINE % D;
  const bool real = at / PARTS < a.tokens;
  const int token = real ? at / PARTS : a.tokens - 1;  // all lanes of a warp take part in exchanges
  const i64 row = batch * a.tokens + token;
  float x[MINE], left[MINE];
  u32 codes[MINE];
  const bool fine = load_numbers(x, a, batch, head, token, channel);
  float scale = 0.0f, offset = 0.0f;
  if constexpr (KIND == ROW_RANGE) {
    float high = 0.0f, low = 0.0f;
#pragma unroll
    for (int n = 0; n < MINE; ++n) left[n] = x[n];
    for (int n = 0; n <= ENTRIES / 2; ++n) high = take_largest(left, part).value;
#pragma unroll
    for (int n = 0; n < MINE; ++n) left[n] = -x[n];
    for (int n = 0; n <= ENTRIES / 2; ++n) low = -take_largest(left, part).value;
    const u16 half = rounded<true>(at_most((high - low) / 2.0f)), middle = rounded<true>(at_most((high + low) / 2.0f));
    if (real && part == 0) a.scale[row] = half, a.zero[row] = middle;
    scale = half_value(half), offset = half_value(middle);
#pragma unroll
    for (int n = 0; n < MINE; ++n) {
      const float inside = smaller(larger(x[n], low), high);
      codes[n] = level_of(a.middles, (inside - offset) / (scale == 0.0f ? 1.0f : scale));
    }
  }
#pragma unroll
  for (int first = 0; first < MINE; first += 4) {
    float scales[4], offsets[4], counts[4];
    if constexpr (KIND == ROW_SPREAD) {
      load_four(scales, a.spread + part * MINE + first), load_four(offsets, a.center + part * MINE + first);
      load_four(counts, a.counts + part * MINE + first);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int n = first + k;
      if constexpr (KIND == ROW_SPREAD) {
        scale = scales[k], offset = offsets[k];
        codes[n] = level_of(a.middles, (x[n] - offset) / (scale == 0.0f ? 1.0f : scale));
      }
      x[n] -= a.decoded[codes[n]] * scale + offset;
      left[n] = absolute(x[n]);
      if constexpr (KIND == ROW_SPREAD) left[n] *= counts[k];
    }
  }
  if (real) store_codes(a.codes + (row * PARTS + part) * BITS, codes);
  for (int entry = 0; entry < ENTRIES; ++entry) {
    const int index = take_largest(left, part).index;
    float error = 0.0f;
#pragma unroll
    for (int n = 0; n < MINE; ++n) error = part * MINE + n == index ? x[n] : error;
    if (real && index / MINE == part) {
      a.values[row * ENTRIES + entry] = rounded<true>(at_most(error));
      if constexpr (INDEX_BYTES == 1) static_cast<u8*>(a.indices)[row * ENTRIES + entry] = u8(index);
      else static_cast<u16*>(a.indices)[row * ENTRIES + entry] = u16(index);
    }
  }
  if (real && !fine) raise(a.faults, NOT_FINITE);
}

#else
// Product codes of two channels. A thread has several tokens and four pairs of channels, whose codebooks lie in shared
// memory and are read once for all of its tokens: of each pair all first factors, all second ones, what is taken away, and
// the largest of each of these.
//
// Which few entries are best is found by fused products, which differ from the codec's by rounding. Where others are as
// good within that, all are tried as the codec does.
constexpr int EACH = 4, SPAN = 512, PAIRS = 4, ENTRIES_OF_PAIR = 256, FEW = 8, ROWS_OF_PAIR = 4;
constexpr float ROUNDING = 9.5367431640625e-07f;  // 2^-20: more than the ten roundings that may lie between two such differences

device float score_of(const float* book, int entry, float x, float y) {
  return (x * book[entry] + y * book[ENTRIES_OF_PAIR + entry]) - book[2 * ENTRIES_OF_PAIR + entry];
}
// The first of the best entries among COUNT from `from` on.
template <int COUNT> device u32 first_of_best(const float* book, int from, float x, float y) {
  float best = as_float(0xFF800000u);
  u32 code = 0;
#pragma unroll 8
  for (int n = 0; n < COUNT; ++n) {
    const float score = score_of(book, from + n, x, y);
    if (score > best) best = score, code = from + n;
  }
  return code;
}

extern "C" global __launch_bounds__(SPAN / EACH) void rarefy_encode_products(const Arguments a) {
  constexpr int OWN = 2 * PAIRS, BOOK = ROWS_OF_PAIR * ENTRIES_OF_PAIR;
  const i64 pair = blockIdx.y, batch = pair / a.heads, head = pair % a.heads;
  const int part = blockIdx.z, first_token = blockIdx.x * SPAN + threadIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(a.lut + (head * (D / 2) + part * PAIRS) * BOOK);
  for (int n = threadIdx.x; n < PAIRS * BOOK / 4; n += SPAN / EACH) reinterpret_cast<uint4*>(pool)[n] = from[n];
  float x[EACH][OWN];
  bool fine[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int token = first_token + k * (SPAN / EACH);
    fine[k] = load_numbers(x[k], a, batch, head, token < a.tokens ? token : a.tokens - 1, part * OWN);
  }
  block_barrier();
  u32 words[EACH] = {};
#pragma unroll
  for (int n = 0; n < PAIRS; ++n) {
    const float* book = reinterpret_cast<const float*>(pool) + n * BOOK;
    float best[EACH], second[EACH];  // of each few entries the best one
    int place[EACH] = {};
#pragma unroll
    for (int k = 0; k < EACH; ++k) best[k] = second[k] = as_float(0xFF800000u);
#pragma unroll 2
    for (int first = 0; first < ENTRIES_OF_PAIR; first += FEW) {
      float most[EACH];
#pragma unroll
      for (int four = 0; four < FEW; four += 4) {
        float left[4], right[4], less[4];
        load_four(left, book + first + four), load_four(right, book + ENTRIES_OF_PAIR + first + four);
        load_four(less, book + 2 * ENTRIES_OF_PAIR + first + four);
#pragma unroll
        for (int each = 0; each < 4; ++each)
#pragma unroll
          for (int k = 0; k < EACH; ++k) {
            const float score = fused_sum(x[k][2 * n], left[each], fused_sum(x[k][2 * n + 1], right[each], -less[each]));
            most[k] = four + each == 0 ? score : max_of(most[k], score);
          }
      }
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const bool better = most[k] > best[k];
        second[k] = max_of(second[k], better ? best[k] : most[k]);
        if (better) best[k] = most[k], place[k] = first;
      }
    }
    float largest[4];
    load_four(largest, book + 3 * ENTRIES_OF_PAIR);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const float one = x[k][2 * n], two = x[k][2 * n + 1];
      const float reach = absolute(one) * largest[0] + absolute(two) * largest[1] + largest[2];
      u32 code;
      if (best[k] - second[k] > ROUNDING * reach) code = first_of_best<FEW>(book, place[k], one, two);
      else code = first_of_best<ENTRIES_OF_PAIR>(book, 0, one, two);
      words[k] |= code << 8 * n;
    }
  }
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int token = first_token + k * (SPAN / EACH);
    if (token >= a.tokens) continue;
    a.codes[(pair * a.tokens + token) * (D / OWN) + part] = words[k];
    if (!fine[k]) raise(a.faults, NOT_FINITE);
  }
}
#endif
