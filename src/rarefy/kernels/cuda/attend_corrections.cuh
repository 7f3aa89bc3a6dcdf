// What is added to codes, for attend.cu: outliers, and matrices of low rank.
//
// Outliers are of a token over its channels or the channels of all heads, in no order, or of a channel over the tokens of a
// tile. Those that a product adds up over (of values, and of keys by channel) are scattered among zeros, those of 16
// vectors at once, and are one more product; those of keys by token a lane takes one by one for its own tokens. A matrix of
// low rank is two products.

constexpr bool K_ONE_BY_ONE = K_ENTRIES > 0 && K_KIND != CHANNEL;

// What a warp has in shared memory. Of keys by token, scores, the query and the list are there while keys are read, what is
// scattered and the list of values in their place while values are.
constexpr int SCATTERED = V_ENTRIES > 0 || (K_ENTRIES > 0 && !K_ONE_BY_ONE) ? 16 * D * 2 : 0;
constexpr int BESIDE = K_ONE_BY_ONE ? 4 * GROUP_HEADS * TILE : 0, OF_QUERY = K_ONE_BY_ONE && TURNED ? 4 * GROUP_HEADS * D : 0;
constexpr int IN_TURN = SCATTERED > BESIDE + OF_QUERY ? SCATTERED : BESIDE + OF_QUERY;
constexpr int list_bytes(int entries) { return TILE * entries * (2 + INDEX_BYTES); }
constexpr int factor_bytes(int rank) { return 2 * (TILE + D) * rank; }
constexpr int K_FACTORS = IN_TURN + list_bytes(K_ENTRIES), V_LIST = K_ONE_BY_ONE ? IN_TURN : K_FACTORS + factor_bytes(K_RANK);
constexpr int LISTS_END = V_LIST + list_bytes(V_ENTRIES), V_FACTORS = LISTS_END > K_FACTORS ? LISTS_END : K_FACTORS;
constexpr int CORRECTIONS_OF_WARP = V_FACTORS + factor_bytes(V_RANK);
struct Corrections {
  u16* scattered;  // 8 words of two vectors for each place; see `scatter`
  float* beside;   // [TILE][GROUP_HEADS]: what outliers add to scores
  u32* turned;     // [D][GROUP_HEADS]: the query times a tile's first position, straight and crossed
  u8* k_list;      // values [vectors][ENTRIES], then their indices
  u16* k_factors;  // left [TILE][RANK], right [RANK][D]
  u8* v_list;
  u16* v_factors;
};
device Corrections corrections_at(u8* base) {
  return {reinterpret_cast<u16*>(base), reinterpret_cast<float*>(base), reinterpret_cast<u32*>(base + BESIDE), base + IN_TURN,
          reinterpret_cast<u16*>(base + K_FACTORS), base + V_LIST, reinterpret_cast<u16*>(base + V_FACTORS)};
}
device void copy_k_corrections(const Corrections& to, const Places& p, int lane) {
  copy_span(to.k_list, p.k_out, TILE * K_ENTRIES * 2, lane);
  copy_span(to.k_list + TILE * K_ENTRIES * 2, p.k_out_at, TILE * K_ENTRIES * INDEX_BYTES, lane);
  copy_span(reinterpret_cast<u8*>(to.k_factors), p.k_left, TILE * K_RANK * 2, lane);
  copy_span(reinterpret_cast<u8*>(to.k_factors + TILE * K_RANK), p.k_right, D * K_RANK * 2, lane);
}
device void copy_v_corrections(const Corrections& to, const Places& p, int lane) {
  copy_span(to.v_list, p.v_out, TILE * V_ENTRIES * 2, lane);
  copy_span(to.v_list + TILE * V_ENTRIES * 2, p.v_out_at, TILE * V_ENTRIES * INDEX_BYTES, lane);
  copy_span(reinterpret_cast<u8*>(to.v_factors), p.v_left, TILE * V_RANK * 2, lane);
  copy_span(reinterpret_cast<u8*>(to.v_factors + TILE * V_RANK), p.v_right, D * V_RANK * 2, lane);
}
template <int BYTES> device int index_at(const u8* indices, int n) {
  return BYTES == 1 ? indices[n] : int(reinterpret_cast<const u16*>(indices)[n]);
}

