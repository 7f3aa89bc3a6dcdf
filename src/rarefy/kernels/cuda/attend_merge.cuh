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
  for (int n = threadIdx.x; n < GROUP_HEADS * D; n += THREADS) {
    const int head = n / D, channel = n % D;
    float most = never(), coded = 0.0f, exact = 0.0f, whole = 0.0f;
    for (int each = 0; each < WARPS; ++each) {
      const float* own = rest + each * (OWN_OF_WARP / 4) + REST_PARTS * GROUP_HEADS * D + head;
      most = max_of(most, max_of(tops[each * 8 + head], own[0]));
    }
    const float base = most == never() ? 0.0f : most;
    for (int each = 0; each < WARPS; ++each) {
      const float *own = rest + each * (OWN_OF_WARP / 4), *about = own + REST_PARTS * GROUP_HEADS * D;
      const float share = power_of_two(tops[each * 8 + head] - base), of_rest = power_of_two(about[head] - base);
      coded += share * sums[(each * 8 + head) * D + channel];
      exact += of_rest * own[head * D + channel];
      if constexpr (V_ROTATED) coded += of_rest * own[(GROUP_HEADS + head) * D + channel];
      whole += share * totals[each * 8 + head] + of_rest * about[8 + head];
    }
    const float over = whole == 0.0f ? 0.0f : 1.0f / whole;
    exact_sums[n] = exact * over, coded_sums[n] = coded * over;
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

// What all blocks of a pair have found, by the last of them.
device void merge(const Arguments& a, i64 pair) {
  constexpr int AT_ONCE = 8;
  const i64 row = pair * GROUP_HEADS;
  float* shares = reinterpret_cast<float*>(pool);  // [GROUP_HEADS][splits]
  for (int n = threadIdx.x; n < GROUP_HEADS * a.splits; n += THREADS) shares[n] = load_fresh(a.part_lse + row * a.splits + n);
  block_barrier();
  for (int n = threadIdx.x; n < GROUP_HEADS * D; n += THREADS) {
    const float* own = shares + n / D * a.splits;
    const float* from = a.part_out + (row + n / D) * a.splits * D + n % D;
    float most = never(), sum = 0.0f, whole = 0.0f;
    for (int split = 0; split < a.splits; ++split) most = max_of(most, own[split]);
    const float base = most == never() ? 0.0f : most;
    for (int split = 0; split < a.splits; split += AT_ONCE) {
      float found[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) found[k] = load_fresh(from + (split + k < a.splits ? split + k : split) * D);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const float share = split + k < a.splits ? power_of_two(own[split + k] - base) : 0.0f;
        sum += share * found[k], whole += share;
      }
    }
    const float mean = whole == 0.0f ? 0.0f : sum / whole;
    if constexpr (QUERY == F32) static_cast<float*>(a.out)[row * D + n] = mean;
    else static_cast<u16*>(a.out)[row * D + n] = rounded<QUERY == F16>(mean);
    if (n % D == 0) a.lse[row + n / D] = whole == 0.0f ? never() : (base + log_of_two(whole)) * 0.6931471805599453f;
  }
}
