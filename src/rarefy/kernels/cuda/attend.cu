// Attention of one new token over keys and values in code: all query heads of one KV head, 128 channels.
//
// A warp takes tiles of 128 tokens, or of 64 where there are fewer tiles than warps. Its tensor-core products have
// codes as the left operand and query heads as columns, so that codes need no padding, and numbers are taken out of
// words where they were loaded: a lane holds 16 neighbouring tokens (of keys) or channels (of values), and which row of
// a product each of them is does not matter. The bits of a uniform code are at once a float16 below the smallest normal
// one, `code * 2^(shift - 24)`, which products take without loss; powers of two, scales and zeros go into the query,
// the weights and the sums. Where several groups meet, steps go into the numbers, and their zeros are a product of
// their own. A table has an entry for two codes at once, of which every lane has its own copy; codebooks have a bank
// for each of 32 parts of a vector, and lanes take parts in different orders, so that no lookup ever waits for another.
//
// What fills no tile, in code or not, and the sinks are the rest: a warp takes a few tokens of it one by one.
//
// Macros: K_KIND, V_KIND, K_BITS, V_BITS, K_GROUP, V_GROUP (tokens or channels that share a scale), K_SCALE, K_OFFSET,
// V_OFFSET, K_SPREAD (keys have a center and a spread for each channel), TURNED (keys are without RoPE), JOINED (a
// token's row is that of all heads), K_ENTRIES, V_ENTRIES, INDEX_BYTES (outliers of a token, or of a channel of a tile,
// and their indices), K_RANK, V_RANK (of a matrix that is added to a tile), K_ROTATED, V_ROTATED (what is in code was
// turned by signs and a Hadamard matrix), SAME_TABLE, GROUP_HEADS, QUERY, EXACT (types of the query and of what is not
// in code), SINKS, WARPS, BLOCKS (of a multiprocessor), DEPTH (parts of a tile that are loaded ahead: 16 tokens, or
// channels of keys by channel), TILE (its tokens; 128 where keys are by channel); HALF is 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

enum { CHANNEL = 1, TOKEN = 2, TABLE = 3, PRODUCT = 4, FLOAT8 = 5 };
enum { F32 = 1, F16 = 2, BF16 = 3 };
enum {
  K_CODES, K_STEPS, K_ZEROS, V_CODES, V_STEPS, V_ZEROS, K_TOKENS, V_TOKENS,
  K_OUT, K_OUT_AT, V_OUT, V_OUT_AT, K_LEFT, K_RIGHT, V_LEFT, V_RIGHT, PLACES
};

struct Pair {
  int number, batch, head;  // of sequences and KV heads
};

struct Arguments {
  const void* query;   // [pairs * GROUP_HEADS][128]
  void* out;           // likewise
  float* lse;          // [pairs * GROUP_HEADS]
  const i64* places;   // [PLACES][tiles]: addresses for the first pair, and tokens from one pair to the next
  const i64* pieces;   // likewise of every 32 tokens in code after them
  const float* k_signs;
  const float* v_signs;
  const u16* k_order;  // [heads][128]: which channels keys in code have one after the other; or null
  const u16* k_table;  // float16 [entries], or [heads][256][64][2] of products, in the order of `place_of_part`
  const u16* v_table;
  const float* k_center;  // [heads][128]
  const float* k_spread;
  const u32* turns;       // [places of a tile][TURN_ROW], as `turn_at` says
  const float* starts;    // [batch][count_of_starts][32][4]: those of tiles' first positions, as `start_at` says
  const i64* sinks;       // [batch][SINKS]: tokens that are left out
  float* part_out;     // [pairs * GROUP_HEADS][splits][128]
  float* part_lse;     // [pairs * GROUP_HEADS][splits]
  u32* arrived;        // [pairs], zero before and after
  const void* k_tail;  // [pairs][tokens not in code][128]
  const void* v_tail;
  const void* k_sink;  // [pairs][SINKS][128]
  const void* v_sink;
  int tiles, heads, splits, count_of_pieces, count_of_starts;
  int k_coded, v_coded, length;  // tokens in code, and all
  float scaling;
};

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

shared_memory(pool);

constexpr int THREADS = 32 * WARPS, D = 128;
constexpr int STEPS = D / 16, ROWS = TILE / 16;  // that channels take in products, and tokens
constexpr int K_GROUPS = TILE / K_GROUP, V_GROUPS = D / V_GROUP;
constexpr bool K_CORRECTED = K_ENTRIES + K_RANK > 0, V_CORRECTED = V_ENTRIES + V_RANK > 0;
constexpr bool FOLDED = K_KIND == CHANNEL && K_GROUPS == 1 && !K_CORRECTED;  // scales go into the query
constexpr bool K_AFFINE = K_KIND == CHANNEL && !FOLDED, V_AFFINE = V_KIND == TOKEN && (V_GROUPS > 1 || V_CORRECTED);
constexpr float K_UP = FOLDED ? 16.0f : 1.0f, V_UP = 16.0f;  // keeps products with scales normal
constexpr float STEP_UP = 16.0f;                             // steps are taken so much smaller where groups meet
constexpr int MIDDLE = 3;                                    // the shift whose codes meet the query as it is
constexpr float HADAMARD = 0.08838834764831845f;             // makes the matrix its own inverse

