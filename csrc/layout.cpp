// Codes between the canonical bit stream and tiles: 32 codes of 16 rows fill 64 * bits bytes either way.
//
// A unit of a tile holds planes of 4, 2 and 1 bits, as many as the width has, the lowest bits of a code in the first;
// 8 bits are one plane of bytes. Byte 4 * row + column of a quad of columns belongs to row and column, so that
//   bytes:  quad q is bytes [64 q, 64 q + 64)
//   4 bits: word i of 64 bytes holds quad 2 i in low nibbles, 2 i + 1 in high ones
//   2 bits: word i holds quads 4 i to 4 i + 3, from the lowest bits up
//   1 bit:  8 bytes a quad, bit 4 * row + column
#include <cstring>
#include <initializer_list>

#include "internal.h"

namespace {

using rarefy::ceil_div;

struct Place {
  int64_t byte;
  int32_t shift;
};

// Where bits [low, low + width) of the code of (row, column) of a unit lie.
Place place(int32_t width, int64_t plane, int64_t row, int64_t column) {
  int64_t quad = column / 4, lane = 4 * row + column % 4;
  switch (width) {
    case 8: return {plane + 64 * quad + lane, 0};
    case 4: return {plane + 64 * (quad / 2) + lane, int32_t(4 * (quad % 2))};
    case 2: return {plane + 64 * (quad / 4) + lane, int32_t(2 * (quad % 4))};
    default: return {plane + 8 * quad + lane / 8, int32_t(lane % 8)};
  }
}

template <class Use> void each_plane(int32_t bits, Use use) {
  int64_t start = 0;
  int32_t low = 0;
  for (int32_t width : {8, 4, 2, 1}) {
    if (!(bits & width)) continue;
    use(width, low, start);
    start += 64 * width, low += width;
  }
}

// Eight codes of 4 bits in order, as four bytes with the first four in low nibbles and the others in high ones.
uint32_t nibbles_apart(uint32_t run) {
  auto spread = [](uint32_t four) {
    four = (four | four << 8) & 0x00ff00ff;
    return (four | four << 4) & 0x0f0f0f0f;
  };
  return spread(run & 0xffff) | spread(run >> 16) << 4;
}

uint32_t nibbles_together(uint32_t bytes) {
  auto gather = [](uint32_t four) {
    four &= 0x0f0f0f0f;
    four = (four | four >> 4) & 0x00ff00ff;
    return (four | four >> 8) & 0xffff;
  };
  return gather(bytes) | gather(bytes >> 4) << 16;
}

struct Move {
  const uint32_t *stream;
  uint8_t *tiles;
  uint32_t *back;
  const uint8_t *from;
  int64_t rows, words;
  int32_t bits;
};

void pack_tile(void *context, int64_t tile) {
  const Move &m = *static_cast<Move *>(context);
  int64_t rows = m.rows - tile * 16 < 16 ? m.rows - tile * 16 : 16, size = 64 * m.bits;
  std::memset(m.tiles + tile * m.words * size, 0, size_t(m.words * size));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < m.words; ++w) {
      const uint32_t *run = m.stream + ((tile * 16 + r) * m.words + w) * m.bits;
      uint8_t *to = m.tiles + (tile * m.words + w) * size;
      if (m.bits == 4) {  // by far the most common
        for (int64_t i = 0; i < 4; ++i) {
          uint32_t bytes = nibbles_apart(run[i]);
          std::memcpy(to + 64 * i + 4 * r, &bytes, 4);
        }
        continue;
      }
      for (int32_t k = 0; k < 32; ++k) {
        int32_t bit = k * m.bits, at = bit / 32;
        uint64_t both = run[at] | (at + 1 < m.bits ? uint64_t(run[at + 1]) << 32 : 0);
        uint32_t code = uint32_t(both >> bit % 32) & ((1u << m.bits) - 1);
        each_plane(m.bits, [&](int32_t width, int32_t low, int64_t start) {
          Place p = place(width, start, r, k);
          to[p.byte] = uint8_t(to[p.byte] | (code >> low & ((1u << width) - 1)) << p.shift);
        });
      }
    }
}

void unpack_tile(void *context, int64_t tile) {
  const Move &m = *static_cast<Move *>(context);
  int64_t rows = m.rows - tile * 16 < 16 ? m.rows - tile * 16 : 16, size = 64 * m.bits;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < m.words; ++w) {
      uint32_t *run = m.back + ((tile * 16 + r) * m.words + w) * m.bits;
      const uint8_t *from = m.from + (tile * m.words + w) * size;
      if (m.bits == 4) {
        for (int64_t i = 0; i < 4; ++i) {
          uint32_t bytes;
          std::memcpy(&bytes, from + 64 * i + 4 * r, 4);
          run[i] = nibbles_together(bytes);
        }
        continue;
      }
      std::memset(run, 0, size_t(m.bits) * 4);
      for (int32_t k = 0; k < 32; ++k) {
        uint32_t code = 0;
        each_plane(m.bits, [&](int32_t width, int32_t low, int64_t start) {
          Place p = place(width, start, r, k);
          code |= (from[p.byte] >> p.shift & ((1u << width) - 1)) << low;
        });
        int32_t bit = k * m.bits, at = bit / 32;
        uint64_t both = uint64_t(code) << bit % 32;
        run[at] |= uint32_t(both);
        if (both >> 32) run[at + 1] |= uint32_t(both >> 32);
      }
    }
}

}  // namespace

extern "C" void rarefy_pack_codes(const uint32_t *stream, uint8_t *tiles, int64_t rows, int64_t columns,
                                  int32_t bits) {
  Move move{stream, tiles, nullptr, nullptr, rows, ceil_div(columns, 32), bits};
  rarefy_parallel(pack_tile, &move, ceil_div(rows, 16));
}

extern "C" void rarefy_unpack_codes(const uint8_t *tiles, uint32_t *stream, int64_t rows, int64_t columns,
                                    int32_t bits) {
  Move move{nullptr, nullptr, stream, tiles, rows, ceil_div(columns, 32), bits};
  rarefy_parallel(unpack_tile, &move, ceil_div(rows, 16));
}
