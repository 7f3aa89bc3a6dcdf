// Keys before RoPE, for attend.cu.
//
// A key that is to be turned by its place meets the query twice, times the cosines and times the sines of its place in
// the tile; it is the query that is turned by the tile's first position.

constexpr int TURN_ROW = 68;  // words from one place to the next, so that lanes read different banks
device int turn_at(int place, int two) { return place * TURN_ROW + 2 * two + (two >= 16 ? 2 : 0); }

// Cosines and sines of two channels each, [TILE places][32][2] words, to where `turn_at` finds them.
device void fill_turns(u32* to, const u32* from) {
  const auto put = [&](int n, u32 word) { to[turn_at(n / 64, n % 64 / 2) + n % 2] = word; };
  fill<64 * TILE>([&](int n) { return from[n]; }, put);
}

struct Turned {
  u32 straight[STEPS][2], crossed[STEPS][2], center[STEPS][2];
};

device void four_shared(float (&x)[4], const float* from) {
  const uint4 all = *reinterpret_cast<const uint4*>(from);
  x[0] = as_float(all.x), x[1] = as_float(all.y), x[2] = as_float(all.z), x[3] = as_float(all.w);
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
    four_shared(cosines, start + first), four_shared(sines, start + D + first);
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
      four_shared(centers, center + first), four_shared(spreads, spread + first);
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
