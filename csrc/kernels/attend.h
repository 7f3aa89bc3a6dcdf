// Attention of up to four query heads over one stretch of coded keys and values; see attend.h.
//
// 16 lanes hold 16 chunks of 8 codes (4 of 8 bits). Where a row (a channel's tokens of a block, or a token's channels)
// has fewer chunks, several rows share the lanes, and what belongs to a row is looked up for each lane. Where it is few
// numbers, those of all heads lie *packed* in 16 lanes and are spread when they are needed, which costs no memory.
#pragma once
#include <cmath>

#include "../attend.h"
#include "attend_table.h"
#include "heads.h"

namespace RAREFY_NS {

// How rows of chunks lie in lanes.
struct Lanes {
  int64_t per, chunks, wide, rows, vectors;  // codes of a chunk; chunks of a row; lanes of a row; rows of 16 lanes

  Lanes(int32_t bits, int64_t codes)
      : per(bits == 8 ? 4 : 8), chunks(codes / per), wide(chunks < 16 ? chunks : 16), rows(16 / wide),
        vectors(chunks / wide) {}
  // For each lane of vector `vector`: the place of its scale, from the first one that these lanes need.
  I scales(int64_t vector, int64_t group, int64_t groups) const {
    alignas(64) int32_t at[16];
    for (int64_t lane = 0; lane < 16; ++lane)
      at[lane] = int32_t(lane / wide * groups + (vector * 16 + lane % wide) * per / group - first(vector, group));
    return load_i(at);
  }
  int64_t first(int64_t vector, int64_t group) const { return vector * 16 * per / group; }
  // Groups of a row that its lanes need.
  int64_t own(int64_t group) const { return wide * per > group ? wide * per / group : 1; }
};

template <int BITS> static inline I load_chunks(const uint8_t *p, const uint8_t *end) {
  if constexpr (BITS == 2) return load_words(p);
  if constexpr (BITS == 3) {
    constexpr uint64_t three_of_four = 0x7777777777777777u;
    if (p + 64 <= end) return as_lanes(expand_b(p, three_of_four, set_b(0)));
    alignas(64) uint8_t last[64] = {};
    __builtin_memcpy(last, p, 48);
    return as_lanes(expand_b(last, three_of_four, set_b(0)));
  }
  return load_i(p);
}

template <int BITS, int PLACE> static inline F number(I chunks, Table table) {
  if constexpr (BITS == 8) return to_f(and_i(shr_i<8 * PLACE>(chunks), 255));
  if constexpr (BITS != 8) return lookup_f(table, shr_i<BITS * PLACE>(chunks));
}

// Halves as floats; `count` rounded up to 16 are written.
static inline void widen(const uint16_t *from, int64_t count, float *to) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) store_f(to + k, load_half(from + k));
  for (; k < count; ++k) to[k] = rarefy_scalar::half_to_float(from[k]);
}

constexpr int64_t ahead = 4096;  // bytes of codes that are asked for before they are read

struct Scratch {
  float *scores;         // [4, stretch and 16 to spare]
  float *lanes, *query;  // [width / rows, 4, 16] as lanes want it, and as it is for these scales; [8 * vectors, 4, 16]
  float *scale, *zero;   // of a block or tile, with 16 to spare
  float *weights;        // [tile tokens, 4, 16] (several rows to 16 lanes: fewer)
  float *sums;           // [8 * vectors, 4, 16]
  float *mixed;          // [4, width]
};
constexpr int64_t tile_tokens = 64;

// What belongs to a head in all lanes: from lanes of its own, or picked out of those that heads share.
template <int G, bool PACKED> static inline F spread(const float *from, int64_t i, int g, const I pick[G]) {
  if constexpr (PACKED) return lookup_f(table_f(from + i * 16), pick[g]);
  return load_f(from + (i * G + g) * 16);
}

