// What fills no tile of attend.cu, token by token.

template <int BITS> device int code_at(const u8* base, int number) {
  const int bit = number * BITS, shift = bit % 8;
  u32 bits = base[bit / 8];
  if (8 % BITS != 0 && shift + BITS > 8) bits |= u32(base[bit / 8 + 1]) << 8;
  return bits >> shift & ((1 << BITS) - 1);
}
// Four channels from `channel` on of token `inside` of a piece in code, without outliers; `heads` of a row; PARTS of a set
// of products.
template <int KIND, int BITS, int GROUP, bool SCALE, bool OFFSET, int PARTS>
device void coded_numbers(float (&x)[4], const u8* codes, const u8* steps, const u8* zeros, const u16* table, int inside, int channel, int heads) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int c = channel + n;
    if constexpr (KIND == CHANNEL) {
      const int group = c * (TILE / GROUP);
      x[n] = (code_at<BITS>(codes + c * (TILE * BITS / 8), inside) - half_value(half_at(zeros, group))) * half_value(half_at(steps, group));
    } else if constexpr (KIND == TOKEN) {
      const int group = inside * (D / GROUP) + c / GROUP;
      x[n] = (code_at<BITS>(codes, inside * D + c) - half_value(half_at(zeros, group))) * half_value(half_at(steps, group));
    } else if constexpr (KIND == TABLE) {
      x[n] = half_value(table[code_at<BITS>(codes, inside * heads * D + c)]);
      if constexpr (SCALE) x[n] *= half_value(half_at(steps, inside));
      if constexpr (OFFSET) x[n] += half_value(half_at(zeros, inside));
    } else if constexpr (KIND == FLOAT8) {
      x[n] = half_value(u16(halves_of_e4m3(codes[inside * D + c]))) * half_value(half_at(steps, inside));
    } else {
      x[n] = half_value(table[(codes[inside * (D / 2) + c / 2] * 64 + place_of_part<PARTS>(c / 2)) * 2 + c % 2]);
    }
  }
}
template <int TYPE> device void exact_numbers(float (&x)[4], const void* from, i64 row, int channel) {
  const i64 at = (row * D + channel) / 4;
  if constexpr (TYPE == F32) {
    const uint4 all = load_once(static_cast<const uint4*>(from) + at);
    x[0] = as_float(all.x), x[1] = as_float(all.y), x[2] = as_float(all.z), x[3] = as_float(all.w);
  } else {
    const uint2 all = load_once(static_cast<const uint2*>(from) + at);
    x[0] = number_of<TYPE>(all.x), x[1] = number_of<TYPE>(all.x >> 16);
    x[2] = number_of<TYPE>(all.y), x[3] = number_of<TYPE>(all.y >> 16);
  }
}

// Outliers of token `inside`, added to its four channels from `channel` on.
template <int ENTRIES> device void add_outliers(float (&x)[4], const u8* values, const u8* indices, int inside, int channel) {
  for (int n = 0; n < ENTRIES; ++n) {
    const int at = index_at<INDEX_BYTES>(indices, inside * ENTRIES + n) - channel;
    const float value = half_value(half_at(values, inside * ENTRIES + n));
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] += at == k ? value : 0.0f;
  }
}

