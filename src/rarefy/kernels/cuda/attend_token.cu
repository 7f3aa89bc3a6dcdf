// Attention of one new token of each sequence over the keys and values that are cached of it, on tensor cores: a step's
// launch between the projections of q, k, v and that of the mixed heads. It norms and turns heads, and stores the token's
// own key and value.
//
// A block has one head of one sequence, or a share of its tokens; a warp of it takes 16 tokens at a time. Query heads of
// the head are rows of mma.m16n8k16, tokens its columns: a lane loads 8 channels of a token at once, and since it has the
// same ones of a query, that channels then follow each other in another order changes nothing. Shares of tokens are
// operands of the second product just where the first one leaves them; values are turned by `movmatrix`.
//
// Keys and values are cached as they are, or in E4M3, a token's part of a head with a step of its own. A token attends to
// what is cached of itself, too. Steps enter scores of keys, and shares of values before these are rounded.
//
// Macros: HALF (float16, else bfloat16), CHANNELS (64 or 128), GROUP (query heads of a head, at most 8), WARPS, Q_KIND
// and K_KIND (norms of heads: 0 none, 1 by a gain, 2 by one plus a gain), CAPPED (scores are), WINDOW (tokens are),
// FLOAT8 (what is cached is).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
#if FLOAT8
typedef u8 Cached;
#else
typedef u16 Cached;
#endif

struct Arguments {
  const u16* q;          // [sequences][heads * GROUP][CHANNELS], sequences q_stride apart
  const u16* k;          // [sequences][heads][CHANNELS], k_stride apart
  const u16* v;          // likewise, v_stride apart
  Cached* keys;          // [sequences][heads][capacity][CHANNELS], sequence_stride and head_stride apart
  Cached* values;        // likewise
  u16* key_steps;        // of E4M3, bfloat16 [sequences][heads][capacity], all finite; an even capacity
  u16* value_steps;      // likewise
  const int* positions;  // [sequences]: tokens before this one
  const u16* turns;      // [positions][2][CHANNELS / 2]: cosines and sines
  const u16* q_gain;     // [CHANNELS]
  const u16* k_gain;     // [CHANNELS]
  u16* out;              // [sequences][heads * GROUP][CHANNELS]
  float* part;           // [sequences * heads][splits][GROUP][CHANNELS + 2]: sums, then their scale and their weight
  u32* arrived;          // [sequences * heads], zero before and after
  i64 sequence_stride, head_stride;
  int q_stride, k_stride, v_stride, heads, least, window;
  float q_eps, k_eps, scale, softcap;
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif
#if FLOAT8
#include "float8.cuh"
#endif

shared_memory(pool);

constexpr int THREADS = 32 * WARPS;
constexpr int J = CHANNELS / 32;      // times 8 channels of a lane
constexpr int PITCH = CHANNELS + 4;   // floats of a head that warps leave for each other
constexpr int TILE = 16;              // tokens of a warp
constexpr float LOG_2_E = 1.4426950408889634f;
constexpr float NOTHING = -1e30f;     // the score of what is not seen
constexpr float MOST = 448.0f;        // of E4M3
constexpr float LEAST = 1e-30f;       // of a head; less is nothing
constexpr float GROWN = FLOAT8 ? 512.0f : 1.0f;  // sums of values, so that shares times steps are no subnormals

// Eight channels at a time: 32 j + 8 t and those after it.
struct Numbers { float at[J][8]; };
struct Words { u32 at[J][4]; };
// The same of what is cached, for the tokens g and g + 8 of a tile; steps are of the tokens 2 t and 2 t + 1 and those 8
// after them.
#if FLOAT8
struct Tile { u32 rows[2][J][2], steps[2]; };
device u32 pair_at(const Tile& own, int n, int j, int h) { return numbers_of_float8(own.rows[n][j][h / 2], h % 2); }
device float step_at(const Tile& own, int n, int e) { return as_float(e ? own.steps[n] & 0xFFFF0000u : own.steps[n] << 16); }
#else
struct Tile { u32 rows[2][J][4]; };
device u32 pair_at(const Tile& own, int n, int j, int h) { return own.rows[n][j][h]; }
device float step_at(const Tile& own, int n, int e) { return 1.0f; }
#endif

device void put(u32 (&to)[4], const uint4& words) { to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w; }
device u32 pair_of(float low, float high) { return HALF ? half_pair(low, high) : bf16_pair(low, high); }
device float as_rounded(float value) { return widened(rounded<HALF>(value)); }

device void load(Words& to, const u16* from, int t, bool real) {
#pragma unroll
  for (int j = 0; j < J; ++j) put(to.at[j], load_fresh(reinterpret_cast<const uint4*>(from + 32 * j + 8 * t), real));
}

device void widen(Numbers& to, const Words& from) {
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int n = 0; n < 8; ++n) to.at[j][n] = widened(u16(from.at[j][n / 2] >> 16 * (n % 2)));
}

