// One token: all that a block wants to know of its weights comes into shared memory by bulk copies before anything is
// waited for. No register holds what is on its way, so that two kernels that follow each other have room beside each
// other: one loads while the other still computes.

#ifndef RAREFY_EMULATED
#include "bulk.cuh"
#endif

constexpr int AT_STORED = AT_HELD + 2 * HELD_COLUMNS, TILES_OF_BLOCK = TILES * ACROSS;
template <int TYPE> device constexpr int bytes_of_pair() { return TYPE == NONE ? 0 : TYPE == F32 || TYPE == PAIRS ? 8 : TYPE == F16 || TYPE == BF16 ? 4 : 2; }
constexpr bool SECOND = SCALE == BILEVEL || SCALE == LEVEL;

// Bytes of a tile of each kind, and where each kind begins, all tiles of the block behind each other.
struct Stored {
  int first_group, groups, codes, scale, zero, second, entries;
  int at_codes, at_scale, at_zero, at_second, at_entries;
};

device Stored stored_of(const Arguments& a, const Share& share) {
  Stored own;
  own.first_group = group_of(a, share.begin, 0);
  own.groups = group_of(a, share.end - 1, PARTS - 1) - own.first_group + 1;
  own.codes = (share.end - share.begin) * LOADS * 512;
  own.scale = own.groups * 8 * bytes_of_pair<SCALE>(), own.zero = own.groups * 8 * bytes_of_pair<ZERO>();
  own.second = SECOND ? (own.groups + SECOND_GROUPS - 1) / SECOND_GROUPS * 8 : 0;
  own.entries = OUTLIERS ? a.quads * 256 : 0;
  own.at_codes = (AT_STORED + 16 + 127) / 128 * 128;
  own.at_scale = own.at_codes + TILES_OF_BLOCK * own.codes;
  own.at_zero = own.at_scale + TILES_OF_BLOCK * own.scale;
  own.at_second = own.at_zero + TILES_OF_BLOCK * own.zero;
  own.at_entries = own.at_second + TILES_OF_BLOCK * own.second;
  return own;
}

device u64* weights_arrived() { return reinterpret_cast<u64*>(pool + AT_STORED); }

device void store_weights(const Arguments& a, const Share& share, const Stored& own) {
  if (threadIdx.x >= 32) return;
  if (threadIdx.x == 0) {
    prepare_barrier(weights_arrived(), 1);
    barriers_are_prepared();
    expect(weights_arrived(), TILES_OF_BLOCK * (own.codes + own.scale + own.zero + own.second + own.entries));
  }
  warp_barrier();
  for (int n = threadIdx.x; n < TILES_OF_BLOCK; n += 32) {
    const i64 tile = tile_of(a, tile_of_block(a, n)), group = tile * a.groups + own.first_group;
    const auto copy = [&](int at, int bytes, const void* from, i64 begin) {
      copy_bulk(pool + at + n * bytes, static_cast<const u8*>(from) + begin, bytes, weights_arrived());
    };
    copy(own.at_codes, own.codes, a.codes, (tile * a.steps + share.begin) * (LOADS * 512));
    if (SCALE != NONE) copy(own.at_scale, own.scale, a.scale, group * 8 * bytes_of_pair<SCALE>());
    if (ZERO != NONE) copy(own.at_zero, own.zero, a.zero, group * 8 * bytes_of_pair<ZERO>());
    if (SECOND) copy(own.at_second, own.second, a.second, i64(int(tile) / a.second_rows) * own.second);
    if (OUTLIERS && a.quads > 0) copy(own.at_entries, own.entries, a.entries, tile * own.entries);
  }
}

// The kernel's arguments, of what lies in shared memory; tiles count from the block's first.
device Arguments stored_arguments(const Arguments& a, const Stored& own) {
  Arguments found = a;
  found.scale = pool + own.at_scale, found.zero = pool + own.at_zero;
  found.entries = reinterpret_cast<const uint2*>(pool + own.at_entries);
  return found;
}
device Places stored_places(const Stored& own, int first_tile, int first_step, int lane) {
  Places found;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const int tile = first_tile + r;
    found.codes[r][0] = reinterpret_cast<const uint4*>(pool + own.at_codes + tile * own.codes) + (lane - first_step * LOADS * 32);
    found.scales[r] = (tile * own.groups - own.first_group) * 8 + lane / 4;
    found.second[r] = reinterpret_cast<const uint2*>(pool + own.at_second + tile * own.second) - own.first_group / SECOND_GROUPS;
  }
  return found;
}
