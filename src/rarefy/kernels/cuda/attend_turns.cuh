// Keys before RoPE, and single numbers beside codes, for attend.cu.
//
// A key that is to be turned by its place meets the query twice, times the cosines and times the sines of its place in
// the tile; it is the query that is turned by the tile's first position. Outliers of a token are those of all heads: a
// warp lists those of its head first.

constexpr int TURN_ROW = 68;  // words from one place to the next, so that lanes read different banks
device int turn_at(int place, int two) { return place * TURN_ROW + 2 * two + (two >= 16 ? 2 : 0); }

// Cosines and sines of two channels each, [128 places][32][2] words, to where `turn_at` finds them.
device void fill_turns(u32* to, const u32* from) {
  for (int n = threadIdx.x; n < TILE * 64; n += THREADS) to[turn_at(n / 64, n % 64 / 2) + n % 2] = from[n];
}

struct Turned {
  u32 straight[STEPS][2], crossed[STEPS][2], center[STEPS][2];
};

// The channel that turns with `channel`, of one head of the query.
device float partner_of(const float* asked, int channel) { return channel < D / 2 ? asked[channel + D / 2] : -asked[channel - D / 2]; }

// The query turned back by a tile's first position, of which `start` has cosines and sines; times the spread of channels.
// What their centers add depends on the place alone: its cosines are met by lanes of the first channels, its sines by
// the others.
device void turn_query(Turned& to, const float* asked, const float* start, const float* center, const float* spread, int g, int t) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float straight[2], crossed[2], middle[2] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int c = 32 * t + 4 * step + 2 * half + k;
        const float x = g < GROUP_HEADS ? asked[g * D + c] : 0.0f, y = g < GROUP_HEADS ? partner_of(asked + g * D, c) : 0.0f;
        straight[k] = x * start[c] + y * start[D + c];
        crossed[k] = y * start[c] - x * start[D + c];
        if constexpr (K_SPREAD) {
          const float cosine = center[c] * straight[k], sine = center[c] * crossed[k];
          const float other = of_lane_xor(t < 2 ? sine : cosine, 2);
          middle[k] = (t < 2 ? cosine : sine) + other;
          straight[k] *= spread[c], crossed[k] *= spread[c];
        }
      }
      to.straight[step][half] = half_pair(straight[0], straight[1]);
      to.crossed[step][half] = half_pair(crossed[0], crossed[1]);
      to.center[step][half] = half_pair(middle[0], middle[1]);
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

constexpr int LISTED = 256;  // outliers that are looked at before those of this head are used

template <int BYTES> device int index_at(const u8* indices, int n) {
  return BYTES == 1 ? indices[n] : int(reinterpret_cast<const u16*>(indices)[n]);
}

// `use(place, channel, value)` of each of ENTRIES outliers of a tile's tokens that is of this head.
template <int ENTRIES, class Use>
device void each_outlier(const u8* values, const u8* indices, int head, u32* list, int lane, Use use) {
  for (int first = 0; first < TILE * ENTRIES; first += LISTED) {
    int index[LISTED / 32], found = 0;
#pragma unroll
    for (int k = 0; k < LISTED / 32; ++k) {
      const int n = first + 32 * k + lane;
      index[k] = n < TILE * ENTRIES ? index_at<INDEX_BYTES>(indices, n) - head * D : -1;
    }
#pragma unroll
    for (int k = 0; k < LISTED / 32; ++k) {
      const int n = first + 32 * k + lane;
      const bool ours = index[k] >= 0 && index[k] < D;
      const u32 all = votes(ours);
      if (ours) {
        const int at = found + ones_of(all & ((1u << lane) - 1));
        list[at] = u32(n / ENTRIES) << 8 | u32(index[k]);
        list[LISTED + at] = half_at(values, n);
      }
      found += ones_of(all);
    }
    warp_barrier();
    for (int n = lane; n < found; n += 32) use(int(list[n] >> 8), int(list[n] & 255), half_value(u16(list[LISTED + n])));
    warp_barrier();
  }
}