// A head, normed and turned, in `head`. Cosines and sines of a lane's channels are the first and the second half of `turn`.
template <int KIND> device void norm_and_turn(Words& head, const u16* gain, float eps, const Words& turn, int t) {
  Numbers x, turns;
  widen(x, head);
  widen(turns, turn);
  if constexpr (KIND != 0) {
    Words words;
    Numbers gains;
    load(words, gain, t, true);
    widen(gains, words);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int n = 0; n < 8; ++n) squares += x.at[j][n] * x.at[j][n];
    const float factor = inverse_root(sum_of_four(squares) / CHANNELS + eps);
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float scaled = x.at[j][n] * factor;
        x.at[j][n] = as_rounded(KIND == 2 ? scaled * (1.0f + gains.at[j][n]) : as_rounded(scaled) * gains.at[j][n]);
      }
  }
#pragma unroll
  for (int j = 0; j < J / 2; ++j)
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      float low[2], high[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float cosine = turns.at[j][n + e], sine = turns.at[j + J / 2][n + e];
        low[e] = x.at[j][n + e] * cosine - x.at[j + J / 2][n + e] * sine;
        high[e] = x.at[j + J / 2][n + e] * cosine + x.at[j][n + e] * sine;
      }
      head.at[j][n / 2] = pair_of(low[0], low[1]);
      head.at[j + J / 2][n / 2] = pair_of(high[0], high[1]);
    }
}

// Keys or values of a tile, zeros where `first` and `end` leave tokens out.
device void load(Tile& to, const Cached* from, const u16* steps, int tile, int first, int end, int lane) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int token = TILE * tile + 8 * n + lane / 4;
    const Cached* row = from + i64(token) * CHANNELS + 8 * (lane % 4);
    const bool real = token >= first && token < end;
#pragma unroll
    for (int j = 0; j < J; ++j) {
#if FLOAT8
      const uint2 words = load_fresh(reinterpret_cast<const uint2*>(row + 32 * j), real);
      to.rows[n][j][0] = words.x, to.rows[n][j][1] = words.y;
#else
      put(to.rows[n][j], load_fresh(reinterpret_cast<const uint4*>(row + 32 * j), real));
#endif
    }
#if FLOAT8
    const int pair = TILE * tile + 8 * n + 2 * (lane % 4);
    to.steps[n] = load_fresh(reinterpret_cast<const u32*>(steps + pair), pair < end);
#endif
  }
}

#if FLOAT8
// A head in E4M3: stored at `place` with its step, and as later tokens will see it.
device void store(Numbers& head, Cached* place, u16* step, int t, bool writes) {
  float most = 0.0f;
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int n = 0; n < 8; ++n) most = max_of(most, absolute(head.at[j][n]));
  most = max_of(most, of_lane_xor(most, 1));
  most = max_of(most, of_lane_xor(most, 2));
  const u16 bits = most > LEAST ? rounded<false>(most / MOST) : 0x3F80;
  const float size = as_float(u32(bits) << 16), inverse = 1.0f / size;
#pragma unroll
  for (int j = 0; j < J; ++j) {
    u32 words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float* own = head.at[j] + 4 * w;
      words[w] = e4m3_pair(own[0] * inverse, own[1] * inverse) | u32(e4m3_pair(own[2] * inverse, own[3] * inverse)) << 16;
#pragma unroll
      for (int n = 0; n < 4; ++n) head.at[j][4 * w + n] = size * widened(u16(numbers_of_float8(words[w], n / 2) >> 16 * (n % 2)));
    }
    if (writes) *reinterpret_cast<uint2*>(place + 32 * j + 8 * t) = {words[0], words[1]};
  }
  if (writes && t == 0) *step = bits;
}
#endif