constexpr int TABLE_ROW = 256;  // bytes for what two codes stand for: of keys for each lane, then of values
constexpr int TURN_ROW = 72;    // words for the angles of a place, so that lanes read different banks
constexpr int PAIRS = (GROUP_HEADS + 1) / 2;  // of heads, whose numbers share a word

// ---- Shared memory: tables, then scales of each warp, two tiles of them; sums of warps come in the place of all.

constexpr int table_bytes(int kind, int bits) { return kind == TABLE ? TABLE_ROW << 2 * bits : 0; }
constexpr int TABLES = table_bytes(K_KIND, K_BITS) > table_bytes(V_KIND, V_BITS) ? table_bytes(K_KIND, K_BITS) : table_bytes(V_KIND, V_BITS);
constexpr int K_BOOK = K_KIND == PRODUCT ? 64 * 1024 : 0, V_BOOK = V_KIND == PRODUCT ? 64 * 1024 : 0;
constexpr int K_TABLE = K_KIND == TABLE ? 0 : TABLES, V_TABLE = V_KIND == TABLE ? (SAME_TABLE ? 0 : TABLE_ROW / 2) : TABLES + K_BOOK;
constexpr int TURNS = TABLES + K_BOOK + V_BOOK;
constexpr int SCALES = TURNS + (TURNED ? 4 * TURN_ROW * TILE : 0);
constexpr int K_SPAN = K_KIND == CHANNEL ? 256 * K_GROUPS : K_SCALE ? 2 * TILE : 0;  // bytes of a tile's scales, and of its zeros
constexpr int V_SPAN = V_KIND == TOKEN ? 2 * TILE * V_GROUPS : V_KIND == PRODUCT ? 0 : 2 * TILE;
constexpr int K_ZERO_SPAN = K_KIND == CHANNEL || K_KIND == TOKEN || K_OFFSET ? K_SPAN : 0;
constexpr int V_ZERO_SPAN = V_KIND == TOKEN || V_OFFSET ? V_SPAN : 0;
constexpr int START_SPAN = TURNED ? 4 * D : 0;  // cosines and sines of a tile's first position
constexpr int BUFFER = K_SPAN + K_ZERO_SPAN + V_SPAN + V_ZERO_SPAN;
constexpr int MAIN = SCALES + 2 * WARPS * BUFFER, SUMS = WARPS * 4 * 8 * (D + 2);
constexpr int ASKED = MAIN > SUMS ? MAIN : SUMS;       // float: the query for exact keys, then for keys in code
constexpr int LINED = ASKED + 2 * 4 * GROUP_HEADS * D;  // the query as `turn_query` reads it, or as outliers of keys do
constexpr int CENTERS = LINED + (TURNED ? 32 * D : K_ENTRIES > 0 && K_KIND != CHANNEL ? 4 * PAIRS * D : 0);
constexpr int OWN = CENTERS + (K_SPREAD ? 8 * D : 0);  // float: centers and spreads of channels; then what each warp has
constexpr int REST_PARTS = V_ROTATED ? 2 : 1, REST_OF_WARP = REST_PARTS * GROUP_HEADS * D + 16;  // numbers
constexpr bool REST_LAST = TURNED;  // in the place of what tiles need, of which there is much

device float power(int exponent) { return as_float(u32(127 + exponent) << 23); }
device float never() { return as_float(0xFF800000u); }  // minus infinity: the score of what is not there
template <int TYPE> device float number_of(u32 bits) {
  return TYPE == F16 ? half_value(u16(bits)) : as_float(bits << 16);
}
template <int TYPE> device float number_at(const void* base, i64 index) {
  if constexpr (TYPE == F32) return static_cast<const float*>(base)[index];
  else return number_of<TYPE>(static_cast<const u16*>(base)[index]);
}

device void two_shared(float (&x)[2], const float* from) {
  const uint2 both = *reinterpret_cast<const uint2*>(from);
  x[0] = as_float(both.x), x[1] = as_float(both.y);
}

#include "attend_codes.cuh"

#include "attend_places.cuh"