template <int BITS, int G, int HALF, bool PACKED>
static inline void score_block(const uint8_t *codes, const uint8_t *end, int64_t stride, int64_t count, Table table,
                               const float *query, const I pick[G], const F below[G], float *by_place, float factor) {
  constexpr int places = 4;
  F sums[places][G];
  for (int s = 0; s < places; ++s)
    for (int g = 0; g < G; ++g) sums[s][g] = zero_f();
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (HALF == 0) prefetch(codes + i * stride + ahead);
    I chunks = load_chunks<BITS>(codes + i * stride, end);
    F x[places] = {number<BITS, 4 * HALF>(chunks, table), number<BITS, 4 * HALF + 1>(chunks, table),
                   number<BITS, 4 * HALF + 2>(chunks, table), number<BITS, 4 * HALF + 3>(chunks, table)};
    for (int g = 0; g < G; ++g) {
      F q = spread<G, PACKED>(query, i, g, pick);
      for (int s = 0; s < places; ++s) sums[s][g] = fma_f(x[s], q, sums[s][g]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int s = 0; s < places; ++s)
      store_f(by_place + (g * 8 + 4 * HALF + s) * 16, mul_f(sub_f(sums[s][g], below[g]), set_f(factor)));
}

// Scores [places, lanes] in the order of tokens: several rows add up, and token = lane * per + place.
static inline void in_order(const float *by_place, const Lanes &lay, float *to) {
  if (lay.wide == 16 && lay.per == 8) {
    for (int w = 0; w < 16; ++w)
      for (int place = 0; place < 8; ++place) to[w * 8 + place] = by_place[place * 16 + w];
    return;
  }
  for (int64_t w = 0; w < lay.wide; ++w)
    for (int64_t place = 0; place < lay.per; ++place) {
      float sum = 0;
      for (int64_t r = w; r < 16; r += lay.wide) sum += by_place[place * 16 + r];
      to[w * lay.per + place] = sum;
    }
}

// The query of a block as its scales make it, and what its zeros take away, in lanes of all heads.
template <int G>
static inline void scale_query(const rarefy_side &k, int64_t width, const Lanes &lay, I places, int64_t first,
                               const Scratch &s, F below[G]) {
  int64_t groups = k.block / k.group;
  for (int g = 0; g < G; ++g) below[g] = zero_f();
  for (int64_t i = 0; i < width / lay.rows; ++i) {
    int64_t from = i * lay.rows * groups + first;
    F step = lookup_f(table_f(s.scale + from), places), zero = lookup_f(table_f(s.zero + from), places);
    for (int g = 0; g < G; ++g) {
      F scaled = mul_f(load_f(s.lanes + (i * G + g) * 16), step);
      store_f(s.query + (i * G + g) * 16, scaled);
      below[g] = fma_f(scaled, zero, below[g]);
    }
  }
}

// The same, packed: lane head * own + group, `groups_at` being each lane's group.
template <int G>
static inline void scale_query_packed(const rarefy_side &k, int64_t width, I groups_at, int64_t first,
                                      const Scratch &s, const I pick[G], F below[G]) {
  int64_t groups = k.block / k.group;
  F all = zero_f();
  for (int64_t d = 0; d < width; ++d) {
    int64_t from = d * groups + first;
    F step = lookup_f(table_f(s.scale + from), groups_at), zero = lookup_f(table_f(s.zero + from), groups_at);
    F scaled = mul_f(load_f(s.lanes + d * 16), step);
    store_f(s.query + d * 16, scaled);
    all = fma_f(scaled, zero, all);
  }
  alignas(64) float lane[16];
  store_f(lane, all);
  for (int g = 0; g < G; ++g) below[g] = lookup_f(table_f(lane), pick[g]);
}

template <int BITS, int G, bool PACKED>
static void score_channels(const rarefy_side &k, int64_t head, const float *q, int64_t width, float factor,
                           float *scores, int64_t padded, const Scratch &s) {
  Lanes lay(BITS, k.block);
  const uint8_t *codes = static_cast<const uint8_t *>(k.codes) + head * k.code_bytes;
  const uint8_t *end = codes + k.tokens * width * BITS / 8;
  Table table = table_f(k.table);
  int64_t groups = k.block / k.group, vectors = width / lay.rows, chunk = lay.per * BITS / 8, own = lay.own(k.group);
  alignas(64) int32_t at[16];
  I pick[G], groups_at = zero_i();
  if constexpr (PACKED) {
    for (int g = 0; g < G; ++g) {
      for (int64_t lane = 0; lane < 16; ++lane) at[lane] = int32_t(g * own + lane * lay.per / k.group % own);
      pick[g] = load_i(at);
    }
    for (int64_t lane = 0; lane < 16; ++lane) at[lane] = int32_t(lane % own);
    groups_at = load_i(at);
    for (int64_t d = 0; d < width; ++d)
      for (int64_t lane = 0; lane < 16; ++lane) s.lanes[d * 16 + lane] = lane < G * own ? q[lane / own * width + d] : 0;
  } else {
    for (int g = 0; g < G; ++g) pick[g] = zero_i();
    for (int64_t i = 0; i < vectors; ++i)
      for (int g = 0; g < G; ++g)
        for (int64_t lane = 0; lane < 16; ++lane)
          s.lanes[(i * G + g) * 16 + lane] = q[g * width + i * lay.rows + lane / lay.wide];
  }
  for (int64_t block = 0; block < k.tokens / k.block; ++block) {
    int64_t from = head * k.scales + block * width * groups;
    widen(k.scale + from, width * groups, s.scale);
    widen(k.zero + from, width * groups, s.zero);
    for (int64_t column = 0; column < lay.vectors; ++column) {
      F below[G];
      if constexpr (PACKED)
        scale_query_packed<G>(k, width, groups_at, lay.first(column, k.group), s, pick, below);
      else
        scale_query<G>(k, width, lay, lay.scales(column, k.group, groups), lay.first(column, k.group), s, below);
      const uint8_t *first = codes + ((block * width) * lay.chunks + column * 16) * chunk;
      float *to = scores + block * k.block + column * 16 * lay.per;
      int64_t stride = lay.rows * lay.chunks * chunk;
      alignas(64) float by_place[G * 8 * 16];
      score_block<BITS, G, 0, PACKED>(first, end, stride, vectors, table, s.query, pick, below, by_place, factor);
      if constexpr (BITS != 8)
        score_block<BITS, G, 1, PACKED>(first, end, stride, vectors, table, s.query, pick, below, by_place, factor);
      for (int g = 0; g < G; ++g) in_order(by_place + g * 8 * 16, lay, to + g * padded);
    }
  }
}

template <int BITS, int G>
static void score_by_channel(const rarefy_side &k, int64_t head, const float *q, int64_t width, float factor,
                             float *scores, int64_t padded, const Scratch &s) {
  Lanes lay(BITS, k.block);
  if constexpr (cheap_lookup)
    if (lay.rows == 1 && G * lay.own(k.group) <= 16)
      return score_channels<BITS, G, true>(k, head, q, width, factor, scores, padded, s);
  score_channels<BITS, G, false>(k, head, q, width, factor, scores, padded, s);
}

// The query [G, width] as lanes of a token's chunks: [vectors, places, G, 16].
template <int G> static void query_lanes(const float *q, int64_t width, const Lanes &lay, float *to) {
  for (int64_t v = 0; v < lay.vectors; ++v)
    for (int64_t place = 0; place < lay.per; ++place)
      for (int g = 0; g < G; ++g)
        for (int64_t lane = 0; lane < 16; ++lane)
          to[((v * lay.per + place) * G + g) * 16 + lane] =
              q[g * width + (v * 16 + lane % lay.wide) * lay.per + place];
}

template <int BITS, int G, int PLACE>
static inline void dot_places(I chunks, Table table, const float *query, F sums[G]) {
  F x = number<BITS, PLACE>(chunks, table);
  for (int g = 0; g < G; ++g) sums[g] = fma_f(x, load_f(query + (PLACE * G + g) * 16), sums[g]);
  if constexpr (PLACE + 1 < (BITS == 8 ? 4 : 8)) dot_places<BITS, G, PLACE + 1>(chunks, table, query, sums);
}

// Sums of W lanes each, of 16 tokens.
template <int W> static inline void add_lanes(const float *lanes, float factor, int64_t count, float *to) {
  float sums[16] = {};
  for (int w = 0; w < W; ++w)
    for (int t = 0; t < 16; ++t) sums[t] += lanes[t * W + w];
  for (int64_t t = 0; t < count; ++t) to[t] = sums[t] * factor;
}

template <int BITS, int G>
static void score_by_token(const rarefy_side &k, int64_t head, const float *q, int64_t width, float factor,
                           float *scores, int64_t padded, const Scratch &s) {
  int64_t tokens = k.tokens;
  Lanes lay(BITS, width);
  const uint8_t *codes = static_cast<const uint8_t *>(k.codes) + head * k.code_bytes;
  const uint8_t *end = codes + k.tokens * width * BITS / 8;
  Table table = table_f(k.table);
  int64_t groups = width / k.group, chunk = lay.per * BITS / 8;
  query_lanes<G>(q, width, lay, s.query);
  F all[RAREFY_WIDTH / 64][G];  // of the query, by vectors of a row
  I places[RAREFY_WIDTH / 64];
  for (int64_t v = 0; v < lay.vectors; ++v) {
    places[v] = lay.scales(v, k.group, groups);
    for (int g = 0; g < G; ++g) {
      all[v][g] = zero_f();
      for (int64_t place = 0; place < lay.per; ++place)
        all[v][g] = add_f(all[v][g], load_f(s.query + ((v * lay.per + place) * G + g) * 16));
    }
  }
  alignas(64) float lanes[G][16 * 16];
  for (int64_t t = 0; t < tokens; t += 16) {
    int64_t count = tokens - t < 16 ? tokens - t : 16;
    if (t % tile_tokens == 0) {
      int64_t scales = (tokens - t < tile_tokens ? tokens - t : tile_tokens) * groups;
      widen(k.scale + head * k.scales + t * groups, scales, s.scale);
      if (k.zero) widen(k.zero + head * k.scales + t * groups, scales, s.zero);
    }
    for (int64_t row = 0; row < count; row += lay.rows) {
      F found[G];
      for (int g = 0; g < G; ++g) found[g] = zero_f();
      for (int64_t v = 0; v < lay.vectors; ++v) {
        const uint8_t *from = codes + ((t + row) * lay.chunks + v * 16) * chunk;
        I chunks = load_chunks<BITS>(from, end);
        prefetch(from + ahead);
        int64_t at = (t + row) % tile_tokens * groups + lay.first(v, k.group);
        F step = lookup_f(table_f(s.scale + at), places[v]), sums[G];
        for (int g = 0; g < G; ++g) sums[g] = zero_f();
        dot_places<BITS, G, 0>(chunks, table, s.query + v * lay.per * G * 16, sums);
        for (int g = 0; g < G; ++g) found[g] = fma_f(sums[g], step, found[g]);
        if (!k.zero) continue;
        F zero = lookup_f(table_f(s.zero + at), places[v]);
        if (!k.added) zero = sub_f(zero_f(), mul_f(zero, step));
        for (int g = 0; g < G; ++g) found[g] = fma_f(all[v][g], zero, found[g]);
      }
      for (int g = 0; g < G; ++g) store_f(lanes[g] + row * lay.wide, found[g]);
    }
    for (int g = 0; g < G; ++g) {
      float *to = scores + g * padded + t;
      if (lay.wide == 16) add_lanes<16>(lanes[g], factor, count, to);
      else if (lay.wide == 8) add_lanes<8>(lanes[g], factor, count, to);
      else if (lay.wide == 4) add_lanes<4>(lanes[g], factor, count, to);
      else if (lay.wide == 2) add_lanes<2>(lanes[g], factor, count, to);
      else add_lanes<1>(lanes[g], factor, count, to);
    }
  }
}

template <int BITS, int G, int HALF, bool PACKED>
static inline void mix_tile(const uint8_t *codes, const uint8_t *end, int64_t stride, int64_t count, Table table,
                            const float *weights, const I pick[G], float *sums) {
  constexpr int places = 4;
  F own[places][G];
  for (int s = 0; s < places; ++s)
    for (int g = 0; g < G; ++g) own[s][g] = load_f(sums + ((4 * HALF + s) * G + g) * 16);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (HALF == 0) prefetch(codes + i * stride + ahead);
    I chunks = load_chunks<BITS>(codes + i * stride, end);
    F x[places] = {number<BITS, 4 * HALF>(chunks, table), number<BITS, 4 * HALF + 1>(chunks, table),
                   number<BITS, 4 * HALF + 2>(chunks, table), number<BITS, 4 * HALF + 3>(chunks, table)};
    for (int g = 0; g < G; ++g) {
      F w = spread<G, PACKED>(weights, i, g, pick);
      for (int s = 0; s < places; ++s) own[s][g] = fma_f(x[s], w, own[s][g]);
    }
  }
  for (int s = 0; s < places; ++s)
    for (int g = 0; g < G; ++g) store_f(sums + ((4 * HALF + s) * G + g) * 16, own[s][g]);
}

