// One token against codes of one bit. Tensor cores multiply single bits too (and.popc, m16n8k128), and one token leaves
// the eight columns of their second operand free, so these are bit planes of the token: its numbers as whole ones of
// PLANES bits (two's complement) in a unit for each 128 columns, a power of two so that the largest is below the last
// bit. Codes are the first operand as they lie in memory. What plane n counts is 2^n times as much; the sum of all is
// exact, and a number is off by at most half a unit: the largest of 128 times 2^(1 - PLANES).

constexpr int SETS_OF_PLANES = PLANES / 8;
constexpr int SPANS = 2 * DEPTH * ALONG;                    // of 128 columns, of which a block has planes at once
constexpr int OF_TASK = 16, TASKS = SPANS * 128 / OF_TASK;  // columns of which a thread makes planes at once
constexpr int TURNS_OF_TASKS = (TASKS + THREADS - 1) / THREADS;

// In shared memory: for each span what one means, times 2^32, and the sum of its numbers; then words of 32 columns of each
// plane, [SPANS][SETS_OF_PLANES][t][plane].
constexpr int AT_UNITS = AT_PLACES, AT_PLANES = AT_UNITS + 8 * SPANS;
device float2* units_of_planes() { return reinterpret_cast<float2*>(pool + AT_UNITS); }
device u32* words_of_planes() { return reinterpret_cast<u32*>(pool + AT_PLANES); }

// Which columns a task is of: 8 * t on and eight more in two of the four 32 of a span, as a lane's word of codes has them.
struct Task { int t, half, span; };
device Task task_of(int turn) {
  const int task = threadIdx.x + turn * THREADS;
  return {task % 4, task / 4 % 2, task / 8};
}

struct PlaneTokens { uint4 at[TURNS_OF_TASKS][2]; };

// `step`: the first of the steps, of which there are some until `end`.
device void fetch(PlaneTokens& x, const Arguments& a, int step, int end) {
#pragma unroll
  for (int turn = 0; turn < TURNS_OF_TASKS; ++turn) {
    const Task own = task_of(turn);
    const int column = step * STEP + 128 * own.span + 64 * own.half + 8 * own.t;
    const bool real = own.span < SPANS && step + own.span / 2 < end;
#pragma unroll
    for (int n = 0; n < 2; ++n)
      x.at[turn][n] = load_shared_by_all(
          reinterpret_cast<const uint4*>(a.x + column + 32 * n), real && (!RAGGED || column + 32 * n < a.columns));
  }
}

// Bits of one word that lie DISTANCE above those of MASK, and those of another that are of it, change places.
template <u32 MASK, int DISTANCE> device void exchange(u32& first, u32& second) {
  const u32 higher = first >> DISTANCE;
  first = either(MASK, first, second << DISTANCE);
  second = either(MASK, higher, second);
}

device void make_planes(const PlaneTokens& x) {
#pragma unroll
  for (int turn = 0; turn < TURNS_OF_TASKS; ++turn) {
    if (turn * THREADS + int(threadIdx.x) / 32 * 32 >= TASKS) break;  // whole warps
    const Task own = task_of(turn);
    u32 words[8];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint4& all = x.at[turn][n];
      words[4 * n] = all.x, words[4 * n + 1] = all.y, words[4 * n + 2] = all.z, words[4 * n + 3] = all.w;
    }
    u32 most = words[0] & 0x7FFF7FFFu;
#pragma unroll
    for (int n = 1; n < 8; ++n) most = greater(most, words[n] & 0x7FFF7FFFu);
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) most = greater(most, of_lane_xor(most, distance));
    const u32 exponent = bits_of(widened(u16(greater(most, most >> 16)))) >> 23;
    const u32 bounded = exponent < PLANES ? PLANES : exponent;
    const float factor = as_float((252 + PLANES - bounded) << 23);
    int numbers[16], sum = 0;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      numbers[n] = nearest_whole(widened(u16(words[n / 2] >> 16 * (n % 2))) * factor);
      sum += numbers[n];
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) sum += int(of_lane_xor(u32(sum), distance));
    const bool real = own.span < SPANS;
    if (real && threadIdx.x % 8 == 0) {
      const u32 field = bounded + 34 - PLANES;  // infinite where the largest number is, or is none
      const float unit = as_float((field < 255 ? field : 255) << 23);
      units_of_planes()[own.span] = {unit, float(sum) * 0x1p-32f * unit};
    }
    const u32 taken = own.half ? 0x3715 : 0x6240;