device void clear_scattered(const Corrections& own, int lane) {
  for (int n = lane; n < SCATTERED / 16; n += 32) reinterpret_cast<uint4*>(own.scattered)[n] = {0, 0, 0, 0};
}
// Outliers of 16 vectors as the left operand of products: row g of product n is place 16 g + 2 n, row g + 8 the next; vectors
// are `vector_of(k, half)`, k < 8, of what is added up. Two lanes have a vector, and half of its outliers each. Two
// neighbouring places have a row of 64 bytes; rows of lanes that read together are in different banks.
device int row_of(int two) { return two ^ (two / 8 & 1); }
template <int ENTRIES> constexpr int PUTS = ENTRIES > 0 ? (ENTRIES + 1) / 2 : 1;

// `at`: where this lane has put something, or -1. STEPPED: in so many steps of codes.
template <int ENTRIES, bool STEPPED, class VectorOf>
device void scatter(int (&at)[PUTS<ENTRIES>], u16* to, const u8* list, int head, int lane, VectorOf vector_of) {
  const int k = lane / 2 % 8, half = lane / 16, first = vector_of(k, half) * ENTRIES + lane % 2;
#pragma unroll
  for (int n = 0; n < PUTS<ENTRIES>; ++n) {
    at[n] = -1;
    if (2 * n + lane % 2 >= ENTRIES) continue;
    const int place = index_at<INDEX_BYTES>(list + TILE * ENTRIES * 2, first + 2 * n) - head * D;
    if (u32(place) >= D) continue;
    const u16 value = half_at(list, first + 2 * n);
    at[n] = 2 * (row_of(place / 2) * 16 + k / 2 * 4 + 2 * half + place % 2) + k % 2;
    to[at[n]] = STEPPED ? rounded<true>(half_value(value) / STEP_UP) : value;
  }
  warp_barrier();
}
template <int PRODUCTS, int COUNT>
device void add_scattered(float (&sums)[PRODUCTS][4], const int (&at)[COUNT], u16* scattered, u32 first, u32 second, int g, int t) {
#pragma unroll
  for (int n = 0; n < PRODUCTS; ++n) {
    const uint4 all = reinterpret_cast<const uint4*>(scattered)[row_of(8 * g + n) * 4 + t];
    const u32 words[4] = {all.x, all.y, all.z, all.w};
    multiply(sums[n], words, first, second);
  }
  warp_barrier();
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
    if (at[n] >= 0) scattered[at[n]] = 0;
  warp_barrier();
}

// GROUP_HEADS words that follow each other.
device void load_heads(u32 (&to)[GROUP_HEADS], const void* from) {
  if constexpr (GROUP_HEADS % 4 == 0) {
#pragma unroll
    for (int n = 0; n < GROUP_HEADS / 4; ++n) {
      const uint4 all = static_cast<const uint4*>(from)[n];
      to[4 * n] = all.x, to[4 * n + 1] = all.y, to[4 * n + 2] = all.z, to[4 * n + 3] = all.w;
    }
  } else {
#pragma unroll
    for (int n = 0; n < GROUP_HEADS; ++n) to[n] = static_cast<const u32*>(from)[n];
  }
}
device void store_heads(float* to, const float (&x)[GROUP_HEADS]) {
  if constexpr (GROUP_HEADS % 4 == 0) {
#pragma unroll
    for (int n = 0; n < GROUP_HEADS; n += 4)
      *reinterpret_cast<uint4*>(to + n) = {bits_of(x[n]), bits_of(x[n + 1]), bits_of(x[n + 2]), bits_of(x[n + 3])};
  } else {
#pragma unroll
    for (int n = 0; n < GROUP_HEADS; ++n) to[n] = x[n];
  }
}
// What outliers of keys by token add to scores. A lane has those of neighbouring tokens, one after the other.
device void score_outliers(const Corrections& own, const u32* turns, const float* asked, int head, int lane) {
  constexpr int TOKENS = TILE / 32, OWN = TOKENS * K_ENTRIES, AT_ONCE = 64, EACH = 4 / INDEX_BYTES, TOGETHER = 2;
  const u8* indices = own.k_list + TILE * K_ENTRIES * 2;
  const u32* mine = reinterpret_cast<const u32*>(indices + lane * OWN * INDEX_BYTES);
  const u32 ours = head * D * (INDEX_BYTES == 1 ? 0x1010101u : 0x10001u);
  float sums[GROUP_HEADS] = {};
  int current = TOKENS * lane;  // whose sums they are
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) store_heads(own.beside + (current + n) * GROUP_HEADS, sums);
#pragma unroll
  for (int first = 0; first < OWN; first += AT_ONCE) {
    u64 found = 0;
#pragma unroll
    for (int n = first; n < OWN && n < first + AT_ONCE; n += EACH) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const u32 index = (mine[n / EACH] ^ ours) >> k * 8 * INDEX_BYTES & ((1 << 8 * INDEX_BYTES) - 1);
        if (n + k < first + AT_ONCE) found |= u64(index < D) << (n + k - first);
      }
    }
    while (votes(found != 0)) {
      int places[TOGETHER];
      float met[TOGETHER][GROUP_HEADS];
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
        const bool real = found != 0;
        const int n = lane * OWN + first + (real ? lowest_of(found) : 0), place = n / K_ENTRIES;
        found &= found - 1;
        const float value = real ? half_value(half_at(own.k_list, n)) : 0.0f;
        const int channel = index_at<INDEX_BYTES>(indices, n) % D;
        places[k] = real ? place : -1;
        if constexpr (TURNED) {
          const uint2 angle = *reinterpret_cast<const uint2*>(turns + turn_at(place, channel % (D / 2) / 2));
          const int odd = 16 * (channel % 2);
          const float cosine = value * half_value(u16(angle.x >> odd)), sine = value * half_value(u16(angle.y >> odd));
          u32 both[GROUP_HEADS];
          load_heads(both, own.turned + channel * GROUP_HEADS);
#pragma unroll
          for (int each = 0; each < GROUP_HEADS; ++each)
            met[k][each] = cosine * half_value(u16(both[each])) + sine * half_value(u16(both[each] >> 16));
        } else {
#pragma unroll
          for (int each = 0; each < GROUP_HEADS; ++each) met[k][each] = value * asked[each * D + channel];
        }
      }
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
        if (places[k] >= 0 && places[k] != current) {
          store_heads(own.beside + current * GROUP_HEADS, sums);
          current = places[k];
#pragma unroll
          for (int each = 0; each < GROUP_HEADS; ++each) sums[each] = 0.0f;
        }
