// Keys before RoPE, for attend.cu.
//
// A lane has both of the channels that turn together, half a vector apart, and turns keys by their place in the tile; it is
// the query that is turned back by the tile's first position.

// A place has a word with the cosines of two channels, then one with their sines, with a gap before the second half.
device int turn_at(int place, int two) { return place * TURN_ROW + 2 * two + (two >= 16 ? 4 : 0); }
// A first position has cosines of two channels, then their sines, in the order in which lanes read them side by side.
device int start_at(int two) { return 4 * (two % 8 * 4 + two / 8); }

device void fill_turns(u8* to, const u32* from) {
  for (int n = 16 * threadIdx.x; n < 4 * TURN_ROW * TILE; n += 16 * THREADS) copy_async(to + n, reinterpret_cast<const u8*>(from) + n, true);
}
// Pairs of this lane's channels as products take them: 16 t + 2 n and the next, and those that turn with them.
constexpr int FIRST_TURNED = 16, PARTNER = D / 2;

// Spreads and centers of two channels, then of those that turn with them, as lanes read them side by side; by the first
// threads of a block.
device uint4 spread_of(const float* center, const float* spread) {
  const int first = FIRST_TURNED * (threadIdx.x % 4) + 2 * (threadIdx.x / 4);
  const auto two = [&](const float* from, int channel) { return half_pair(from[channel], from[channel + 1]); };
  if (threadIdx.x >= 4 * STEPS) return {};
  return {two(spread, first), two(center, first), two(spread, first + PARTNER), two(center, first + PARTNER)};
}
// The query as lanes read it for `turn_query`, this thread's numbers of it; `asked(head, channel)`.
constexpr int LINED_EACH = EACH<TURNED ? 8 * D : 1>;
template <class Asked> device void line_up(float (&to)[LINED_EACH], Asked asked) {
#pragma unroll
  for (int k = 0; k < LINED_EACH; ++k) {
    const int n = (k * THREADS + threadIdx.x) % (8 * D), step = n / 128, head = n / 16 % 8, t = n / 4 % 4, part = n % 4;
    const int channel = FIRST_TURNED * t + 2 * step + part % 2 + part / 2 * PARTNER;
    to[k] = head < GROUP_HEADS ? asked(head, channel) : 0.0f;
  }
}
device void four_shared(float (&x)[2], float (&y)[2], const uint4* from) {
  const uint4 all = *from;
  x[0] = as_float(all.x), x[1] = as_float(all.y), y[0] = as_float(all.z), y[1] = as_float(all.w);
}
// Where outliers find what they meet in the first channel of two that turn together, of two heads in a word, and after
// that in the second.
constexpr int MET_OF_CHANNEL = 2 * PAIRS, MET_WORDS = D / 2 * MET_OF_CHANNEL + 32;
device int met_at(int channel) { return channel * MET_OF_CHANNEL + channel / 16 * 8; }

// The query turned back by a tile's first position, of which `start` has cosines and sines; and the same for outliers.
device void turn_query(u32 (&to)[STEPS][2], u32* for_outliers, const u8* lined, const float* start, int lane) {
  const int g = lane / 4, t = lane % 4;
  u32 met[STEPS][2];  // of one channel and heads 2 t, 2 t + 1
#pragma unroll
  for (int n = 0; n < STEPS; ++n) {
    float x[2], y[2], cosines[2], sines[2], low[2], high[2];
    four_shared(x, y, reinterpret_cast<const uint4*>(lined) + 32 * n + lane);
    four_shared(cosines, sines, reinterpret_cast<const uint4*>(start) + 4 * n + t);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      low[k] = x[k] * cosines[k] + y[k] * sines[k], high[k] = y[k] * cosines[k] - x[k] * sines[k];
    to[n][0] = half_pair(low[0], low[1]), to[n][1] = half_pair(high[0], high[1]);
    if constexpr (K_ENTRIES > 0) met[n][0] = transposed(to[n][0]), met[n][1] = transposed(to[n][1]);
  }
  if constexpr (K_ENTRIES > 0)
    if (t < PAIRS)
#pragma unroll
      for (int n = 0; n < STEPS; ++n) {
        u32* own = for_outliers + met_at(FIRST_TURNED * (g / 2) + 2 * n + g % 2) + t;
        own[0] = met[n][0], own[PAIRS] = met[n][1];
      }
}
// Two channels of a key and their partners, turned by an angle.
device void turn(u32& low, u32& high, u32 cosines, u32 sines) {
  const u32 x = low, y = high;
  low = fused(x, cosines, negated(fused(y, sines, 0)));
  high = fused(y, cosines, fused(x, sines, 0));
}

// Cosine and sine of a channel at a place of a tile.
struct Angle {
  float cosine, sine;
};
device Angle angle_at(const u32* turns, const float* start, int place, int channel) {
  const int two = channel % (D / 2) / 2, odd = channel % 2;
  const u32* at = turns + turn_at(place, two);
  const float c = half_value(u16(at[0] >> 16 * odd)), s = half_value(u16(at[1] >> 16 * odd));
  const float *first = start + start_at(two) + odd, cosine = first[0], sine = first[2];
  return {cosine * c - sine * s, sine * c + cosine * s};
}
