// What is added to codes, for attend.cu: outliers, and matrices of low rank.
//
// Outliers are of a token over its channels or the channels of all heads, in no order, or of a channel over the tokens of a
// tile. Both kinds of corrections come to shared memory ahead, keys' and values' by turns.

template <int BYTES> device int index_at(const u8* indices, int n) {
  return BYTES == 1 ? indices[n] : int(reinterpret_cast<const u16*>(indices)[n]);
}

// What a warp has of them in shared memory.
struct Corrections {
  float* beside;  // [TILE][GROUP_HEADS]: what they add to scores, then the weights of tokens
  float* added;   // [D][GROUP_HEADS]: what they add to sums
  u32* turned;    // [D][GROUP_HEADS]: the query times a tile's first position, straight and crossed
  u8* takers;     // [128]: the lane whose turn it is to add to a token or a channel
  u8* list;       // values [vectors][ENTRIES] and their indices
  u16* factors;   // left [TILE][RANK], right [RANK][D]
};
device Corrections corrections_at(u8* base) {
  float *beside = reinterpret_cast<float*>(base), *added = beside + GROUP_HEADS * TILE;
  u32* turned = reinterpret_cast<u32*>(added + GROUP_HEADS * D);
  u8 *takers = reinterpret_cast<u8*>(turned + (TURNED ? GROUP_HEADS * D : 0)), *list = takers + D;
  return {beside, added, turned, takers, list, reinterpret_cast<u16*>(list + LISTS)};
}
template <int ENTRIES, int RANK>
device void copy_corrections(
    const Corrections& to, const u8* values, const u8* indices, const u8* left, const u8* right, int lane) {
  copy_span(to.list, values, TILE * ENTRIES * 2, lane);
  copy_span(to.list + TILE * ENTRIES * 2, indices, TILE * ENTRIES * INDEX_BYTES, lane);
  u8* factors = reinterpret_cast<u8*>(to.factors);
  copy_span(factors, left, TILE * RANK * 2, lane);
  copy_span(factors + TILE * RANK * 2, right, D * RANK * 2, lane);
}

// `use(real, vector, index, value)` of each outlier of this head, by all lanes together. A lane has those of four vectors.
template <int ENTRIES, class Use> device void each_outlier(const u8* list, int head, int lane, Use use) {
  constexpr int OWN = 4 * ENTRIES, AT_ONCE = 64, EACH = 4 / INDEX_BYTES;
  const u8* indices = list + TILE * ENTRIES * 2;
  if constexpr (!JOINED) {
    for (int n = lane * OWN; n < (lane + 1) * OWN; ++n)
      use(true, n / ENTRIES, index_at<INDEX_BYTES>(indices, n), half_value(half_at(list, n)));
    return;
  }
  const uint2* own = reinterpret_cast<const uint2*>(indices + lane * OWN * INDEX_BYTES);
  const u32 ours = head * D * (INDEX_BYTES == 1 ? 0x1010101u : 0x10001u);
#pragma unroll
  for (int first = 0; first < OWN; first += AT_ONCE) {
    u64 found = 0;
#pragma unroll
    for (int n = first; n < OWN && n < first + AT_ONCE; n += 2 * EACH) {
      const uint2 all = own[n / (2 * EACH)];
#pragma unroll
      for (int k = 0; k < 2 * EACH; ++k) {
        const u32 index = ((k < EACH ? all.x : all.y) ^ ours) >> k % EACH * 8 * INDEX_BYTES & ((1 << 8 * INDEX_BYTES) - 1);
        if (n + k < first + AT_ONCE) found |= u64(index < D) << (n + k - first);
      }
    }
    while (votes(found != 0)) {
      const bool real = found != 0;
      const int n = lane * OWN + (real ? first + lowest_of(found) : 0);
      use(real, n / ENTRIES, index_at<INDEX_BYTES>(indices, n) % D, half_value(half_at(list, n)));
      found &= found - 1;
    }
  }
}

