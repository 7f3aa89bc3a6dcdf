// Keys before RoPE, and single numbers beside codes, for attend.cu.
//
// A key that is to be turned by its place meets the query twice, times the cosines and times the sines of its place in
// the tile; it is the query that is turned by the tile's first position. Outliers of a token are those of all heads, in
// no order: lists of a tile are copied ahead, and each lane looks through a part of them for those of its head.

constexpr int TURN_ROW = 68;  // words from one place to the next, so that lanes read different banks
device int turn_at(int place, int two) { return place * TURN_ROW + 2 * two + (two >= 16 ? 2 : 0); }

// Cosines and sines of two channels each, [128 places][32][2] words, to where `turn_at` finds them.
device void fill_turns(u32* to, const u32* from) {
  for (int n = threadIdx.x; n < TILE * 64; n += THREADS) to[turn_at(n / 64, n % 64 / 2) + n % 2] = from[n];
}

struct Turned {
  u32 straight[STEPS][2], crossed[STEPS][2], center[STEPS][2];
};

device void four_numbers(float (&x)[4], const uint4& all) {
  x[0] = as_float(all.x), x[1] = as_float(all.y), x[2] = as_float(all.z), x[3] = as_float(all.w);
}
device void four_shared(float (&x)[4], const float* from) { four_numbers(x, *reinterpret_cast<const uint4*>(from)); }
device void four_global(float (&x)[4], const float* from) {
  four_numbers(x, load_shared_by_all(reinterpret_cast<const uint4*>(from)));
}
// The query turned back by a tile's first position, of which `start` has cosines and sines; times the spread of channels,
// but not what is `left` for outliers, [D][GROUP_HEADS]. What their centers add depends on the place alone: its cosines
// are met by lanes of the first channels, its sines by the others.
device void turn_query(
    Turned& to, u32* left, const float* asked, const float* start, const float* center, const float* spread, int g, int t) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int first = 32 * t + 4 * step;
    float x[4] = {}, y[4] = {}, cosines[4], sines[4], straight[4], crossed[4], middle[4] = {};
    if (g < GROUP_HEADS) four_shared(x, asked + g * D + first), four_shared(y, asked + g * D + (first + D / 2) % D);
    four_global(cosines, start + first), four_global(sines, start + D + first);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float partner = t < 2 ? y[k] : -y[k];  // the channel that turns with this one
      straight[k] = x[k] * cosines[k] + partner * sines[k];
      crossed[k] = partner * cosines[k] - x[k] * sines[k];
      if constexpr (K_ENTRIES > 0)
        if (g < GROUP_HEADS) left[(first + k) * GROUP_HEADS + g] = half_pair(straight[k], crossed[k]);
    }
    if constexpr (K_SPREAD) {
      float centers[4], spreads[4];
      four_global(centers, center + first), four_global(spreads, spread + first);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float cosine = centers[k] * straight[k], sine = centers[k] * crossed[k];
        middle[k] = (t < 2 ? cosine : sine) + of_lane_xor(t < 2 ? sine : cosine, 2);
        straight[k] *= spreads[k], crossed[k] *= spreads[k];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to.straight[step][half] = half_pair(straight[2 * half], straight[2 * half + 1]);
      to.crossed[step][half] = half_pair(crossed[2 * half], crossed[2 * half + 1]);
      to.center[step][half] = half_pair(middle[2 * half], middle[2 * half + 1]);
    }
  }
}

// Cosine and sine of a channel at a place of a tile.
struct Angle {
  float cosine, sine;
};
device Angle angle_at(const u32* turns, const float* start, int place, int channel) {
  const u32* at = turns + turn_at(place, channel % (D / 2) / 2);
  const float c = half_value(u16(at[0] >> 16 * (channel % 2))), s = half_value(u16(at[1] >> 16 * (channel % 2)));
  return {start[channel] * c - start[D + channel] * s, start[D + channel] * c + start[channel] * s};
}