// The query as keys of this lane meet it: pairs of channels; and its sums, or what the centers of channels add.
device void load_query(
    u32 (&query)[STEPS][2], float (&sums)[2], const float* asked, const float* center, const float* spread, int g, int t) {
  float sum = 0.0f;
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int number = 2 * step + half;
      int first = 32 * t + 2 * number, second = first + 1;
      float up = K_UP;
      if constexpr (K_KIND == CHANNEL) first = 16 * step + 4 * t + 2 * half, second = first + 1;
      if constexpr (K_KIND == TOKEN) {
        first = 32 * t + first_of(K_BITS, number), second = first + distance_of(K_BITS);
        up = power(MIDDLE - shift_of(K_BITS, first_of(K_BITS, number)));
      }
      float x = g < GROUP_HEADS ? asked[g * D + first] : 0.0f, y = g < GROUP_HEADS ? asked[g * D + second] : 0.0f;
      if constexpr (K_SPREAD) {
        sum += x * center[first] + y * center[second];
        x *= spread[first], y *= spread[second];
      }
      query[step][half] = half_pair(x * up, y * up);
      if constexpr (!K_SPREAD) sum += (half_value(u16(query[step][half])) + half_value(u16(query[step][half] >> 16))) / up;
    }
  // Of head g over the lanes of its channels, then of the two heads whose scores a lane has.
  sum += of_lane_xor(sum, 1), sum += of_lane_xor(sum, 2);
  sums[0] = of_lane(sum, 8 * t), sums[1] = of_lane(sum, 8 * t + 4);
}

// The table of all heads, or the codebook of this one.
template <int KIND> device const u16* table_of(const u16* tables, int head) {
  return KIND == PRODUCT ? tables + head * (256 * D) : tables;
}
template <int COUNT> constexpr int EACH = (COUNT + THREADS - 1) / THREADS;  // of so many numbers that a block reads, those of a thread

// A table for all lanes is read in two steps, so that nothing waits between; a codebook is copied as it is.
template <int KIND, int BITS> constexpr int WORDS_OF_TABLE = EACH<KIND == TABLE ? 8 << 2 * BITS : 1>;
template <int KIND, int BITS> device void load_table(u32 (&words)[WORDS_OF_TABLE<KIND, BITS>], u8* to, const u16* from) {
  if constexpr (KIND == TABLE) {
#pragma unroll
    for (int k = 0; k < WORDS_OF_TABLE<KIND, BITS>; ++k) {
      const int two = (k * THREADS + threadIdx.x) / 8;
      words[k] = from[two % (1 << BITS)] | u32(from[two >> BITS & ((1 << BITS) - 1)]) << 16;
    }
  } else if constexpr (KIND == PRODUCT) {
    for (int n = threadIdx.x; n < 4096; n += THREADS) copy_async(to + 16 * n, from + 8 * n, true);
  }
}
template <int KIND, int BITS> device void store_table(u8* to, const u32 (&words)[WORDS_OF_TABLE<KIND, BITS>]) {
  if constexpr (KIND == TABLE)
#pragma unroll
    for (int k = 0; k < WORDS_OF_TABLE<KIND, BITS>; ++k) {
      const int n = k * THREADS + threadIdx.x;  // four lanes' copies at once
      const u32 two = words[k];
      if ((8 << 2 * BITS) % THREADS == 0 || n < 8 << 2 * BITS) *reinterpret_cast<uint4*>(to + n / 8 * TABLE_ROW + n % 8 * 16) = {two, two, two, two};
    }
}

#include "attend_turns.cuh"
#include "attend_corrections.cuh"

// What a warp has beside scales: a tile's first position, corrections, and what `take_rest` leaves.
constexpr int OF_TILES = START_SPAN + CORRECTIONS_OF_WARP, REST_AT = REST_LAST ? 0 : OF_TILES;
constexpr int OWN_OF_WARP = REST_AT + 4 * REST_OF_WARP > OF_TILES ? REST_AT + 4 * REST_OF_WARP : OF_TILES;

#include "attend_rest.cuh"
#include "attend_merge.cuh"

