// How the sums of warps come together, and then those of blocks, for attend.cu.

// Rows of 128 numbers turned by a Hadamard matrix, by the whole block.
device void hadamard(float* rows, int count) {
  for (int half = 1; half < D; half *= 2) {
    for (int n = threadIdx.x; n < count * D / 2; n += THREADS) {
      float* at = rows + n / half * 2 * half + n % half;
      const float first = at[0], second = at[half];
      at[0] = first + second, at[half] = first - second;
    }
    block_barrier();
  }
}

// `sums` [WARPS][8][D] of what is in code, after them tops and totals [WARPS][8], and what `take_rest` left: the part of a
// block. The place of the query serves as the sums of what is exact, and of what is in code.
device void join_warps(const Arguments& a, float* exact_sums, const float* sums, const float* rest, i64 pair, int split) {
  float* coded_sums = exact_sums + GROUP_HEADS * D;
  const float *tops = sums + WARPS * 8 * D, *totals = tops + WARPS * 8;
  for (int n = 2 * threadIdx.x; n < GROUP_HEADS * D; n += 2 * THREADS) {
    const int head = n / D, channel = n % D;
    float most = never(), coded[2] = {}, exact[2] = {}, whole = 0.0f, x[2];
#pragma unroll
    for (int each = 0; each < WARPS; ++each) {
      const float* own = rest + each * (OWN_OF_WARP / 4) + REST_PARTS * GROUP_HEADS * D + head;
      most = max_of(most, max_of(tops[each * 8 + head], own[0]));
    }
    const float base = most == never() ? 0.0f : most;
#pragma unroll
    for (int each = 0; each < WARPS; ++each) {
      const float *own = rest + each * (OWN_OF_WARP / 4), *about = own + REST_PARTS * GROUP_HEADS * D;
      const float share = power_of_two(tops[each * 8 + head] - base), of_rest = power_of_two(about[head] - base);
      const auto add = [&](float (&to)[2], float times, const float* from) {
        two_shared(x, from);
        to[0] += times * x[0], to[1] += times * x[1];
      };
      add(coded, share, sums + (each * 8 + head) * D + channel);
      add(exact, of_rest, own + head * D + channel);
      if constexpr (V_ROTATED) add(coded, of_rest, own + (GROUP_HEADS + head) * D + channel);
      whole += share * totals[each * 8 + head] + of_rest * about[8 + head];
    }
    const float over = whole == 0.0f ? 0.0f : 1.0f / whole;
#pragma unroll
    for (int k = 0; k < 2; ++k) exact_sums[n + k] = exact[k] * over, coded_sums[n + k] = coded[k] * over;
    if (channel == 0)
      a.part_lse[(pair * GROUP_HEADS + head) * a.splits + split] = whole == 0.0f ? never() : base + log_of_two(whole);
  }
  block_barrier();
  if constexpr (V_ROTATED) hadamard(coded_sums, GROUP_HEADS);
  for (int n = threadIdx.x; n < GROUP_HEADS * D; n += THREADS) {
    const float coded = V_ROTATED ? coded_sums[n] * HADAMARD * a.v_signs[n % D] : coded_sums[n];
    a.part_out[((pair * GROUP_HEADS + n / D) * a.splits + split) * D + n % D] = exact_sums[n] + coded;
  }
}

// What all blocks of a pair have found, by the last of them; all that a thread reads is on its way at once.
device void merge(const Arguments& a, i64 pair) {
  constexpr int AT_ONCE = 16;
  const i64 row = pair * GROUP_HEADS;
  for (int n = 2 * threadIdx.x; n < GROUP_HEADS * D; n += 2 * THREADS) {
    const float* lse = a.part_lse + (row + n / D) * a.splits;
    const float* from = a.part_out + (row + n / D) * a.splits * D + n % D;
    float most = never(), sums[2] = {}, whole = 0.0f;
    for (int first = 0; first < a.splits; first += AT_ONCE) {
      float own[AT_ONCE];
      uint2 found[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const int split = first + k < a.splits ? first + k : first;
        own[k] = load_fresh(lse + split);
        found[k] = load_fresh(reinterpret_cast<const uint2*>(from + split * D), true);
      }
      float peak = most;
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) peak = max_of(peak, own[k]);
      const float base = peak == never() ? 0.0f : peak, fade = power_of_two(most - base);
      most = peak, whole *= fade, sums[0] *= fade, sums[1] *= fade;
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const float share = first + k < a.splits ? power_of_two(own[k] - base) : 0.0f;
        sums[0] += share * as_float(found[k].x), sums[1] += share * as_float(found[k].y), whole += share;
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float mean = whole == 0.0f ? 0.0f : sums[k] / whole;
      if constexpr (QUERY == F32) static_cast<float*>(a.out)[row * D + n + k] = mean;
      else static_cast<u16*>(a.out)[row * D + n + k] = rounded<QUERY == F16>(mean);
    }
    if (n % D == 0) a.lse[row + n / D] = whole == 0.0f ? never() : (most + log_of_two(whole)) * 0.6931471805599453f;
  }
}
