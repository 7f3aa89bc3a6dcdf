// Codes between the canonical bit stream and tiles, and compressed sparse rows between theirs and slices of 16 lanes.
//
// Codes: 32 codes of 16 rows fill 64 * bits bytes either way.
//
// A unit of a tile holds planes of 4, 2 and 1 bits, as many as the width has, the lowest bits of a code in the first;
// 8 bits are one plane of bytes. Byte 4 * row + column of a quad of columns belongs to row and column, so that
//   bytes:  quad q is bytes [64 q, 64 q + 64)
//   4 bits: word i of 64 bytes holds quad 2 i in low nibbles, 2 i + 1 in high ones
//   2 bits: word i holds quads 4 i to 4 i + 3, from the lowest bits up
//   1 bit:  one word, quads 0 to 7 from the lowest bit up
#include <algorithm>
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
    default: return {plane + lane, int32_t(quad)};
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

// ---- ENTRIES: rows of uneven length in 16 lanes of one length.

struct Lanes {
  uint16_t own[16];
  uint8_t other[16];
};

// Which lane takes how much: all rows together fill the lanes but for fewer than 16 places, so while one row is too long
// some lane has room, and takes from that row until it is full. What is left of the row may then leave room itself.
Lanes share(const int32_t *row_ptr, int64_t rows, int32_t length) {
  Lanes lanes;
  int32_t left[16] = {};
  bool full[16] = {};
  for (int64_t r = 0; r < 16; ++r) {
    if (r < rows) left[r] = row_ptr[r + 1] - row_ptr[r];
    lanes.other[r] = uint8_t(r);
  }
  for (;;) {
    int32_t row = 0, lane = 0;
    while (row < 16 && left[row] <= length) ++row;
    if (row == 16) break;
    while (full[lane] || left[lane] >= length) ++lane;
    left[row] -= length - left[lane];
    lanes.other[lane] = uint8_t(row), full[lane] = true;
  }
  for (int64_t r = 0; r < 16; ++r) lanes.own[r] = uint16_t(left[r]);
  return lanes;
}

struct Sharing {
  const int32_t *entries, *row_ptr, *starts;
  int32_t *slices;
  uint8_t *lanes;
  int64_t rows;
};

void share_tile(void *context, int64_t place) {
  const Sharing &m = *static_cast<Sharing *>(context);
  int64_t tiles = ceil_div(m.rows, 16), tile = place % tiles, rows = std::min<int64_t>(m.rows - tile * 16, 16);
  const int32_t *row_ptr = m.row_ptr + place / tiles * (m.rows + 1) + tile * 16;
  int32_t length = m.starts[place + 1] - m.starts[place], *to = m.slices + 16 * int64_t(m.starts[place]), next[16];
  Lanes lanes = share(row_ptr, rows, length);
  std::memset(to, 0, size_t(length) * 64);
  for (int64_t r = 0; r < rows; ++r) {
    next[r] = row_ptr[r];
    for (int32_t s = 0; s < lanes.own[r]; ++s) to[16 * s + r] = m.entries[next[r]++];
  }
  for (int64_t lane = 0; lane < 16; ++lane) {
    int32_t row = lanes.other[lane];
    for (int32_t s = lanes.own[lane]; row != lane && s < length; ++s) to[16 * s + lane] = m.entries[next[row]++];
  }
  std::memcpy(m.lanes + 48 * place, lanes.own, 32);
  std::memcpy(m.lanes + 48 * place + 32, lanes.other, 16);
}

}  // namespace

extern "C" void rarefy_pack_entries(const int32_t *entries, const int32_t *row_ptr, const int32_t *starts,
                                    int64_t rows, int64_t panels, int32_t *slices, uint8_t *lanes) {
  Sharing sharing{entries, row_ptr, starts, slices, lanes, rows};
  rarefy_parallel(share_tile, &sharing, ceil_div(rows, 16) * panels);
}

extern "C" void rarefy_unpack_entries(const int32_t *slices, const uint8_t *lanes, const int32_t *starts,
                                      int64_t rows, int64_t panels, int32_t *entries, int32_t *row_ptr) {
  int64_t tiles = ceil_div(rows, 16);
  int32_t at = 0;
  for (int64_t place = 0; place < tiles * panels; ++place) {
    int64_t tile = place % tiles;
    Lanes own;
    std::memcpy(own.own, lanes + 48 * place, 32);
    std::memcpy(own.other, lanes + 48 * place + 32, 16);
    const int32_t *from = slices + 16 * int64_t(starts[place]);
    int32_t length = starts[place + 1] - starts[place];
    if (tile == 0) row_ptr[place / tiles * (rows + 1)] = at;
    for (int64_t r = 0; r < 16 && tile * 16 + r < rows; ++r) {
      int32_t first = at;
      for (int32_t s = 0; s < own.own[r]; ++s) entries[at++] = from[16 * s + r];
      for (int64_t lane = 0; lane < 16; ++lane)
        for (int32_t s = own.own[lane]; lane != r && own.other[lane] == r && s < length; ++s)
          entries[at++] = from[16 * s + lane];
      std::sort(entries + first, entries + at, [](int32_t a, int32_t b) { return (a & 0xffff) < (b & 0xffff); });
      row_ptr[place / tiles * (rows + 1) + tile * 16 + r + 1] = at;
    }
  }
}

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