// In units of log 2.
device float scored(const Arguments& a, float product) {
  if constexpr (CAPPED) {
    const float grown = power_of_two(2.0f * LOG_2_E * product * a.scale / a.softcap);  // tanh x = 1 - 2 / (1 + e^2x)
    return LOG_2_E * a.softcap * (1.0f - 2.0f / (1.0f + grown));
  }
  return LOG_2_E * a.scale * product;
}

// What a warp has seen: for the head of lane / 4 the largest score, and in units of it the lane's weights and their sums.
struct Seen {
  float top, total, mixed[J][4][4];
};

device void see(Seen& own, const Arguments& a, const Words& query, const Tile& keys, const Tile& values, int tile, int first, int end, int t, u32 (&shares)[4]) {
  float scores[2][4] = {};
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int h = 0; h < 4; h += 2) {
        const u32 heads[4] = {query.at[j][h], 0, query.at[j][h + 1], 0};
        multiply(scores[n], heads, pair_at(keys, n, j, h), pair_at(keys, n, j, h + 1));
      }
  float top = own.top;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = TILE * tile + 8 * n + 2 * t + e;
      scores[n][e] = token >= first && token < end ? scored(a, scores[n][e] * step_at(keys, n, e)) : NOTHING;
      top = max_of(top, scores[n][e]);
    }
  top = max_of(top, of_lane_xor(top, 1));
  top = max_of(top, of_lane_xor(top, 2));
  const float fade = power_of_two(own.top - top);
  own.top = top, own.total *= fade;
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int w = 0; w < 4; ++w) own.mixed[j][w][0] *= fade, own.mixed[j][w][1] *= fade;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      scores[n][e] = scores[n][e] == NOTHING ? 0.0f : power_of_two(scores[n][e] - top);
      own.total += scores[n][e];
      scores[n][e] *= GROWN * step_at(values, n, e);
    }
    shares[2 * n] = pair_of(scores[n][0], scores[n][1]), shares[2 * n + 1] = 0;
  }
}

device void mix(Seen& own, const u32 (&shares)[4], const Tile& values) {
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int w = 0; w < 4; ++w)
      multiply(own.mixed[j][w], shares, transposed(pair_at(values, 0, j, w)), transposed(pair_at(values, 1, j, w)));
}

// One number of a head from `count` parts: their sums, scales and weights. Leaves the common scale and weight.
template <class Sum, class Scale, class Weight>
device float merged(int count, const Sum& sum, const Scale& scale, const Weight& weight, float& top, float& total) {
  float found = 0.0f;
  top = NOTHING, total = 0.0f;
  for (int n = 0; n < count; ++n) top = max_of(top, scale(n));
  for (int n = 0; n < count; ++n) {
    const float factor = power_of_two(scale(n) - top);
    total += factor * weight(n), found += factor * sum(n);
  }
  return found;
}