extern "C" global __launch_bounds__(THREADS, BLOCKS) void rarefy_attend(const Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = blockIdx.x, stride = a.splits * WARPS;
  const Pair pair = {int(blockIdx.y), int(blockIdx.y) / a.heads, int(blockIdx.y) % a.heads};
  const int head_of_row = JOINED ? pair.head : 0;
  const int k_lane = keys_of_lane(g, t, pair.head, a.heads), v_lane = values_of_lane(g, t, pair.head, a.heads);
  const u32 own = 4 * lane;  // this lane's copy of tables; of codebooks, its first bank:
  const u32 k_bank = 4 * (K_PARTS * t + g), v_bank = 4 * (V_PARTS * g + t);
  wait_for_earlier_kernels();

  // All that is read before the first tile is asked for at once, and the tile with it.
  u32 k_words[WORDS_OF_TABLE<K_KIND, K_BITS>], v_words[WORDS_OF_TABLE<V_KIND, V_BITS>];
  load_table<K_KIND, K_BITS>(k_words, pool + K_TABLE, table_of<K_KIND>(a.k_table, pair.head));
  if constexpr (!SAME_TABLE) load_table<V_KIND, V_BITS>(v_words, pool + V_TABLE, table_of<V_KIND>(a.v_table, pair.head));
  u32* turns = reinterpret_cast<u32*>(pool + TURNS);
  if constexpr (TURNED) fill_turns(pool + TURNS, a.turns);
  commit_copies();
  float* asked = reinterpret_cast<float*>(pool + ASKED);
  float *asked_coded = asked + GROUP_HEADS * D, *center = reinterpret_cast<float*>(pool + CENTERS), *spread = center + D;
  const auto asked_number = [&](int head, int channel) {
    return number_at<QUERY>(a.query, (i64(pair.number) * GROUP_HEADS + head) * D + channel) * a.scaling;
  };
  constexpr int NUMBERS = EACH<GROUP_HEADS * D>;
  float numbers[NUMBERS], coded[NUMBERS];
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) {
    const int n = (k * THREADS + threadIdx.x) % (GROUP_HEADS * D), channel = n % D;
    numbers[k] = coded[k] = asked_number(n / D, channel);
    if constexpr (K_ROTATED) coded[k] *= a.k_signs[channel] * HADAMARD;
    if constexpr (K_KIND == PRODUCT)
      if (a.k_order != nullptr) coded[k] = asked_number(n / D, a.k_order[pair.head * D + channel]);
  }
  float lined[LINED_EACH];
  if constexpr (TURNED) line_up(lined, asked_number);
  uint4 spread_words = {};
  if constexpr (K_SPREAD && TURNED) spread_words = spread_of(a.k_center + pair.head * D, a.k_spread + pair.head * D);

  u32 ring[DEPTH][MOST_WORDS];
  u8* buffers = pool + SCALES + warp * 2 * BUFFER;
  u8* own_place = pool + OWN + warp * OWN_OF_WARP;
  const Corrections corrections = corrections_at(own_place + START_SPAN);
  const int number = warp * a.splits + split;  // of this warp, so that few tiles are shared by all blocks
  const float* starts = a.starts + i64(pair.batch) * a.count_of_starts * D;
  int tile = number, parity = 0;
  Places here = {}, next = {};
  if (tile < a.tiles) {
    here = places_of(a.places, a.tiles, tile, pair, a.heads);
    copy_scales(buffers, own_place, here, starts + i64(tile) * D, lane);
    copy_k_corrections(corrections, here, lane);
    commit_copies();
    copy_v_corrections(corrections, here, lane);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) fetch_keys(ring[step], here.k_codes + k_lane, step, a.heads);
  } else {
    commit_copies();
  }
  commit_copies();

  store_table<K_KIND, K_BITS>(pool + K_TABLE, k_words);
  if constexpr (!SAME_TABLE) store_table<V_KIND, V_BITS>(pool + V_TABLE, v_words);
  clear_scattered(corrections, lane);
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) {
    const int n = k * THREADS + threadIdx.x;
    if (n < GROUP_HEADS * D) asked[n] = numbers[k], asked_coded[n] = coded[k];
  }
#pragma unroll
  for (int k = 0; k < LINED_EACH; ++k)
    if (const int n = k * THREADS + threadIdx.x; TURNED && n < 8 * D) reinterpret_cast<float*>(pool + LINED)[n] = lined[k];
  if constexpr (K_SPREAD && TURNED) {
    if (threadIdx.x < 4 * STEPS) reinterpret_cast<uint4*>(pool + CENTERS)[threadIdx.x] = spread_words;
  } else if constexpr (K_SPREAD) {
    for (int n = threadIdx.x; n < D; n += THREADS) {
      center[n] = a.k_center[pair.head * D + n];
      spread[n] = a.k_spread[pair.head * D + n];
    }
  }
  wait_for_copies<2>();  // but for those of the tile
  block_barrier();
  if constexpr (K_ROTATED) hadamard(asked_coded, GROUP_HEADS);
  if constexpr (K_ONE_BY_ONE && !TURNED) {
    pair_up(reinterpret_cast<u32*>(pool + LINED), asked_coded);
    block_barrier();
  }

  u32 query[STEPS][2];
  uint4 spreads[STEPS];
  float query_sums[2];
  if constexpr (!TURNED) load_query(query, query_sums, asked_coded, center, spread, g, t);
  else if constexpr (K_SPREAD)