// Values of a head, mixed by `weights` [G, padded], which may be read up to 15 beyond.
template <int BITS, int G, bool PACKED>
static void mix_tokens(const rarefy_side &v, int64_t head, const float *weights, int64_t padded, int64_t width,
                       float *out, const Scratch &s) {
  int64_t tokens = v.tokens;
  Lanes lay(BITS, width);
  const uint8_t *codes = static_cast<const uint8_t *>(v.codes) + head * v.code_bytes;
  const uint8_t *end = codes + v.tokens * width * BITS / 8;
  Table table = table_f(v.table);
  int64_t groups = width / v.group, chunk = lay.per * BITS / 8, all = lay.vectors * lay.per * G * 16;
  int64_t own = lay.own(v.group), each = lay.rows * own;  // packed numbers of a row, and of a head
  alignas(64) int32_t at[16];
  I pick[G], shares_at = zero_i(), packed_scales = zero_i();
  for (int g = 0; g < G; ++g) {
    for (int64_t lane = 0; lane < 16; ++lane)
      at[lane] = int32_t(g * each + lane / lay.wide * own + lane % lay.wide * lay.per / v.group % own);
    pick[g] = load_i(at);
  }
  if constexpr (PACKED) {
    for (int64_t lane = 0; lane < 16; ++lane) at[lane] = int32_t(lane % each / own * G + (lane / each) % G);
    shares_at = load_i(at);
    for (int64_t lane = 0; lane < 16; ++lane) at[lane] = int32_t(lane % each / own * groups + lane % own);
    packed_scales = load_i(at);
  } else {
    for (int64_t lane = 0; lane < 16; ++lane) at[lane] = int32_t(lane / lay.wide);
    shares_at = load_i(at);
  }
  for (int64_t i = 0; i < all; ++i) s.sums[i] = 0;
  F lift[RAREFY_WIDTH / 64][G];  // by vectors of a row; of packed lanes the first
  for (int64_t i = 0; i < lay.vectors; ++i)
    for (int g = 0; g < G; ++g) lift[i][g] = zero_f();
  for (int64_t t = 0; t < tokens; t += tile_tokens) {
    int64_t count = tokens - t < tile_tokens ? tokens - t : tile_tokens, steps = count / lay.rows;
    widen(v.scale + head * v.scales + t * groups, count * groups, s.scale);
    if (v.zero) widen(v.zero + head * v.scales + t * groups, count * groups, s.zero);
    if constexpr (PACKED)
      for (int64_t i = 0; i < count; ++i)
        for (int g = 0; g < G; ++g) s.lanes[i * G + g] = weights[g * padded + t + i];
    for (int64_t vector = 0; vector < lay.vectors; ++vector) {
      I places = PACKED ? packed_scales : lay.scales(vector, v.group, groups);
      for (int64_t i = 0; i < steps; ++i) {
        int64_t from = i * lay.rows * groups + lay.first(vector, v.group);
        F step = lookup_f(table_f(s.scale + from), places);
        F zero = v.zero ? lookup_f(table_f(s.zero + from), places) : zero_f();
        if (!v.added) zero = sub_f(zero_f(), mul_f(zero, step));
        for (int g = 0; g < (PACKED ? 1 : G); ++g) {
          const float *share = weights + g * padded + t + i * lay.rows;
          F w = PACKED          ? lookup_f(table_f(s.lanes + i * lay.rows * G), shares_at)
                : lay.rows == 1 ? set_f(*share)
                                : lookup_f(table_f(share), shares_at);
          store_f(s.weights + (PACKED ? i : i * G + g) * 16, mul_f(w, step));
          if (v.zero) lift[vector][g] = fma_f(w, zero, lift[vector][g]);
        }
      }
      const uint8_t *first = codes + (t * lay.chunks + vector * 16) * chunk;
      int64_t stride = lay.rows * lay.chunks * chunk;
      float *sums = s.sums + vector * lay.per * G * 16;
      mix_tile<BITS, G, 0, PACKED>(first, end, stride, steps, table, s.weights, pick, sums);
      if constexpr (BITS != 8) mix_tile<BITS, G, 1, PACKED>(first, end, stride, steps, table, s.weights, pick, sums);
    }
  }
  alignas(64) float lane[16];
  for (int64_t vector = 0; vector < lay.vectors; ++vector) {
    if constexpr (PACKED) {
      store_f(lane, lift[vector][0]);
      for (int g = 0; g < G; ++g) lift[vector][g] = lookup_f(table_f(lane), pick[g]);
    }
    for (int64_t place = 0; place < lay.per; ++place)
      for (int g = 0; g < G; ++g) {
        store_f(lane, add_f(load_f(s.sums + ((vector * lay.per + place) * G + g) * 16), lift[vector][g]));
        for (int64_t w = 0; w < lay.wide; ++w) {
          float sum = 0;
          for (int64_t r = w; r < 16; r += lay.wide) sum += lane[r];
          out[g * width + (vector * 16 + w) * lay.per + place] = sum;
        }
      }
  }
}