extern "C" global __launch_bounds__(THREADS) void rarefy_attend_token(const Arguments a) {
  start_later_kernels();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int pair = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
  const int sequence = pair / a.heads, head = pair % a.heads;
  // Positions, and what earlier steps cached, no launch of this step writes before its last one.
  const int end = a.positions[sequence];
  const int first = WINDOW && end >= a.window ? end - a.window + 1 : 0;
  const int start = first / TILE, tiles = (end + TILE - 1) / TILE - start;
  const int share = (tiles + splits - 1) / splits, each = share > a.least ? share : a.least;
  const int active = tiles > each ? (tiles + each - 1) / each : 1;
  if (split >= active) return;
  const i64 begin = sequence * a.sequence_stride + head * a.head_stride;
  Cached *own_keys = a.keys + begin, *own_values = a.values + begin;
  u16 *key_steps = a.key_steps + begin / CHANNELS, *value_steps = a.value_steps + begin / CHANNELS;
  const int last = split + 1 < active ? start + (split + 1) * each : start + tiles;
  int tile = start + split * each + warp;
  Tile keys, values;
  Words turn, query, key, value;
  load(keys, own_keys, key_steps, tile, first, tile < last ? end : 0, lane);
  load(values, own_values, value_steps, tile, first, tile < last ? end : 0, lane);
  load(turn, a.turns + i64(end) * CHANNELS, t, true);
  wait_for_earlier_kernels();

  load(query, a.q + i64(sequence) * a.q_stride + (head * GROUP + (g < GROUP ? g : 0)) * CHANNELS, t, g < GROUP);
  const bool has_own = split == 0 && warp == 0;
  load(key, a.k + i64(sequence) * a.k_stride + head * CHANNELS, t, has_own);
  load(value, a.v + i64(sequence) * a.v_stride + head * CHANNELS, t, has_own);
  norm_and_turn<Q_KIND>(query, a.q_gain, a.q_eps, turn, t);
  Seen seen = {};
  seen.top = NOTHING;
  if (has_own) {  // the token's own key and value, which the cache gets too
    norm_and_turn<K_KIND>(key, a.k_gain, a.k_eps, turn, t);
    Numbers wide, other, mixed;
    widen(wide, query), widen(other, key), widen(mixed, value);
    const i64 place = i64(end) * CHANNELS;
#if FLOAT8
    store(other, own_keys + place, key_steps + end, t, g == 0);
    store(mixed, own_values + place, value_steps + end, t, g == 0);
#else
    if (g == 0)
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const i64 at = place + 32 * j + 8 * t;
        *reinterpret_cast<uint4*>(own_keys + at) = {key.at[j][0], key.at[j][1], key.at[j][2], key.at[j][3]};
        *reinterpret_cast<uint4*>(own_values + at) = {value.at[j][0], value.at[j][1], value.at[j][2], value.at[j][3]};
      }
#endif
    float product = 0.0f;
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int n = 0; n < 8; ++n) product += wide.at[j][n] * other.at[j][n];
    seen.top = scored(a, sum_of_four(product));
    seen.total = t == 0;
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int n = 0; n < 8; ++n) seen.mixed[j][n / 2][n % 2] = GROWN * mixed.at[j][n];
  }
  while (tile < last) {
    u32 shares[4];
    see(seen, a, query, keys, values, tile, first, end, t, shares);
    const int next = tile + WARPS;
    if (next < last) load(keys, own_keys, key_steps, next, first, end, lane);
    mix(seen, shares, values);
    if (next < last) load(values, own_values, value_steps, next, first, end, lane);
    tile = next;
  }

  // Warps meet in shared memory, blocks that share a head's tokens in device memory.
  float* meeting = reinterpret_cast<float*>(pool);
  seen.total = sum_of_four(seen.total);
  if (g < GROUP) {
    float* own = meeting + (warp * GROUP + g) * PITCH;
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int n = 0; n < 8; ++n) own[32 * j + 8 * t + n] = seen.mixed[j][n / 2][n % 2] / GROWN;
    if (t == 0) own[CHANNELS] = seen.top, own[CHANNELS + 1] = seen.total;
  }
  block_barrier();
  u16* out = a.out + i64(pair) * GROUP * CHANNELS;
  float* part = a.part + i64(pair) * splits * GROUP * (CHANNELS + 2);
  for (int n = threadIdx.x; n < GROUP * CHANNELS; n += THREADS) {
    const float* own = meeting + n / CHANNELS * PITCH;
    const auto at = [&](int number, int channel) { return own[number * GROUP * PITCH + channel]; };
    float top, total;
    const float sum = merged(
        WARPS, [&](int number) { return at(number, n % CHANNELS); }, [&](int number) { return at(number, CHANNELS); },
        [&](int number) { return at(number, CHANNELS + 1); }, top, total);
    if (active == 1) {
      out[n] = rounded<HALF>(sum / total);
      continue;
    }
    float* to = part + (split * GROUP + n / CHANNELS) * (CHANNELS + 2);
    to[n % CHANNELS] = sum;
    if (n % CHANNELS == 0) to[CHANNELS] = top, to[CHANNELS + 1] = total;
  }
  if (active == 1 || !last_to_arrive(a.arrived + pair, active)) return;
  for (int n = threadIdx.x; n < GROUP * CHANNELS; n += THREADS) {
    const float* own = part + n / CHANNELS * (CHANNELS + 2);
    const auto at = [&](int number, int channel) { return load_fresh(own + number * GROUP * (CHANNELS + 2) + channel); };
    float top, total;
    const float sum = merged(
        active, [&](int number) { return at(number, n % CHANNELS); }, [&](int number) { return at(number, CHANNELS); },
        [&](int number) { return at(number, CHANNELS + 1); }, top, total);
    out[n] = rounded<HALF>(sum / total);
  }
}
