// Few tokens: each warp's weights come by bulk copies too, RING steps of them ahead, into a ring in shared memory that is
// the warp's own. What a warp waits for is a step, not whatever loads it has begun since: loads into registers that no
// instruction tells apart wait for each other.

#ifndef RAREFY_EMULATED
#include "bulk.cuh"
#endif

template <int TYPE> device constexpr int bytes_of_pair() { return TYPE == NONE ? 0 : TYPE == F32 || TYPE == PAIRS ? 8 : TYPE == F16 || TYPE == BF16 ? 4 : 2; }
constexpr bool SECOND = SCALE == BILEVEL || SCALE == LEVEL;
constexpr int OF_CODES = LOADS * 512, OF_SCALE = PARTS * 8 * bytes_of_pair<SCALE>(), OF_ZERO = PARTS * 8 * bytes_of_pair<ZERO>();
constexpr int OF_SECOND = SECOND ? PARTS * 8 : 0, OF_STEP = TILES * (OF_CODES + OF_SCALE + OF_ZERO + OF_SECOND);  // bytes
static_assert(!RAGGED && (!SECOND || (SECOND_GROUPS == 1 && PARTS % 2 == 0)), "whole steps, in pieces of 16 bytes");

constexpr int AT_BARRIERS = AT_STORED, AT_RING = (AT_BARRIERS + 8 * RING * (THREADS / 32) + 127) / 128 * 128;
device u64* step_arrived(int stage) { return reinterpret_cast<u64*>(pool + AT_BARRIERS) + threadIdx.x / 32 * RING + stage; }
device u8* step_in_ring(int stage) { return pool + AT_RING + (threadIdx.x / 32 * RING + stage) * OF_STEP; }

// Where a lane's tile begins, of the lanes that have one; the others have nothing to bring.
struct Source {
  const u8 *codes, *scale, *zero, *second;
  int tile;
};

device Source source_of(const Arguments& a, int first_tile, int lane) {
  const i64 tile = tile_of(a, first_tile + (lane < TILES ? lane : 0)), groups = tile * a.groups;
  const i64 second = i64(int(tile) / (SECOND ? a.second_rows : 1)) * a.groups;
  return {reinterpret_cast<const u8*>(a.codes) + tile * a.steps * OF_CODES, static_cast<const u8*>(a.scale) + groups * 8 * bytes_of_pair<SCALE>(),
          static_cast<const u8*>(a.zero) + groups * 8 * bytes_of_pair<ZERO>(), reinterpret_cast<const u8*>(a.second) + second * 8, lane};
}

device void prepare_ring(int lane) {
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < RING; ++n) prepare_barrier(step_arrived(n), 1);
    barriers_are_prepared();
  }
  warp_barrier();
}

device void bring(const Source& from, const Arguments& a, int step, int stage) {
  if (from.tile == 0) expect(step_arrived(stage), OF_STEP);
  warp_barrier();
  if (from.tile >= TILES) return;
  const int group = group_of(a, step, 0);
  u8* to = step_in_ring(stage);
  const auto copy = [&](const u8* source, int bytes) {
    copy_bulk(to + from.tile * bytes, source, bytes, step_arrived(stage));
    to += TILES * bytes;
  };
  copy(from.codes + i64(step) * OF_CODES, OF_CODES);
  if constexpr (OF_SCALE > 0) copy(from.scale + i64(group) * 8 * bytes_of_pair<SCALE>(), OF_SCALE);
  if constexpr (OF_ZERO > 0) copy(from.zero + i64(group) * 8 * bytes_of_pair<ZERO>(), OF_ZERO);
  if constexpr (OF_SECOND > 0) copy(from.second + i64(group) * 8, OF_SECOND);
}

// The step's weights: its groups count from its first one.
device void take(Codes& codes, StepScales& scales, int stage, int lane) {
  const u8* at = step_in_ring(stage);
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int l = 0; l < LOADS; ++l) put(codes, r, l, reinterpret_cast<const uint4*>(at + r * OF_CODES + l * 512)[lane]);
  const u8* scale = at + TILES * OF_CODES;
  const u8* zero = scale + TILES * OF_SCALE;
  const uint2* second = reinterpret_cast<const uint2*>(zero + TILES * OF_ZERO);
#pragma unroll
  for (int own = 0; own < int(sizeof scales.scale[0] / sizeof scales.scale[0][0]); ++own) {
#if SPREAD
    const int group = (PART >= 8 ? 0 : 2 * (lane % 4) / PART) + (PART >= 8 ? own : PART > 1 ? 8 * own / PART : own / 2 * 8 + own % 2);
#else
    const int group = own;
#endif
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
      load(scales.scale[r][own], scale + r * OF_SCALE, group * 8 + lane / 4, second + r * PARTS, group);
      load(scales.zero[r][own], zero + r * OF_ZERO, group * 8 + lane / 4, second + r * PARTS, group);
    }
  }
}
