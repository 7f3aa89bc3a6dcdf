// What is added to codes, for attend.cu: outliers, and matrices of low rank.
//
// Outliers are of a token over its channels or the channels of all heads, in no order, or of a channel over the tokens of a
// tile. Those that a product adds up over (of values, and of keys by channel) are scattered among zeros, those of 16
// vectors at once, and are one more product; those of keys by token a lane takes one by one for its own tokens. A matrix of
// low rank is two products.

constexpr bool K_ONE_BY_ONE = K_ENTRIES > 0 && K_KIND != CHANNEL;

// What a warp has in shared memory. Of keys by token, scores and the query are there while keys are read, what is scattered
// in their place while values are.
constexpr int SCATTERED = V_ENTRIES > 0 || (K_ENTRIES > 0 && !K_ONE_BY_ONE) ? 16 * D * 2 : 0;
constexpr int BESIDE = K_ONE_BY_ONE ? 4 * PAIRS * TILE : 0, OF_QUERY = K_ONE_BY_ONE && TURNED ? 4 * MET_WORDS : 0;
constexpr int IN_TURN = SCATTERED > BESIDE + OF_QUERY ? SCATTERED : BESIDE + OF_QUERY;
constexpr int list_bytes(int entries) { return TILE * entries * (2 + INDEX_BYTES); }
constexpr int factor_bytes(int rank) { return 2 * (TILE + D) * rank; }
constexpr int K_FACTORS = IN_TURN + list_bytes(K_ENTRIES), V_LIST = K_FACTORS + factor_bytes(K_RANK);
constexpr int V_FACTORS = V_LIST + list_bytes(V_ENTRIES);
constexpr int CORRECTIONS_OF_WARP = V_FACTORS + factor_bytes(V_RANK);
struct Corrections {
  u16* scattered;  // 8 words of two vectors for each place; see `scatter`
  u32* beside;     // [TILE][PAIRS]: what outliers add to scores
  u32* turned;     // what outliers meet; see `met_at`
  u8* k_list;      // values [vectors][ENTRIES], then their indices
  u16* k_factors;  // left [TILE][RANK], right [RANK][D]
  u8* v_list;
  u16* v_factors;
};
device Corrections corrections_at(u8* base) {
  return {reinterpret_cast<u16*>(base), reinterpret_cast<u32*>(base), reinterpret_cast<u32*>(base + BESIDE), base + IN_TURN,
          reinterpret_cast<u16*>(base + K_FACTORS), base + V_LIST, reinterpret_cast<u16*>(base + V_FACTORS)};
}
device void copy_k_corrections(const Corrections& to, const Places& p, int lane) {
  constexpr int VALUES = TILE * K_ENTRIES * 2;
  copy_span<VALUES>(to.k_list, p.k_out, lane);
  copy_span<TILE * K_ENTRIES * INDEX_BYTES>(to.k_list + VALUES, p.k_out_at, lane);
  copy_span<TILE * K_RANK * 2>(reinterpret_cast<u8*>(to.k_factors), p.k_left, lane);
  copy_span<D * K_RANK * 2>(reinterpret_cast<u8*>(to.k_factors + TILE * K_RANK), p.k_right, lane);
}
device void copy_v_corrections(const Corrections& to, const Places& p, int lane) {
  constexpr int VALUES = TILE * V_ENTRIES * 2;
  copy_span<VALUES>(to.v_list, p.v_out, lane);
  copy_span<TILE * V_ENTRIES * INDEX_BYTES>(to.v_list + VALUES, p.v_out_at, lane);
  copy_span<TILE * V_RANK * 2>(reinterpret_cast<u8*>(to.v_factors), p.v_left, lane);
  copy_span<D * V_RANK * 2>(reinterpret_cast<u8*>(to.v_factors + TILE * V_RANK), p.v_right, lane);
}
template <int BYTES> device int index_at(const u8* indices, int n) {
  return BYTES == 1 ? indices[n] : int(reinterpret_cast<const u16*>(indices)[n]);
}