template <int BITS, int G>
static void mix_by_token(const rarefy_side &v, int64_t head, const float *weights, int64_t padded, int64_t width,
                         float *out, const Scratch &s) {
  Lanes lay(BITS, width);
  if constexpr (cheap_lookup)
    if (G * lay.rows * lay.own(v.group) <= 16)
      return mix_tokens<BITS, G, true>(v, head, weights, padded, width, out, s);
  mix_tokens<BITS, G, false>(v, head, weights, padded, width, out, s);
}

template <int G>
static void scores_of(const rarefy_side &k, int64_t head, const float *q, int64_t width, float factor, float *scores,
                      int64_t padded, const Scratch &s) {
  if (k.kind == RAREFY_PLAIN) {
    const char *keys = static_cast<const char *>(k.codes) + head * k.code_bytes;
    return score<G>(q, width, keys, k.type, 0, k.tokens, factor, scores, padded);
  }
  bool across = k.kind == RAREFY_BY_CHANNEL;
  auto own = k.bits == 2   ? (across ? score_by_channel<2, G> : score_by_token<2, G>)
             : k.bits == 3 ? (across ? score_by_channel<3, G> : score_by_token<3, G>)
             : k.bits == 4 ? (across ? score_by_channel<4, G> : score_by_token<4, G>)
                           : (across ? score_by_channel<8, G> : score_by_token<8, G>);
  own(k, head, q, width, factor, scores, padded, s);
}