template <int BYTES> device int index_at(const u8* indices, int n) {
  return BYTES == 1 ? indices[n] : int(reinterpret_cast<const u16*>(indices)[n]);
}

// What a warp has of outliers in shared memory.
struct Outliers {
  float* beside;  // [TILE][GROUP_HEADS]: what they add to scores, then the weights of tokens
  float* added;   // [D][GROUP_HEADS]: what they add to sums
  u32* turned;    // [D][GROUP_HEADS]: the query times a tile's first position, straight and crossed
  u8* takers;     // [D]: the lane whose turn it is to add to a channel
  u8* list;       // values [TILE][ENTRIES] of keys or of values, and their indices
};
device Outliers outliers_at(u8* base) {
  float *beside = reinterpret_cast<float*>(base), *added = beside + GROUP_HEADS * TILE;
  u32* turned = reinterpret_cast<u32*>(added + GROUP_HEADS * D);
  u8* takers = reinterpret_cast<u8*>(turned + (TURNED ? GROUP_HEADS * D : 0));
  return {beside, added, turned, takers, takers + D};
}
template <int ENTRIES> device void copy_list(u8* list, const u8* values, const u8* indices, int lane) {
  copy_span(list, values, TILE * ENTRIES * 2, lane);
  copy_span(list + TILE * ENTRIES * 2, indices, TILE * ENTRIES * INDEX_BYTES, lane);
}

// `use(real, place, channel, value)` of each outlier that is of this head, by all lanes together. A lane has those of four
// tokens, so that no two have the same place.
template <int ENTRIES, class Use> device void each_outlier(const u8* list, int head, int lane, Use use) {
  constexpr int OWN = 4 * ENTRIES, AT_ONCE = 64, EACH = 4 / INDEX_BYTES;
  const u8* indices = list + TILE * ENTRIES * 2;
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

// What outliers of keys add to the scores of their tokens.
device void score_outliers(const Outliers& outliers, const u32* turns, const float* asked, int head, int lane) {
  for (int n = lane; n < GROUP_HEADS * TILE; n += 32) outliers.beside[n] = 0.0f;
  warp_barrier();
  each_outlier<K_ENTRIES>(outliers.list, head, lane, [&](bool real, int place, int channel, float value) {
    if (!real) return;
    float cosine = value, sine = 0.0f;
    if constexpr (TURNED) {
      const u32* at = turns + turn_at(place, channel % (D / 2) / 2);
      cosine *= half_value(u16(at[0] >> 16 * (channel % 2))), sine = value * half_value(u16(at[1] >> 16 * (channel % 2)));
    }
    change_heads(outliers.beside + place * GROUP_HEADS, [&](float score, int each) {
      if constexpr (!TURNED) return score + cosine * asked[each * D + channel];
      const u32 met = outliers.turned[channel * GROUP_HEADS + each];
      return score + cosine * half_value(u16(met)) + sine * half_value(u16(met >> 16));
    });
  });
  warp_barrier();
}

// What outliers of values add to sums, of which `fade` is kept.
device void mix_outliers(const Outliers& outliers, const float (&fade)[2], int head, int lane) {
  float kept[GROUP_HEADS];
#pragma unroll
  for (int each = 0; each < GROUP_HEADS; ++each) kept[each] = of_lane(fade[each % 2], each / 2);
  for (int channel = lane; channel < D; channel += 32)
    change_heads(outliers.added + channel * GROUP_HEADS, [&](float sum, int each) { return sum * kept[each]; });
  warp_barrier();
  each_outlier<V_ENTRIES>(outliers.list, head, lane, [&](bool real, int place, int channel, float value) {
    do {  // one lane after the other where several have the same channel
      if (real) outliers.takers[channel] = u8(lane);
      warp_barrier();
      if (real && outliers.takers[channel] == lane) {
        const float* weights = outliers.beside + place * GROUP_HEADS;
        change_heads(outliers.added + channel * GROUP_HEADS, [&](float sum, int each) { return sum + weights[each] * value; });
        real = false;
      }
      warp_barrier();
    } while (votes(real));
  });
}