device void clear_scattered(const Corrections& own, int lane) {
#pragma unroll
  for (int n = lane; n < SCATTERED / 16; n += 32) reinterpret_cast<uint4*>(own.scattered)[n] = {0, 0, 0, 0};
}
// A bit for each of so many entries.
template <bool FEW> struct BitsOf { typedef u32 Type; };
template <> struct BitsOf<false> { typedef u64 Type; };
template <int COUNT> using Bits = typename BitsOf<COUNT <= 32>::Type;
// Which of COUNT entries from `first` on are of this head's row.
template <int COUNT> device Bits<COUNT> own_entries(const u8* indices, int first, int head) {
  static_assert(COUNT <= 64, "an entry has a bit");
  constexpr int BITS = 8 * INDEX_BYTES;
  Bits<COUNT> found = 0;
#pragma unroll
  for (int n = 0; n < COUNT; n += 2) {
    u32 two;
    if constexpr (INDEX_BYTES == 1) two = half_at(indices, (first + n) / 2);
    else two = reinterpret_cast<const u32*>(indices)[(first + n) / 2];
    two ^= head * D * (1u | 1u << BITS);
    found |= Bits<COUNT>((two & ((1u << BITS) - 1)) < D) << n | Bits<COUNT>(two >> BITS < D) << (n + 1);
  }
  return found;
}

// Outliers of 16 vectors as the left operand of products: row g of product n is place 16 g + 2 n, row g + 8 the next; vectors
// are `vector_of(k, half)`, k < 8, of what is added up. Two neighbouring places have a row of 64 bytes; rows of lanes that
// read together are in different banks.
device int row_of(int two) { return two ^ (two / 8 & 1); }
device int scattered_at(int place, int k, int half) {
  return row_of(place / 2) * 32 + place % 2 * 2 + k / 2 * 8 + 4 * half + k % 2;
}
template <int ENTRIES> constexpr int PUTS = ENTRIES > 0 ? (ENTRIES + 1) / 2 : 1;

// Of vectors of one head: two lanes have a vector, and half of its outliers each. `at`: where this lane has put something,
// or -1. STEPPED: in so many steps of codes.
template <int ENTRIES, bool STEPPED, class VectorOf>
device void scatter(int (&at)[PUTS<ENTRIES>], u16* to, const u8* list, int lane, VectorOf vector_of) {
  const int k = lane / 2 % 8, half = lane / 16, first = vector_of(k, half) * ENTRIES + lane % 2;
#pragma unroll
  for (int n = 0; n < PUTS<ENTRIES>; ++n) {
    at[n] = -1;
    if (ENTRIES % 2 && 2 * n + lane % 2 >= ENTRIES) continue;
    const u16 value = half_at(list, first + 2 * n);
    at[n] = scattered_at(index_at<INDEX_BYTES>(list + TILE * ENTRIES * 2, first + 2 * n), k, half);
    to[at[n]] = STEPPED ? rounded<true>(half_value(value) / STEP_UP) : value;
  }
  warp_barrier();
}

