// Weights as bytes, for products of bytes by bytes.

// Of E4M3: what a code stands for is `factor * (code + shift) + offset` in float16, for rows g and g + 8. A shift is a
// zero point, so that what means zero stays zero.
struct Bytes {
  static constexpr int SIZE = 1, PIECE = 16;  // bytes of a number, numbers of a lane that are written at once
  float unit[2];  // of a byte's numbers, in one of a weight
  u32 factor[2], shift[2], offset[2];

  // The largest number that a row may hold, of all its groups, by four lanes; the tile is the warp's `r`-th. A row's step
  // is left at `partial` if wanted.
  void prepare(const Arguments& a, const Places& places, int r, int tile, bool wanted, int lane) {
    float most[2] = {};
#pragma unroll 4
    for (int group = lane % 4; group < a.groups; group += 4) {
      Pair<SCALE> scale;
      Pair<ZERO> zero;
      load(scale, a.scale, places.scales[r] + group * 8, places.second[r], group / SECOND_GROUPS);
      load(zero, a.zero, places.scales[r] + group * 8, places.second[r], group / SECOND_GROUPS);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const float low = contribution(scale, zero, which, -CENTER, 1.0f);
        const float high = contribution(scale, zero, which, (1 << BITS) - 1 - CENTER, 1.0f);
        most[which] = max_of(most[which], max_of(absolute(low), absolute(high)));
      }
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) most[which] = max_of(most[which], of_lane_xor(most[which], distance));
      const int row = tile * 16 + lane / 4 + 8 * which;
      unit[which] = most[which] > 0.0f ? 448.0f / most[which] : 0.0f;
      if (wanted && lane % 4 == 0 && row < a.rows) a.partial[row] = most[which] / 448.0f * a.multiplier;
    }
  }
  void begin_group(const Pair<SCALE>& scale, const Pair<ZERO>& zero) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float none = contribution(scale, zero, which, 0.0f, 1.0f);
      const float slope = contribution(scale, zero, which, 1.0f, 1.0f) - none;
      factor[which] = rounded<true>(slope * unit[which]) * 0x10001u;
      shift[which] = rounded<true>(slope == 0.0f ? 0.0f : none / slope) * 0x10001u;
      offset[which] = rounded<true>(none * unit[which]) * 0x10001u;
    }
  }
  // Four numbers of a row from two pairs of codes.
  u32 four(u32 first, u32 second, int which) const {
#if defined(RAREFY_EMULATED) || __CUDA_ARCH__ >= 890
    return e4m3_of_halves(number(first, which)) | u32(e4m3_of_halves(number(second, which))) << 16;
#else
    return 0;
#endif
  }
  void put(u8* to, u32 first, u32 second, int which) const { *reinterpret_cast<u32*>(to) = four(first, second, which); }
  u32 number(u32 codes, int which) const {
    if constexpr (SCALE == PAIRS) return fused(codes, factor[which], offset[which]);
    else return fused(SUMS ? fused(codes, ONES, shift[which]) : codes, factor[which], 0);
  }
};