struct Token {
  float key[4], value[4];
  bool there, k_coded, v_coded;
};
device void load_token(Token& it, const Arguments& a, const u32* turns, const float* starts, const Pair& pair, int token, int lane) {
  const int channel = 4 * lane, first = a.tiles * TILE;
  const i64* sinks = a.sinks + pair.batch * SINKS;
  it.k_coded = token < a.k_coded, it.v_coded = token < a.v_coded;
  it.there = token < a.length + SINKS;
  if constexpr (SINKS > 0) {
    if (token < a.length)
      for (int n = 0; n < SINKS; ++n) it.there &= sinks[n] != token;
    else it.there &= it.there && sinks[token - a.length] >= 0;
  }
  if (!it.there) return;
  if (token >= a.length) {
    it.k_coded = it.v_coded = false;
    exact_numbers<EXACT>(it.key, a.k_sink, i64(pair.number) * SINKS + token - a.length, channel);
    exact_numbers<EXACT>(it.value, a.v_sink, i64(pair.number) * SINKS + token - a.length, channel);
    return;
  }
  Places p = {};
  const int inside = (token - first) % 32;
  if (it.k_coded || it.v_coded) p = places_of(a.pieces, a.count_of_pieces, (token - first) / 32, pair, a.heads);
  const int heads = JOINED ? a.heads : 1, of_head = pair.head * D + channel;
  if constexpr (JOINED) p.k_codes += pair.head * K_ROW, p.v_codes += pair.head * V_ROW;
  if (it.k_coded) {
    coded_numbers<K_KIND, K_BITS, K_GROUP, K_SCALE, K_OFFSET, K_PARTS>(it.key, p.k_codes, p.k_steps, p.k_zeros, table_of<K_KIND>(a.k_table, pair.head), inside, channel, heads);
    if constexpr (K_SPREAD)
#pragma unroll
      for (int n = 0; n < 4; ++n) it.key[n] = it.key[n] * a.k_spread[of_head + n] + a.k_center[of_head + n];
    if constexpr (JOINED) add_outliers<K_ENTRIES>(it.key, p.k_out, p.k_out_at, inside, of_head);
    if constexpr (TURNED)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Angle angle = angle_at(turns, starts + token / TILE * D, token % TILE, channel + n);
        const float other = of_lane_xor(it.key[n], 16);
        it.key[n] = it.key[n] * angle.cosine + (channel < D / 2 ? -other : other) * angle.sine;
      }
  } else {
    exact_numbers<EXACT>(it.key, a.k_tail, i64(pair.number) * (a.length - a.k_coded) + token - a.k_coded, channel);
  }
  if (it.v_coded) {
    coded_numbers<V_KIND, V_BITS, V_GROUP, true, V_OFFSET, V_PARTS>(it.value, p.v_codes, p.v_steps, p.v_zeros, table_of<V_KIND>(a.v_table, pair.head), inside, channel, heads);
    if constexpr (JOINED) add_outliers<V_ENTRIES>(it.value, p.v_out, p.v_out_at, inside, of_head);
  } else {
    exact_numbers<EXACT>(it.value, a.v_tail, i64(pair.number) * (a.length - a.v_coded) + token - a.v_coded, channel);
  }
}

// This warp's tokens of the rest, left in shared memory: sums [GROUP_HEADS][D] of what is exact, then, if it was turned,
// of what is in code, eight tops, eight totals.
device void take_rest(
    const Arguments& a, const float* asked, const u32* turns, const float* starts, float* to, const Pair& pair, int number, int stride,
    int lane) {
  constexpr int TOGETHER = 2;
  float sums[REST_PARTS][GROUP_HEADS][4] = {}, top[GROUP_HEADS], total[GROUP_HEADS] = {};
#pragma unroll
  for (int head = 0; head < GROUP_HEADS; ++head) top[head] = never();
  for (int token = a.tiles * TILE + number; token < a.length + SINKS; token += TOGETHER * stride) {
    Token tokens[TOGETHER];
#pragma unroll
    for (int n = 0; n < TOGETHER; ++n) load_token(tokens[n], a, turns, starts, pair, token + n * stride, lane);
#pragma unroll
    for (int n = 0; n < TOGETHER; ++n) {
      const Token& it = tokens[n];
      if (!it.there) continue;
      const float* own = asked + (it.k_coded ? GROUP_HEADS * D : 0) + 4 * lane;
#pragma unroll
      for (int head = 0; head < GROUP_HEADS; ++head) {
        float score = 0.0f;
#pragma unroll
        for (int c = 0; c < 4; ++c) score += own[head * D + c] * it.key[c];
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) score += of_lane_xor(score, distance);
        const float peak = max_of(top[head], score), fade = power_of_two(top[head] - peak), share = power_of_two(score - peak);
        top[head] = peak;
        total[head] = total[head] * fade + share;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float part = share * it.value[c];
          const bool turned = V_ROTATED && it.v_coded;
          sums[0][head][c] = sums[0][head][c] * fade + (turned ? 0.0f : part);
          if constexpr (V_ROTATED) sums[1][head][c] = sums[1][head][c] * fade + (turned ? part : 0.0f);
        }
      }
    }
  }
#pragma unroll
  for (int head = 0; head < GROUP_HEADS; ++head) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int part = 0; part < REST_PARTS; ++part) to[(part * GROUP_HEADS + head) * D + 4 * lane + c] = sums[part][head][c];
    }
    if (lane == 0) to[REST_PARTS * GROUP_HEADS * D + head] = top[head], to[REST_PARTS * GROUP_HEADS * D + 8 + head] = total[head];
  }
}