// Of rows of all heads: a lane finds those of its own neighbouring tokens of a tile, as many of them at once as a word has
// bits, since to find one takes long.
constexpr int LANE_TOKENS = TILE / 32;
template <int ENTRIES> constexpr int TOGETHER = LANE_TOKENS > 1 && LANE_TOKENS * ENTRIES <= 64 ? LANE_TOKENS : 1;
// So many are looked at in any case, which of random ones are seldom more; then the rest, if some lane has more.
template <int ENTRIES> constexpr int USUAL = 2 + 2 * TOGETHER<ENTRIES>;
constexpr int NOWHERE = 0xFFFF;
template <int ENTRIES> struct OwnOutliers {
  u32 found[LANE_TOKENS / TOGETHER<ENTRIES>][USUAL<ENTRIES>];  // a value above its place among what is scattered
  Bits<TOGETHER<ENTRIES> * ENTRIES> left[LANE_TOKENS / TOGETHER<ENTRIES>];
  bool more;  // of some lane
};
// Entry `n` of a lane's tokens.
template <int ENTRIES> device u32 placed(const u8* list, int lane, int n) {
  const int token = LANE_TOKENS * lane + n / ENTRIES, entry = LANE_TOKENS * lane * ENTRIES + n;
  const int place = index_at<INDEX_BYTES>(list + TILE * ENTRIES * 2, entry) % D;
  return scattered_at(place, token % 8, token / 8 % 2) | half_at(list, entry) << 16;
}
template <int ENTRIES> device void find_own(OwnOutliers<ENTRIES>& own, const u8* list, int head, int lane) {
  constexpr int COUNT = TOGETHER<ENTRIES> * ENTRIES;
  own.more = false;
#pragma unroll
  for (int k = 0; k < LANE_TOKENS / TOGETHER<ENTRIES>; ++k) {
    auto& left = own.left[k];
    left = own_entries<COUNT>(list + TILE * ENTRIES * 2, LANE_TOKENS * lane * ENTRIES + k * COUNT, head);
#pragma unroll
    for (int n = 0; n < USUAL<ENTRIES>; ++n) {
      const u32 one = placed<ENTRIES>(list, lane, k * COUNT + (left != 0 ? lowest_of(left) : 0));
      own.found[k][n] = left != 0 ? one : NOWHERE;
      left &= left - 1;
    }
    own.more |= left != 0;
  }
  own.more = votes(own.more);
}
template <int ENTRIES> device void scatter_own(const OwnOutliers<ENTRIES>& own, u16* to, const u8* list, int step, int lane) {
  if (LANE_TOKENS * lane / 16 == step) {
#pragma unroll
    for (int k = 0; k < LANE_TOKENS / TOGETHER<ENTRIES>; ++k)
#pragma unroll
      for (int n = 0; n < USUAL<ENTRIES>; ++n)
        if (own.found[k][n] != NOWHERE) to[u16(own.found[k][n])] = u16(own.found[k][n] >> 16);
    if (own.more)
#pragma unroll
      for (int k = 0; k < LANE_TOKENS / TOGETHER<ENTRIES>; ++k)
        for (auto left = own.left[k]; left != 0; left &= left - 1) {
          const u32 one = placed<ENTRIES>(list, lane, k * TOGETHER<ENTRIES> * ENTRIES + lowest_of(left));
          to[u16(one)] = u16(one >> 16);
        }
  }
  warp_barrier();
}
// What was put there goes again.
template <int ENTRIES> device void take_back(const OwnOutliers<ENTRIES>& own, const Corrections& to, int step, int lane) {
  if (own.more) {
    clear_scattered(to, lane);
  } else if (LANE_TOKENS * lane / 16 == step) {
#pragma unroll
    for (int k = 0; k < LANE_TOKENS / TOGETHER<ENTRIES>; ++k)
#pragma unroll
      for (int n = 0; n < USUAL<ENTRIES>; ++n)
        if (own.found[k][n] != NOWHERE) to.scattered[u16(own.found[k][n])] = 0;
  }
}
template <int COUNT> device void take_back(const int (&at)[COUNT], const Corrections& to) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
    if (at[n] >= 0) to.scattered[at[n]] = 0;
}
// `clear()` takes away what was scattered.
template <int PRODUCTS, class Clear>
device void add_scattered(float (&sums)[PRODUCTS][4], const Corrections& own, u32 first, u32 second, int lane, Clear clear) {
  const int g = lane / 4, t = lane % 4;
  const uint4* even = reinterpret_cast<const uint4*>(own.scattered) + row_of(8 * g) * 4 + t;
  const uint4* odd = reinterpret_cast<const uint4*>(own.scattered) + row_of(8 * g + 1) * 4 + t;
#pragma unroll
  for (int n = 0; n < PRODUCTS; ++n) {
    const uint4 all = (n % 2 ? odd : even)[n / 2 * 8];
    const u32 words[4] = {all.x, all.y, all.z, all.w};
    multiply(sums[n], words, first, second);
  }
  warp_barrier();
  clear();
  warp_barrier();
}