#pragma unroll
    for (int n = 0; n < STEPS; ++n) spreads[n] = reinterpret_cast<const uint4*>(pool + CENTERS)[4 * n + t];

  float out[STEPS][4] = {}, under[4] = {};  // and what zeros take away from all of a row's sums
  float top[2] = {never(), never()}, total[2] = {}, lift[2] = {};
  // The last warps have the fewest tiles.
  float* rest = reinterpret_cast<float*>(own_place + REST_AT);
  const auto take_own_rest = [&] { take_rest(a, asked, turns, starts, rest, pair, stride - 1 - number, stride, lane); };
  if constexpr (!REST_LAST) take_own_rest();

  for (; tile < a.tiles; tile += stride) {
    const bool more = tile + stride < a.tiles;
    if (more) next = places_of(a.places, a.tiles, tile + stride, pair, a.heads);
    wait_for_copies<V_CORRECTED>();  // but for corrections of values
    warp_barrier();
    const u8* k_steps = buffers + parity * BUFFER;
    const u8 *k_zeros = k_steps + K_SPAN, *v_steps = k_zeros + K_ZERO_SPAN, *v_zeros = v_steps + V_SPAN;

    // ---- Scores: of rows g and g + 8 of product n, tokens `token_of` for two heads.
    float scores[ROWS][4] = {};
    float zeros[4] = {};
    if constexpr (TURNED) turn_query(query, corrections.turned, pool + LINED, reinterpret_cast<const float*>(own_place), lane);
    if constexpr (K_RANK > 0) score_low_rank(scores, corrections.k_factors, query, g, t);
#pragma unroll
    for (int base = 0; base < ROWS; base += DEPTH) {
#pragma unroll
      for (int ahead = 0; ahead < DEPTH; ++ahead) {
        const int step = base + ahead;
        u32(&slot)[MOST_WORDS] = ring[ahead];
        float sums[4] = {}, second[4] = {};  // by turns, as a product waits for the one before it
        if constexpr (K_KIND == CHANNEL) {
          constexpr int WORDS = words_of(K_BITS, 16);
#pragma unroll
          for (int n = 0; n < 4; ++n) settle_16<K_BITS>(slot + n * WORDS, g);
          const auto channel_of = [&](int k, int half) { return 16 * step + 4 * (k / 2) + 2 * half + k % 2; };
          int at[PUTS<K_ENTRIES>];
          if constexpr (K_ENTRIES > 0)
            scatter<K_ENTRIES, true>(at, corrections.scattered, corrections.k_list, lane, channel_of);
          const int channel = channel_of(2 * t, 0);
          u32 left = query[step][0], right = query[step][1];
          u32 steps[2];
          if constexpr (FOLDED) {
            const uint2 scale = *reinterpret_cast<const uint2*>(k_steps + 2 * channel);
            const uint2 zero = *reinterpret_cast<const uint2*>(k_zeros + 2 * channel);
            left = fused(left, scale.x, 0), right = fused(right, scale.y, 0);
            const u32 all[4] = {zero.x, zero.x, zero.y, zero.y};
            multiply(zeros, all, left, right);
          } else {
            const int group = 16 * g / K_GROUP;
            u32 all[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int one = (channel + 2 * half) * K_GROUPS + group;
              steps[half] = small_steps(halves_at(k_steps, one, one + K_GROUPS));
              all[2 * half] = all[2 * half + 1] = fused(steps[half], halves_at(k_zeros, one, one + K_GROUPS), 0);
            }
            multiply(zeros, all, left, right);
          }
#pragma unroll
          for (int n = 0; n < ROWS; ++n) {
            u32 keys[4];
#pragma unroll
            for (int part = 0; part < 4; ++part) {
              const int half = part / 2, token = 2 * n + part % 2;
              const u32 *one = slot + 2 * half * WORDS, *two = one + WORDS;
              keys[part] = K_AFFINE ? stepped<K_BITS>(one, two, token, steps[half]) : both<K_BITS>(one, two, token);
            }
            multiply(scores[n], keys, left, right);
          }
          if constexpr (K_ENTRIES > 0) add_scattered(scores, corrections, left, right, lane, [&] { take_back(at, corrections); });
        } else if constexpr (TURNED) {
          constexpr int WORDS = words_of(K_BITS, 16);
#pragma unroll
          for (int n = 0; n < 4; ++n) settle_16<K_BITS>(slot + n * WORDS, t), stream_16<K_BITS>(slot + n * WORDS);
          const u32* angles = turns + turn_at(token_of(g, step, 0), 8 * t);
          uint4 angle[2];  // of two pairs of channels, for both tokens
#pragma unroll
          for (int n = 0; n < STEPS; ++n) {
            u32 keys[4];
            if (n % 2 == 0)
#pragma unroll
              for (int row = 0; row < 2; ++row) angle[row] = *reinterpret_cast<const uint4*>(angles + 8 * row * TURN_ROW + 2 * n);
#pragma unroll
            for (int part = 0; part < 4; ++part) {
              const u32* words = slot + (part % 2 * 2 + part / 2) * WORDS;
              keys[part] = looked_up<K_BITS>(pool + K_TABLE, words, 2 * K_BITS * n, own);
              if constexpr (K_SPREAD) keys[part] = fused(keys[part], part < 2 ? spreads[n].x : spreads[n].z, part < 2 ? spreads[n].y : spreads[n].w);
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) {
              if (n % 2 == 0) turn(keys[row], keys[row + 2], angle[row].x, angle[row].y);
              else turn(keys[row], keys[row + 2], angle[row].z, angle[row].w);
            }
            multiply(n % 2 ? second : sums, keys, query[n][0], query[n][1]);
          }
        } else {
          constexpr int WORDS = K_KIND == PRODUCT ? 4 : words_of(K_BITS, 32);
          u32 entries[2][K_PARTS];
#pragma unroll
          for (int n = 0; n < STEPS; ++n) {
            u32 keys[4];
            if constexpr (K_KIND == PRODUCT)
              if (2 * n % K_PARTS == 0)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                  look_up<K_PARTS>(entries[half], pool + K_TABLE, slot + 4 * half, 2 * n / K_PARTS, g, k_bank);
#pragma unroll
            for (int part = 0; part < 4; ++part) {
              const u32* words = slot + part % 2 * WORDS;
              const int number = 2 * n + part / 2;
              if constexpr (K_KIND == TOKEN) keys[part] = apart<K_BITS>(words, number);
              else if constexpr (K_KIND == TABLE)
                keys[part] = looked_up<K_BITS>(pool + K_TABLE, words, 2 * K_BITS * number, own);
              else if constexpr (K_KIND == FLOAT8) keys[part] = halves_of_e4m3(u16(words[number / 2] >> 16 * (number % 2)));
              else keys[part] = entries[part % 2][number % K_PARTS];
            }
            multiply(n % 2 ? second : sums, keys, query[n][0], query[n][1]);
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[n] += second[n];
        if constexpr (K_KIND != CHANNEL)
#pragma unroll
          for (int n = 0; n < 4; ++n) scores[step][n] = sums[n];
        if (base + DEPTH < ROWS) fetch_keys(slot, here.k_codes + k_lane, step + DEPTH, a.heads);
        else fetch_values(slot, here.v_codes + v_lane, ahead, a.heads);
      }
    }

    // Both take long to be found, and do not wait for each other.
    if constexpr (JOINED && V_ENTRIES > 0) wait_for_copies<0>();
    if constexpr (JOINED || TURNED) warp_barrier();
    OwnOutliers<V_ENTRIES> own_outliers;
    if constexpr (V_ENTRIES > 0 && JOINED) find_own<V_ENTRIES>(own_outliers, corrections.v_list, head_of_row, lane);
    if constexpr (K_ONE_BY_ONE) {
      score_outliers(corrections, turns, reinterpret_cast<const u32*>(pool + LINED), head_of_row, lane);
    }
    if constexpr (K_CORRECTED || TURNED) warp_barrier();
    if (more) copy_scales(buffers + (1 - parity) * BUFFER, own_place, next, starts + i64(tile + stride) * D, lane);
    if (more) copy_k_corrections(corrections, next, lane);
    commit_copies();

    // ---- Weights.
    float peak[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < ROWS; ++n) {
      float scale[2] = {1.0f, 1.0f}, shift[2] = {};
      if constexpr (FOLDED) {
#pragma unroll
        for (int row = 0; row < 2; ++row) scale[row] = power(24 - shift_of(K_BITS, 2 * n + row)) / K_UP;
      }
      if constexpr (K_KIND == TOKEN || (K_KIND != CHANNEL && K_SCALE)) {
        const u32 steps = two_rows(k_steps, g, n);
        scale[0] = half_value(u16(steps)), scale[1] = half_value(u16(steps >> 16));
        if constexpr (K_KIND == TOKEN || K_OFFSET) {
          const u32 offsets = two_rows(k_zeros, g, n);
          shift[0] = half_value(u16(offsets)), shift[1] = half_value(u16(offsets >> 16));
        }
        if constexpr (K_KIND == TOKEN)
#pragma unroll
          for (int row = 0; row < 2; ++row) shift[row] *= -scale[row], scale[row] *= power(24 - MIDDLE);
      }
      u32 beside[2] = {};
      if constexpr (K_ONE_BY_ONE)
        if (t < PAIRS)
#pragma unroll
          for (int row = 0; row < 2; ++row) beside[row] = corrections.beside[token_of(g, n, row) * PAIRS + t];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int row = part / 2, head = part % 2;
        float score = scores[n][part] * scale[row];
        if constexpr (FOLDED) score -= zeros[part] / K_UP;
        if constexpr (K_AFFINE) score = (score - zeros[part]) * STEP_UP;
        if constexpr (K_KIND == TOKEN || K_OFFSET) score += shift[row] * query_sums[head];
        if constexpr (K_SPREAD && !TURNED) score += query_sums[head];
        if constexpr (K_ONE_BY_ONE) score += half_value(u16(beside[row] >> 16 * head));
        scores[n][part] = score;
      }
    }
    if constexpr (SINKS > 0) {
      for (int sink = 0; sink < SINKS; ++sink) {
        const i64 token = a.sinks[pair.batch * SINKS + sink] - i64(tile) * TILE;
        if (token < 0 || token >= TILE) continue;
#pragma unroll
        for (int n = 0; n < ROWS; ++n)
#pragma unroll
          for (int part = 0; part < 4; ++part)
            if (token_of(g, n, part / 2) == token) scores[n][part] = never();
      }
    }
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int part = 0; part < 4; ++part) peak[part % 2] = max_of(peak[part % 2], scores[n][part]);
    float safe[2], fade[2];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        peak[head] = max_of(peak[head], of_lane_xor(peak[head], distance));
      safe[head] = peak[head] == never() ? 0.0f : peak[head];
      fade[head] = power_of_two(top[head] - safe[head]);
      top[head] = peak[head];
      total[head] *= fade[head], lift[head] *= fade[head];
    }
    u32 weights[ROWS][2], plain[ROWS][2];  // times scales, and as they are