#pragma unroll
        for (int each = 0; each < GROUP_HEADS; ++each) sums[each] += met[k][each];
      }
    }
  }
  store_heads(own.beside + current * GROUP_HEADS, sums);
}

device u32 pair_of(const u16* first, const u16* second, bool one, bool two) {
  return (one ? *first : 0) | u32(two ? *second : 0) << 16;
}
// What a matrix of low rank adds to scores, in steps of codes.
device void score_low_rank(float (&scores)[ROWS][4], const u16* left, const u32 (&query)[STEPS][2], int g, int t) {
  const u16* right = left + TILE * K_RANK;
  float along[4] = {};  // of row g, a direction
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    uint2 two = {0, 0};
    if (g < K_RANK) two = *reinterpret_cast<const uint2*>(right + g * D + 16 * step + 4 * t);
    const u32 words[4] = {two.x, 0, two.y, 0};
    multiply(along, words, query[step][0], query[step][1]);
  }
  const u32 met = transposed(half_pair(along[0] / STEP_UP, along[1] / STEP_UP));
#pragma unroll
  for (int n = 0; n < ROWS; ++n) {
    u32 words[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u16* at = left + token_of(g, n, half) * K_RANK + 2 * t;
      words[half] = pair_of(at, at + 1, 2 * t < K_RANK, 2 * t + 1 < K_RANK);
    }
    multiply(scores[n], words, met, 0);
  }
}
// What it adds to sums.
device void mix_low_rank(float (&out)[STEPS][4], const u16* left, const u32 (&weights)[ROWS][2], int g, int t) {
  const u16* right = left + TILE * V_RANK;
  float along[4] = {};
#pragma unroll
  for (int step = 0; step < ROWS; ++step) {
    u32 words[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u16 *one = left + token_of(2 * t, step, half) * V_RANK, *two = left + token_of(2 * t + 1, step, half) * V_RANK;
      words[2 * half] = pair_of(one + g, two + g, g < V_RANK, g < V_RANK);
    }
    multiply(along, words, weights[step][0], weights[step][1]);
  }
  const u32 met = transposed(half_pair(along[0] / STEP_UP, along[1] / STEP_UP));
#pragma unroll
  for (int n = 0; n < STEPS; ++n) {
    u32 words[4] = {};
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const u16* at = right + 2 * t * D + 16 * g + 2 * n + odd;
      words[odd] = pair_of(at, at + D, 2 * t < V_RANK, 2 * t + 1 < V_RANK);
    }
    multiply(out[n], words, met, 0);
  }
}
