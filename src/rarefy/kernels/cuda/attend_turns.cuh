// Keys before RoPE, for attend.cu.
//
// A lane has both of the channels that turn together, half a vector apart, and turns keys by their place in the tile; it is
// the query that is turned back by the tile's first position.

constexpr int TURN_ROW = 68;  // words from one place to the next, so that lanes read different banks
device int turn_at(int place, int two) { return place * TURN_ROW + 2 * two + (two >= 16 ? 2 : 0); }

// Cosines and sines of two channels each, [TILE places][32][2] words, to where `turn_at` finds them.
device void fill_turns(u32* to, const u32* from) {
  const auto put = [&](int n, u32 word) { to[turn_at(n / 64, n % 64 / 2) + n % 2] = word; };
  fill<64 * TILE>([&](int n) { return from[n]; }, put);
}

device void two_shared(float (&x)[2], const float* from) {
  const uint2 both = *reinterpret_cast<const uint2*>(from);
  x[0] = as_float(both.x), x[1] = as_float(both.y);
}
// Pairs of this lane's channels as products take them: 16 t + 2 n and the next, and those that turn with them.
constexpr int FIRST_TURNED = 16, PARTNER = D / 2;

// Centers and spreads of channels.
device void load_spread(u32 (&centers)[STEPS][2], u32 (&spreads)[STEPS][2], const float* center, const float* spread, int t) {
#pragma unroll
  for (int n = 0; n < STEPS; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = half * PARTNER + FIRST_TURNED * t + 2 * n;
      centers[n][half] = half_pair(center[channel], center[channel + 1]);
      spreads[n][half] = half_pair(spread[channel], spread[channel + 1]);
    }
}
// The query turned back by a tile's first position, of which `start` has cosines and sines; and for outliers [D][GROUP_HEADS]
// what a channel of a key meets straight, and what it meets as its partner.
device void turn_query(u32 (&to)[STEPS][2], u32* for_outliers, const float* asked, const float* start, int g, int t) {
#pragma unroll
  for (int n = 0; n < STEPS; ++n) {
    float low[2] = {}, high[2] = {};
    const int first = FIRST_TURNED * t + 2 * n;
    if (g < GROUP_HEADS) {
      float x[2], y[2], cosines[2], sines[2];
      two_shared(x, asked + g * D + first), two_shared(y, asked + g * D + first + PARTNER);
      two_shared(cosines, start + first), two_shared(sines, start + D + first);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        low[k] = x[k] * cosines[k] + y[k] * sines[k], high[k] = y[k] * cosines[k] - x[k] * sines[k];
        if constexpr (K_ENTRIES > 0) {
          for_outliers[(first + k) * GROUP_HEADS + g] = half_pair(low[k], high[k]);
          for_outliers[(first + k + PARTNER) * GROUP_HEADS + g] = half_pair(high[k], -low[k]);
        }
      }
    }
    to[n][0] = half_pair(low[0], low[1]), to[n][1] = half_pair(high[0], high[1]);
  }
}
// Two channels of a key and their partners, turned by an angle.
device void turn(u32& low, u32& high, const uint2& angle) {
  const u32 x = low, y = high;
  low = fused(x, angle.x, negated(fused(y, angle.y, 0)));
  high = fused(y, angle.x, fused(x, angle.y, 0));
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