#pragma unroll
    for (int n = 0; n < ROWS; ++n) {
      u32 steps = 0, offsets = 0;
      if constexpr (!V_AFFINE && V_KIND != PRODUCT) {
        steps = two_rows(v_steps, g, n);
        if constexpr (V_ZERO_SPAN > 0) offsets = two_rows(v_zeros, g, n);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float shares[2];
#pragma unroll
        for (int head = 0; head < 2; ++head) {
          shares[head] = power_of_two(scores[n][2 * row + head] - safe[head]);
          total[head] += shares[head];
        }
        float up = V_UP;
        if constexpr (!V_AFFINE && V_KIND != PRODUCT) up *= half_value(u16(steps >> 16 * row));
        weights[n][row] = half_pair(shares[0] * up, shares[1] * up);
        const float offset = half_value(u16(offsets >> 16 * row));
        if constexpr (V_KIND == TOKEN && !V_AFFINE) {
          lift[0] -= half_value(u16(weights[n][row])) * offset;
          lift[1] -= half_value(u16(weights[n][row] >> 16)) * offset;
        } else if constexpr (V_OFFSET) {
          lift[0] += shares[0] * V_UP * offset, lift[1] += shares[1] * V_UP * offset;
        }
        weights[n][row] = transposed(weights[n][row]);
        if constexpr (V_CORRECTED)
          plain[n][row] = V_AFFINE ? weights[n][row] : transposed(half_pair(shares[0] * V_UP, shares[1] * V_UP));
        else plain[n][row] = 0;
      }
    }