// GROUP_HEADS numbers that follow each other, with `change(number, head)` in their place.
template <class Change> device void change_heads(float* at, Change change) {
  if constexpr (GROUP_HEADS % 4 == 0) {
#pragma unroll
    for (int head = 0; head < GROUP_HEADS; head += 4) {
      float x[4];
      four_shared(x, at + head);
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = change(x[k], head + k);
      *reinterpret_cast<uint4*>(at + head) = {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
    }
  } else {
#pragma unroll
    for (int head = 0; head < GROUP_HEADS; ++head) at[head] = change(at[head], head);
  }
}

// `add()` by each lane where it is `real`, by one after the other where several have the same place `at`.
template <class Add> device void in_turns(u8* takers, int at, bool real, int lane, Add add) {
  do {
    if (real) takers[at] = u8(lane);
    warp_barrier();
    if (real && takers[at] == lane) add(), real = false;
    warp_barrier();
  } while (votes(real));
}

// What corrections of keys add to the scores of their tokens.
device void score_corrections(const Corrections& own, const u32* turns, const float* asked, int head, int lane) {
  float along[K_RANK > 0 ? K_RANK : 1][GROUP_HEADS] = {};
  if constexpr (K_RANK > 0) {
    const u16* right = own.factors + TILE * K_RANK;
#pragma unroll
    for (int rank = 0; rank < K_RANK; ++rank)
#pragma unroll
      for (int each = 0; each < GROUP_HEADS; ++each) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < D / 32; ++n) sum += asked[each * D + 32 * n + lane] * half_value(right[rank * D + 32 * n + lane]);
        along[rank][each] = sum_of_warp(sum);
      }
  }
  for (int place = lane; place < TILE; place += 32) {
    float lefts[K_RANK > 0 ? K_RANK : 1];
#pragma unroll
    for (int rank = 0; rank < K_RANK; ++rank) lefts[rank] = half_value(own.factors[place * K_RANK + rank]);
    change_heads(own.beside + place * GROUP_HEADS, [&](float, int each) {
      float score = 0.0f;
#pragma unroll
      for (int rank = 0; rank < K_RANK; ++rank) score += lefts[rank] * along[rank][each];
      return score;
    });
  }
  warp_barrier();
  if constexpr (K_ENTRIES > 0)
    each_outlier<K_ENTRIES>(own.list, head, lane, [&](bool real, int vector, int index, float value) {
      const int place = K_KIND == CHANNEL ? index : vector, channel = K_KIND == CHANNEL ? vector : index;
      float cosine = value, sine = 0.0f;
      if constexpr (TURNED) {
        const u32* at = turns + turn_at(place, channel % (D / 2) / 2);
        cosine *= half_value(u16(at[0] >> 16 * (channel % 2))), sine = value * half_value(u16(at[1] >> 16 * (channel % 2)));
      }
      const auto add = [&] {
        change_heads(own.beside + place * GROUP_HEADS, [&](float score, int each) {
          if constexpr (!TURNED) return score + cosine * asked[each * D + channel];
          const u32 met = own.turned[channel * GROUP_HEADS + each];
          return score + cosine * half_value(u16(met)) + sine * half_value(u16(met >> 16));
        });
      };
      if constexpr (K_KIND == CHANNEL) in_turns(own.takers, place, real, lane, add);
      else if (real) add();  // no other lane has this token
    });
  warp_barrier();
}

// What corrections of values add to sums, of which `fade` is kept.
device void mix_corrections(const Corrections& own, const float (&fade)[2], int head, int lane) {
  float kept[GROUP_HEADS], along[V_RANK > 0 ? V_RANK : 1][GROUP_HEADS] = {};
#pragma unroll
  for (int each = 0; each < GROUP_HEADS; ++each) kept[each] = of_lane(fade[each % 2], each / 2);
  warp_barrier();
#pragma unroll
  for (int rank = 0; rank < V_RANK; ++rank)
#pragma unroll
    for (int each = 0; each < GROUP_HEADS; ++each) {
      float sum = 0.0f;
#pragma unroll
      for (int place = lane; place < TILE; place += 32)
        sum += own.beside[place * GROUP_HEADS + each] * half_value(own.factors[place * V_RANK + rank]);
      along[rank][each] = sum_of_warp(sum);
    }
  for (int channel = lane; channel < D; channel += 32) {
    float rights[V_RANK > 0 ? V_RANK : 1];
#pragma unroll
    for (int rank = 0; rank < V_RANK; ++rank) rights[rank] = half_value(own.factors[TILE * V_RANK + rank * D + channel]);
    change_heads(own.added + channel * GROUP_HEADS, [&](float sum, int each) {
      sum *= kept[each];
#pragma unroll
      for (int rank = 0; rank < V_RANK; ++rank) sum += along[rank][each] * rights[rank];
      return sum;
    });
  }
  warp_barrier();
  if constexpr (V_ENTRIES > 0)
    each_outlier<V_ENTRIES>(own.list, head, lane, [&](bool real, int place, int channel, float value) {
      in_turns(own.takers, channel, real, lane, [&] {
        const float* weights = own.beside + place * GROUP_HEADS;
        change_heads(own.added + channel * GROUP_HEADS, [&](float sum, int each) { return sum + weights[each] * value; });
      });
    });
}