template <int G>
static void mixed_of(const rarefy_side &v, int64_t head, const float *weights, int64_t padded, int64_t width,
                     float *out, const Scratch &s) {
  if (v.kind == RAREFY_PLAIN) {
    const char *values = static_cast<const char *>(v.codes) + head * v.code_bytes;
    float whole[G];
    for (int g = 0; g < G; ++g) whole[g] = 1.f;
    int64_t k = 0;
    for (; k + 64 <= width; k += 64) mix<G, 4>(weights, padded, whole, values, v.type, 0, v.tokens, width, k, out);
    for (; k < width; k += 16) mix<G, 1>(weights, padded, whole, values, v.type, 0, v.tokens, width, k, out);
    return;
  }
  auto own = v.bits == 2   ? mix_by_token<2, G>
             : v.bits == 3 ? mix_by_token<3, G>
             : v.bits == 4 ? mix_by_token<4, G>
                           : mix_by_token<8, G>;
  own(v, head, weights, padded, width, out, s);
}

template <int G>
static void stretch_heads(const rarefy_stretch &stretch, int64_t head, const float *q, int64_t width, float factor,
                          const int64_t *hidden, int64_t hidden_each, float *out, float *lse, const Scratch &s) {
  constexpr int64_t padded = RAREFY_STRETCH + 16;
  for (int64_t i = 0; i < stretch.key_sides; ++i)
    scores_of<G>(stretch.keys[i], head, q, width, factor, s.scores + stretch.keys[i].first, padded, s);
  float inverse[G];
  for (int g = 0; g < G; ++g) {
    float *row = s.scores + g * padded, top;
    for (int64_t i = 0; i < hidden_each; ++i)
      if (hidden[i] >= stretch.first && hidden[i] < stretch.first + stretch.tokens)
        row[hidden[i] - stretch.first] = -INFINITY;
    float total = soften(row, stretch.tokens, top);
    for (int64_t t = stretch.tokens; t < padded; ++t) row[t] = 0;
    inverse[g] = total > 0 ? 1.f / total : 0.f;
    lse[g] = total > 0 ? top + std::log(total) : -INFINITY;
  }
  for (int64_t k = 0; k < G * width; ++k) out[k] = 0;
  for (int64_t i = 0; i < stretch.value_sides; ++i) {
    const rarefy_side &v = stretch.values[i];
    mixed_of<G>(v, head, s.scores + v.first, padded, width, s.mixed, s);
    for (int64_t k = 0; k < G * width; ++k) out[k] += s.mixed[k];
  }
  for (int g = 0; g < G; ++g)
    for (int64_t k = 0; k < width; ++k) out[g * width + k] *= inverse[g];
}