#pragma unroll
    for (int n = 0; n < STEPS; ++n)
#pragma unroll
      for (int part = 0; part < 4; ++part) out[n][part] *= fade[part % 2];
#pragma unroll
    for (int part = 0; part < 4; ++part) under[part] *= fade[part % 2];

    if constexpr (V_CORRECTED) {
      if constexpr (K_ONE_BY_ONE) warp_barrier(), clear_scattered(corrections, lane);
      wait_for_copies<1>();
      warp_barrier();
      if constexpr (V_RANK > 0) mix_low_rank(out, corrections.v_factors, plain, g, t);
    }

    // ---- Sums: of row g of product n, channel 16 g + 2 n; of row g + 8, the next.
#pragma unroll
    for (int base = 0; base < ROWS; base += DEPTH) {
#pragma unroll
      for (int ahead = 0; ahead < DEPTH; ++ahead) {
        const int step = base + ahead;
        u32(&slot)[MOST_WORDS] = ring[ahead];
        constexpr int WORDS = V_KIND == PRODUCT ? 2 : words_of(V_BITS, 16);
        u32 even[2][WORDS], odd[2][WORDS], steps[2], entries[4][V_PARTS];
        int at[PUTS<V_ENTRIES>];
        const auto token_at = [&](int k, int half) { return token_of(k, step, half); };
        if constexpr (V_ENTRIES > 0 && JOINED)
          scatter_own<V_ENTRIES>(own_outliers, corrections.scattered, corrections.v_list, step, lane);
        else if constexpr (V_ENTRIES > 0)
          scatter<V_ENTRIES, V_AFFINE>(at, corrections.scattered, corrections.v_list, lane, token_at);
        if constexpr (V_KIND != PRODUCT) {
#pragma unroll
          for (int n = 0; n < 4; ++n) settle_16<V_BITS>(slot + n * WORDS, g);
        }
        if constexpr (V_KIND == TABLE) {
#pragma unroll
          for (int n = 0; n < 4; ++n) stream_16<V_BITS>(slot + n * WORDS);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            interleaved<V_BITS>(even[half], odd[half], slot + 2 * half * WORDS, slot + (2 * half + 1) * WORDS);
        }
        if constexpr (V_AFFINE) {
          const int group = 16 * g / V_GROUP;
          u32 all[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int one = token_of(2 * t, step, half) * V_GROUPS + group;
            const int two = token_of(2 * t + 1, step, half) * V_GROUPS + group;
            steps[half] = small_steps(halves_at(v_steps, one, two));
            all[2 * half] = all[2 * half + 1] = fused(steps[half], halves_at(v_zeros, one, two), 0);
          }
          multiply(under, all, weights[step][0], weights[step][1]);
        }
#pragma unroll
        for (int n = 0; n < STEPS; ++n) {
          u32 values[4];
          if constexpr (V_KIND == PRODUCT) {
            if (n % V_PARTS == 0)
#pragma unroll
              for (int token = 0; token < 4; ++token)
                look_up<V_PARTS>(entries[token], pool + V_TABLE, slot + 2 * token, n / V_PARTS, t, v_bank);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const u32 one = entries[2 * half][n % V_PARTS], two = entries[2 * half + 1][n % V_PARTS];
              values[2 * half] = permuted(one, two, 0x5410), values[2 * half + 1] = permuted(one, two, 0x7632);
            }
          } else {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
              const int half = part / 2, channel = 2 * n + part % 2;
              const u32 *one = slot + 2 * half * WORDS, *two = one + WORDS;
              if constexpr (V_KIND == TABLE)
                values[part] = looked_up<V_BITS>(pool + V_TABLE, part % 2 ? odd[half] : even[half], 2 * V_BITS * n, own);
              else if constexpr (V_KIND == FLOAT8) {
                const u32 at = channel % 4;
                values[part] = halves_of_e4m3(u16(permuted(one[channel / 4], two[channel / 4], at | (4 + at) << 4)));
              } else if constexpr (V_AFFINE) values[part] = stepped<V_BITS>(one, two, channel, steps[half]);
              else values[part] = both<V_BITS>(one, two, channel);
            }
          }
          multiply(out[n], values, weights[step][0], weights[step][1]);
        }
        if constexpr (V_ENTRIES > 0)
          add_scattered(out, corrections, plain[step][0], plain[step][1], lane, [&] {
            if constexpr (JOINED) take_back<V_ENTRIES>(own_outliers, corrections, step, lane);
            else take_back(at, corrections);
          });
        if (base + DEPTH < ROWS) fetch_values(slot, here.v_codes + v_lane, step + DEPTH, a.heads);
        else if (more) fetch_keys(slot, next.k_codes + k_lane, ahead, a.heads);
      }
    }
    here = next;
    parity ^= 1;
    warp_barrier();
    if (more) copy_v_corrections(corrections, here, lane);
    commit_copies();
  }

  // ---- Sums of all warps of the block.
