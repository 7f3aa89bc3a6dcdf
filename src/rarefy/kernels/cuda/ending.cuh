// What becomes of the sums of linear.cu, so that what lies between two products of a decoder's step needs no launch.
//
// NORMED: the tokens are rows of a residual stream times the gain of an RMS norm; the factor that a whole row has in
// common comes last. ENDING: GATED, the second half of the weight's rows is multiplied by the ACTIVATION of the first;
// or ADDED, the result is added to the residual stream, and what comes out is that times a norm's gain (CENTRED: 1 +
// gain), as a product that is NORMED takes it. Everything is rounded where a kernel of its own would round it, except
// that what a row is divided by enters after a product and is not rounded before.

enum { GATED = 1, ADDED = 2 };
enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

constexpr int HALVES = ENDING == GATED ? 2 : 1;
constexpr int OUT = ROWS / HALVES;                     // rows of a block that come out
constexpr int FACTOR_BYTES = NORMED ? 4 * WIDTH : 0;
constexpr int RESULTS = (EXTRA * OUT + 31) / 32 * 32;  // whole warps of them
constexpr int RESULTS_OF_THREAD = (RESULTS + THREADS - 1) / THREADS;
static_assert(ENDING != GATED || ACROSS % 2 == 0, "half of a block's warps for each half of the rows");

// The tiles of a block follow each other, but those that others are GATED by lie half the weight apart.
device int tile_of_block(const Arguments& a, int tile) {
  constexpr int TOGETHER = OUT / 16;
  return blockIdx.x * TOGETHER + (tile < TOGETHER ? tile : a.rows / 32 + tile - TOGETHER);
}
device int row_of_block(const Arguments& a, int row) { return tile_of_block(a, row / 16) * 16 + row % 16; }

device float activated(float x) {
  if constexpr (ACTIVATION == SILU) return x * sigmoid(x);
  else if constexpr (ACTIVATION == GELU) return 0.5f * x * (1.0f + error_function(x * 0.7071067811865476f));
  else if constexpr (ACTIVATION == GELU_TANH) return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
  else return max_of(x, 0.0f);
}

device float as_rounded(float value) { return widened(rounded<HALF>(value)); }

// One of a thread's numbers of the result: its token and row in the block, its row and place in the result.
struct Result {
  bool real;
  int token, own_row, row;
  i64 place;
};

device Result result_of(const Arguments& a, int first_token, int turn) {
  const int n = turn * THREADS + threadIdx.x, token = n / OUT, own_row = n % OUT;
  const int row = blockIdx.x * OUT + own_row, rows = a.rows / HALVES;
  return {token < EXTRA && first_token + token < a.tokens && row < rows, token, own_row, row, i64(first_token + token) * rows + row};
}

struct Beside { float gain[RESULTS_OF_THREAD], hidden[RESULTS_OF_THREAD]; };

// What no kernel writes is on its way before anything is waited for.
device void fetch_gain(Beside& beside, const Arguments& a, int first_token) {
#pragma unroll
  for (int turn = 0; ENDING == ADDED && turn < RESULTS_OF_THREAD; ++turn) {
    const Result own = result_of(a, first_token, turn);
    beside.gain[turn] = own.real ? widened(load_once(a.gain + own.row)) + CENTRED : 0.0f;
  }
}

// What earlier kernels wrote is fetched beside the first activations.
device void fetch_rest(Beside& beside, float* factors, const Arguments& a, int first_token) {
#pragma unroll
  for (int turn = 0; ENDING == ADDED && turn < RESULTS_OF_THREAD; ++turn) {
    const Result own = result_of(a, first_token, turn);
    beside.hidden[turn] = own.real ? widened(load_fresh(a.hidden + own.place)) : 0.0f;
  }
  if constexpr (NORMED) {
    const int lane = threadIdx.x % 32;
    for (int n = threadIdx.x / 32; n < EXTRA && first_token + n < a.tokens; n += THREADS / 32) {
      const float* squares = a.squares + i64(first_token + n) * a.parts;
      float sum = 0.0f;
#pragma unroll 8
      for (int part = lane; part < a.parts; part += 32) sum += load_fresh(squares + part);
      sum = sum_of_warp(sum);
      if (lane == 0) factors[n] = inverse_root(sum / a.columns + a.eps);
    }
  }
}

// `total(token, row)`: the sum of one of the block's rows.
template <class Total>
device void finish(const Beside& beside, const float* factors, const Arguments& a, int first_token, const Total& total) {
#pragma unroll
  for (int turn = 0; turn < RESULTS_OF_THREAD; ++turn) {
    if (turn * THREADS + threadIdx.x >= RESULTS) break;
    const Result own = result_of(a, first_token, turn);
    const float factor = NORMED && own.real ? factors[own.token] * a.multiplier : a.multiplier;
    float result = own.real ? total(own.token, own.own_row) * factor : 0.0f;
    if constexpr (ENDING == GATED) {
      const float other = own.real ? total(own.token, own.own_row + OUT) * factor : 0.0f;
      result = as_rounded(activated(as_rounded(result))) * as_rounded(other);
    }
    if constexpr (ENDING == ADDED) {
      const float sum = as_rounded(beside.hidden[turn] + as_rounded(result));
      const float squares = sum_of_lanes<16>(sum * sum);
      if (own.real) {
        a.hidden[own.place] = rounded<HALF>(sum);
        if (own.row % 16 == 0) a.squared[i64(first_token + own.token) * ((a.rows + 15) / 16) + own.row / 16] = squares;
      }
      result = sum * beside.gain[turn];
    }
    if (own.real) a.y[own.place] = rounded<HALF>(result);
  }
}