static int64_t attend_floats() {
  constexpr int64_t width = RAREFY_WIDTH, each = width * 4 * 16;
  return 4 * (RAREFY_STRETCH + 16) + 2 * each + 2 * (width * 16 + 64 * 64 + 32) + tile_tokens * 64 + each + 4 * width;
}

static void attend_stretch(const rarefy_stretch &stretch, int64_t head, const float *q, int64_t group, int64_t width,
                           float factor, const int64_t *hidden, int64_t hidden_each, float *out, float *lse,
                           float *memory) {
  constexpr int64_t each = RAREFY_WIDTH * 4 * 16, scales = RAREFY_WIDTH * 16 + 64 * 64 + 32;
  Scratch s;
  s.scores = memory, memory += 4 * (RAREFY_STRETCH + 16);
  s.lanes = memory, memory += each;
  s.query = memory, memory += each;
  s.scale = memory, memory += scales;
  s.zero = memory, memory += scales;
  s.weights = memory, memory += tile_tokens * 64;
  s.sums = memory, memory += each;
  s.mixed = memory;
  while (group > 0) {
    auto heads = group >= 4   ? stretch_heads<4>
                 : group == 3 ? stretch_heads<3>
                 : group == 2 ? stretch_heads<2>
                              : stretch_heads<1>;
    int64_t taken = group >= 4 ? 4 : group;
    heads(stretch, head, q, width, factor, hidden, hidden_each, out, lse, s);
    group -= taken, q += taken * width, out += taken * width, lse += taken;
  }
}

static constexpr rarefy::AttendKernels attend_table = {attend_floats, attend_stretch};

}  // namespace RAREFY_NS