#pragma unroll
  for (int head = 0; head < 2; ++head)
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      total[head] += of_lane_xor(total[head], distance);
      lift[head] += of_lane_xor(lift[head], distance);
    }
  if constexpr (REST_LAST) take_own_rest();
  block_barrier();
  float* sums = reinterpret_cast<float*>(pool);  // [WARPS][8][D]
  float *tops = sums + WARPS * 8 * D, *totals = tops + WARPS * 8;  // [WARPS][8]
#pragma unroll
  for (int n = 0; n < STEPS; ++n)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int channel = 16 * g + 2 * n + part / 2, head = 2 * t + part % 2;
      float up = 1.0f;
      if constexpr (V_KIND == TOKEN && !V_AFFINE) up = power(24 - shift_of(V_BITS, 2 * n + part / 2));
      if constexpr (V_AFFINE) up = STEP_UP;
      const float sum = (out[n][part] - under[part]) * up + lift[part % 2];
      if (head < GROUP_HEADS) sums[(warp * 8 + head) * D + channel] = sum / V_UP;
    }
  if (g == 0)
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      tops[warp * 8 + 2 * t + head] = top[head];
      totals[warp * 8 + 2 * t + head] = total[head];
    }
  block_barrier();
  join_warps(a, asked, sums, reinterpret_cast<const float*>(pool + OWN + REST_AT), pair.number, split);
  if (last_to_arrive(a.arrived + pair.number, a.splits)) merge(a, pair.number);
}