#pragma unroll
    for (int set = 0; set < SETS_OF_PLANES; ++set) {
      // Bytes: of the two 32 of columns both, of even columns first. Then of eight bytes eight planes.
      u32 bytes[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const u32 choice = set | (set + 4) << 4;
        const u32 even = permuted(numbers[2 * n], numbers[8 + 2 * n], choice), odd = permuted(numbers[2 * n + 1], numbers[9 + 2 * n], choice);
        bytes[n] = permuted(even, odd, 0x5410);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n)
        bytes[n] = either(0x00F000F0u, bytes[n] >> 4, either(0x0F000F00u, bytes[n] << 4, bytes[n]));
      exchange<0x33333333u, 2>(bytes[0], bytes[2]);
      exchange<0x33333333u, 2>(bytes[1], bytes[3]);
      exchange<0x55555555u, 1>(bytes[0], bytes[1]);
      exchange<0x55555555u, 1>(bytes[2], bytes[3]);
      // Of 16 columns each lane of a pair has half of every word: one takes planes 0 to 3, one the others.
      u32 planes[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) planes[n] = permuted(bytes[n], of_lane_xor(bytes[n], 4), taken);
      u32* to = words_of_planes() + ((own.span * SETS_OF_PLANES + set) * 4 + own.t) * 8 + 4 * own.half;
      if (real) *reinterpret_cast<uint4*>(to) = {planes[0], planes[1], planes[2], planes[3]};
    }
  }
}

// What the planes of the spans of one step count, times what they are worth, to columns 2 * d and 2 * d + 1 of `parts`: a
// second product, of counts as the smallest numbers of float16 (2^-24 each) with powers of two, the highest less than
// zero. That comes first, where it is exact. 2^n stands as 2^(n - 8), so that all is 2^-32 of what it means.
device void count_step(float (&parts)[TILES][4], const Codes& codes, int place, int d, int lane) {
  const int g = lane / 4, t = lane % 4;
  u32 planes[2][SETS_OF_PLANES], worth[2][SETS_OF_PLANES];
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int set = 0; set < SETS_OF_PLANES; ++set) {
      planes[half][set] = words_of_planes()[(((2 * place + half) * SETS_OF_PLANES + set) * 4 + t) * 8 + g];
      const u32 sign = set == SETS_OF_PLANES - 1 && t == 3 ? 0x80000000u : 0;
      const u32 powers = (u32(8 * set + 2 * t + 7) * 0x04000400u + 0x04000000u) | sign;
      worth[half][set] = g == 2 * d + half ? powers : 0;
    }
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    u32 counted[2][SETS_OF_PLANES][2];  // of rows g and g + 8: two planes in a word
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int set = 0; set < SETS_OF_PLANES; ++set) {
        int counts[4];
        multiply_bits(counts, codes.at[r][2 * half], codes.at[r][2 * half + 1], planes[half][set]);
#pragma unroll
        for (int which = 0; which < 2; ++which) counted[half][set][which] = u32(counts[2 * which] + (counts[2 * which + 1] << 16));
      }
    if constexpr (SETS_OF_PLANES == 3) {
      const u32 highest[4] = {counted[0][2][0], counted[0][2][1], counted[1][2][0], counted[1][2][1]};
      multiply_halves(parts[r], highest, worth[0][2], worth[1][2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 others[4] = {counted[half][0][0], counted[half][0][1], counted[half][1][0], counted[half][1][1]};
      multiply_halves(parts[r], others, worth[half][0], worth[half][1]);
    }
  }
}

// Lane t has what the spans of step t came to, and their scales.
device void add_parts(float (&sums)[TILES][TOKENS][4], const float (&parts)[TILES][4], const SpreadScales& scales, int along, int t) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 found = units_of_planes()[2 * ((t < DEPTH ? t : 0) * ALONG + along) + half];
    const float ones = t < DEPTH ? found.y : 0.0f, center = SUMS ? 0.0f : CENTER * ones;
    const int own = own_part(half, 0);
#pragma unroll
    for (int r = 0; r < TILES; ++r)
      add_contributions(
          sums[r][0], scales.scale[r][own], scales.zero[r][own], parts[r][half] * found.x - center,
          parts[r][2 + half] * found.x - center, ones);
  }
}
