// Where the codes of a tile are, and what of them a lane loads, for attend.cu.

constexpr int K_WORDS = K_KIND == CHANNEL || TURNED ? 4 * words_of(K_BITS, 16) : K_KIND == PRODUCT ? 8 : 2 * words_of(K_BITS, 32);
constexpr int V_WORDS = V_KIND == PRODUCT ? 8 : 4 * words_of(V_BITS, 16);
constexpr int MOST_WORDS = K_WORDS > V_WORDS ? K_WORDS : V_WORDS;

struct Places {
  const u8* k_codes;
  const u8* k_steps;
  const u8* k_zeros;
  const u8* v_codes;
  const u8* v_steps;
  const u8* v_zeros;
  const u8* k_out;
  const u8* k_out_at;
  const u8* v_out;
  const u8* v_out_at;
  const u8* k_left;
  const u8* k_right;
  const u8* v_left;
  const u8* v_right;
};

constexpr int K_ROW = K_KIND == CHANNEL ? TILE * K_BITS / 8 : K_KIND == PRODUCT ? 64 : D * K_BITS / 8;  // bytes of a channel or token
constexpr int V_ROW = V_KIND == PRODUCT ? 64 : D * V_BITS / 8;

// Addresses for a sequence, and a head that has rows of its own; nothing is done to what is read where that can be spared,
// so that nothing waits for it.
device Places places_of(const i64* places, int count, int number, const Pair& pair, int heads) {
  const i64* at = places + number;
  constexpr i64 K_BYTES = K_KIND == CHANNEL ? D * K_BITS / 8 : K_ROW;  // of a token
  const auto from = [&](int row) { return reinterpret_cast<const u8*>(at[i64(row) * count]); };
  Places p = {from(K_CODES), from(K_STEPS), from(K_ZEROS), from(V_CODES), from(V_STEPS), from(V_ZEROS)};
  if constexpr (K_ENTRIES > 0) p.k_out = from(K_OUT), p.k_out_at = from(K_OUT_AT);
  if constexpr (V_ENTRIES > 0) p.v_out = from(V_OUT), p.v_out_at = from(V_OUT_AT);
  if constexpr (K_RANK > 0) p.k_left = from(K_LEFT), p.k_right = from(K_RIGHT);
  if constexpr (V_RANK > 0) p.v_left = from(V_LEFT), p.v_right = from(V_RIGHT);
  const i64 rows = JOINED ? pair.batch : pair.number;
  if (JOINED && rows == 0) return p;
  const i64 k_tokens = rows * at[i64(K_TOKENS) * count], v_tokens = rows * at[i64(V_TOKENS) * count];
  p.k_codes += k_tokens * (JOINED ? heads * K_BYTES : K_BYTES), p.v_codes += v_tokens * (JOINED ? heads * V_ROW : V_ROW);
  p.k_steps += k_tokens * (K_SPAN / TILE), p.k_zeros += k_tokens * (K_SPAN / TILE);
  p.v_steps += v_tokens * (V_SPAN / TILE), p.v_zeros += v_tokens * (V_SPAN / TILE);
  if constexpr (K_ENTRIES > 0) p.k_out += k_tokens * K_ENTRIES * 2, p.k_out_at += k_tokens * K_ENTRIES * INDEX_BYTES;
  if constexpr (V_ENTRIES > 0) p.v_out += v_tokens * V_ENTRIES * 2, p.v_out_at += v_tokens * V_ENTRIES * INDEX_BYTES;
  // Blocks have as many tokens as channels, and so both factors the same size.
  if constexpr (K_RANK > 0) p.k_left += k_tokens * K_RANK * 2, p.k_right += k_tokens * K_RANK * 2;
  if constexpr (V_RANK > 0) p.v_left += v_tokens * V_RANK * 2, p.v_right += v_tokens * V_RANK * 2;
  return p;
}