// COUNT words that follow each other, from a multiple of as many on.
template <int COUNT> device void load_words(u32 (&to)[COUNT], const u32* from) {
  constexpr int WIDTH = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int n = 0; n < COUNT; n += WIDTH) {
    if constexpr (WIDTH == 4) {
      const uint4 all = *reinterpret_cast<const uint4*>(from + n);
      to[n] = all.x, to[n + 1] = all.y, to[n + 2] = all.z, to[n + 3] = all.w;
    } else if constexpr (WIDTH == 2) {
      const uint2 all = *reinterpret_cast<const uint2*>(from + n);
      to[n] = all.x, to[n + 1] = all.y;
    } else {
      to[n] = from[n];
    }
  }
}
// The query as outliers of keys after RoPE meet it, [D][PAIRS] of two heads each, by the whole block.
device void pair_up(u32* to, const float* asked) {
  for (int n = threadIdx.x; n < PAIRS * D; n += THREADS) {
    const int channel = n / PAIRS, head = n % PAIRS * 2;
    to[n] = half_pair(asked[head * D + channel], head + 1 < GROUP_HEADS ? asked[(head + 1) * D + channel] : 0.0f);
  }
}
// What an outlier of keys meets, times its value, is added to the sums of its token, of two heads in a word; `token` is
// number `own` of those that have sums. `asked`: see `pair_up`.
template <int COUNT>
device void add_met(u32 (&sums)[COUNT][PAIRS], int own, int token, int channel, u32 value, const u32* turned, const u32* turns, const u32* asked) {
  u32 met[TURNED ? 2 * PAIRS : PAIRS], along = value, across = 0;
  if constexpr (TURNED) {
    const int first_of_two = channel % (D / 2), odd = channel % 2;
    const uint2 angle = *reinterpret_cast<const uint2*>(turns + turn_at(token, first_of_two / 2));
    // Cosine and sine as the first of two that turn together goes with both, or the second.
    u32 both = permuted(angle.x, angle.y, (channel < D / 2 ? 0x5410u : 0x1054u) + 0x2222u * odd);
    both = fused(both ^ (channel < D / 2 ? 0u : 0x8000u), value, 0);
    along = permuted(both, both, 0x1010), across = permuted(both, both, 0x3232);
    load_words(met, turned + met_at(first_of_two));
  } else {
    load_words(met, asked + channel * PAIRS);
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const u32 straight = own == k ? along : 0, crossed = own == k ? across : 0;
#pragma unroll
    for (int two = 0; two < PAIRS; ++two) {
      if constexpr (TURNED) sums[k][two] = fused(met[PAIRS + two], crossed, sums[k][two]);
      sums[k][two] = fused(met[two], straight, sums[k][two]);
    }
  }
}
// What outliers of keys by token add to scores.
device void score_outliers(const Corrections& own, const u32* turns, const u32* asked, int head, int lane) {
  constexpr int TOKENS = TOGETHER<K_ENTRIES>, AT_ONCE = 2;
#pragma unroll 1
  for (int token = LANE_TOKENS * lane; token < LANE_TOKENS * (lane + 1); token += TOKENS) {
    const u8* indices = own.k_list + TILE * K_ENTRIES * 2;
    u32 sums[TOKENS][PAIRS] = {};
    Bits<TOKENS * K_ENTRIES> left = own_entries<TOKENS * K_ENTRIES>(indices, token * K_ENTRIES, head);
    const auto take_next = [&] {
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const int n = left != 0 ? lowest_of(left) : 0, entry = token * K_ENTRIES + n;
        const u32 value = left != 0 ? half_at(own.k_list, entry) * 0x10001u : 0;
        const int channel = index_at<INDEX_BYTES>(indices, entry) % D;
        add_met(sums, n / K_ENTRIES, token + n / K_ENTRIES, channel, value, own.turned, turns, asked);
        left &= left - 1;
      }
    };
#pragma unroll
    for (int n = 0; n < USUAL<K_ENTRIES> - 2; n += AT_ONCE) take_next();
    while (left != 0) take_next();
#pragma unroll
    for (int k = 0; k < TOKENS; ++k)
#pragma unroll
      for (int two = 0; two < PAIRS; ++two) own.beside[(token + k) * PAIRS + two] = sums[k][two];
  }
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