template <int BYTES> device void copy_span(u8* to, const u8* from, int lane) {
#pragma unroll
  for (int first = 0; first < BYTES; first += 512) {
    const int n = first + 16 * lane;
    if (first + 512 <= BYTES || n < BYTES) copy_async(to + n, from + n, true);
  }
}
device void copy_scales(u8* buffer, u8* to_start, const Places& p, const float* start, int lane) {
  copy_span<K_SPAN>(buffer, p.k_steps, lane);
  copy_span<K_ZERO_SPAN>(buffer + K_SPAN, p.k_zeros, lane);
  copy_span<V_SPAN>(buffer + K_SPAN + K_ZERO_SPAN, p.v_steps, lane);
  copy_span<V_ZERO_SPAN>(buffer + K_SPAN + K_ZERO_SPAN + V_SPAN, p.v_zeros, lane);
  copy_span<START_SPAN>(to_start, reinterpret_cast<const u8*>(start), lane);
}

// The token of row g (`half` 0) or g + 8 of product n of a tile. By channel a lane has neighbours; else neighbouring lanes
// do, so that a load finds them side by side.
device int token_of(int g, int n, int half) { return K_KIND == CHANNEL ? 16 * g + 2 * n + half : 16 * n + g + 8 * half; }

// Bytes from one token of a tile to the next, or from one of its channels.
device int stride_of_keys(int heads) { return JOINED ? heads * K_ROW : K_ROW; }
device int stride_of_values(int heads) { return JOINED ? heads * V_ROW : V_ROW; }
// How far from a tile's codes those of a lane begin; in a row of all heads, those of one.
device int keys_of_lane(int g, int t, int head, int heads) {
  if constexpr (K_KIND == CHANNEL) return 4 * t * K_ROW + bytes_of_16(K_BITS, g);
  const int of_head = JOINED ? head * K_ROW : 0;
  return of_head + token_of(g, 0, 0) * stride_of_keys(heads) + (TURNED ? bytes_of_16(K_BITS, t) : t * (K_ROW / 4));
}
device int values_of_lane(int g, int t, int head, int heads) {
  const int of_head = JOINED ? head * V_ROW : 0;
  return of_head + token_of(2 * t, 0, 0) * stride_of_values(heads) + bytes_of_16(V_KIND == PRODUCT ? 4 : V_BITS, g);
}
// Part `step` of a tile's keys: 16 channels of all tokens, or all channels of 16 tokens; `codes` of this lane.
device void fetch_keys(u32 (&slot)[MOST_WORDS], const u8* codes, int step, int heads) {
  const int stride = stride_of_keys(heads);
  const u8* at = codes + (K_KIND == CHANNEL ? 16 * step : token_of(0, step, 0)) * stride;
  if constexpr (K_KIND == CHANNEL) {
#pragma unroll
    for (int n = 0; n < 4; ++n) load_16<K_BITS>(slot + n * words_of(K_BITS, 16), at + n * stride);
  } else if constexpr (TURNED) {
#pragma unroll
    for (int n = 0; n < 4; ++n)  // each token's channels, and their partners
      load_16<K_BITS>(slot + n * words_of(K_BITS, 16), at + token_of(0, 0, n / 2) * stride + n % 2 * (K_ROW / 2));
  } else {
    constexpr int BITS = K_KIND == PRODUCT ? 4 : K_BITS;
#pragma unroll
    for (int n = 0; n < 2; ++n) load_32<BITS>(slot + n * words_of(BITS, 32), at + token_of(0, 0, n) * stride);
  }
}
// Part `step` of a tile's values: four tokens of a lane, as products of weights have them.
device void fetch_values(u32 (&slot)[MOST_WORDS], const u8* codes, int step, int heads) {
  constexpr int BITS = V_KIND == PRODUCT ? 4 : V_BITS;
  const int stride = stride_of_values(heads);
  const u8* at = codes + token_of(0, step, 0) * stride;
#pragma unroll
  for (int n = 0; n < 4; ++n) load_16<BITS>(slot + n * words_of(BITS, 16), at + token_of(n % 2, 0, n / 2) * stride);
}

device u32 half_at(const u8* base, int index) { return reinterpret_cast<const u16*>(base)[index]; }
device u32 halves_at(const u8* base, int first, int second) { return half_at(base, first) | half_at(base, second) << 16; }
// Numbers of tokens, those of rows g and g + 8 of product n.
device u32 two_rows(const u8* base, int g, int n) {
  if constexpr (K_KIND == CHANNEL) return *reinterpret_cast<const u32*>(base + 2 * token_of(g, n, 0));
  else return halves_at(base, token_of(g, n, 0), token_of(g, n, 1));
}
