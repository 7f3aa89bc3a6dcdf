// Attention over codes of every width, by channel and by token, in buffers of exactly their size, against double
// precision, on the instruction set in use. Included by native.cpp.
#pragma once
#include "../attend.h"

namespace {

// Codes of `heads` heads with scales and zeros, and what each number is.
struct Coded {
  std::vector<uint32_t> stream;
  std::vector<uint16_t> scale, zero;
  std::vector<float> table = std::vector<float>(16);
  std::vector<double> values;  // [heads, tokens, width]
  rarefy_side side{};

  Coded(bool across, int32_t bits, int64_t heads, int64_t first, int64_t tokens, int64_t width, int64_t block,
        int64_t group) {
    int64_t count = heads * tokens * width;
    stream.resize(size_t(count * bits / 32));
    for (uint32_t &word : stream) word = draw() ^ draw() >> 13;
    scale.resize(size_t(count / group)), zero.resize(scale.size());
    for (uint16_t &number : scale) number = uint16_t(0x2800 + draw() % 0x800);  // 1/32 to 1/8
    for (uint16_t &number : zero) number = uint16_t(0x3c00 + draw() % 0x800);   // 1 to 4
    for (int i = 0; i < 16; ++i) table[size_t(i)] = float(i % (1 << (bits < 4 ? bits : 4)));
    values.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) {
      int64_t head = i / (tokens * width), own = i % (tokens * width), at = i;
      if (across) {  // code i is of token `block * number + t` and channel d
        int64_t number = own / (block * width), d = own % (block * width) / block, t = own % block;
        at = head * tokens * width + (number * block + t) * width + d;
      }
      uint64_t both = stream[size_t(i * bits / 32)];
      if (size_t(i * bits / 32 + 1) < stream.size()) both |= uint64_t(stream[size_t(i * bits / 32 + 1)]) << 32;
      double code = double(both >> i * bits % 32 & ((1u << bits) - 1));
      values[size_t(at)] = (code - half(zero[size_t(i / group)])) * half(scale[size_t(i / group)]);
    }
    side = {across ? RAREFY_BY_CHANNEL : RAREFY_BY_TOKEN, bits, 0, 0, first, tokens, block, group,
            tokens * width * bits / 8, tokens * width / group, stream.data(), scale.data(), zero.data(), table.data()};
  }
  static double half(uint16_t h) { return std::ldexp(1. + (h & 0x3ff) / 1024., (h >> 10) - 15); }
};

void coded_attention(int32_t bits, int64_t width, int64_t block, int64_t group, int64_t heads_each) {
  const int64_t heads = 2, first = 2 * block, tokens = 3 * block, hidden[] = {1, block};
  Coded k0(true, bits, heads, 0, first, width, block, group), k1(true, bits, heads, first, block, width, block, group);
  Coded values(false, bits, heads, 0, tokens, width, 1, std::min(group, width));
  rarefy_side keys[] = {k0.side, k1.side};
  rarefy_stretch stretch{0, tokens, keys, &values.side, 2, 1};
  std::vector<float> query(size_t(heads * heads_each * width)), out(query.size()), lse(size_t(heads * heads_each));
  for (float &number : query) number = draw_float();
  int64_t bytes = rarefy_attend_bytes(1, 1, heads, heads_each, width);
  void *memory = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64));
  char message[256] = "";
  int32_t failed = rarefy_attend(&stretch, 1, query.data(), 1, heads, heads_each, width, 0.3f, hidden, 2, out.data(),
                                 lse.data(), memory, bytes, message, sizeof message);
  expect(failed == 0, message, bits);
  double worst = 0;
  for (int64_t row = 0; row < heads * heads_each; ++row) {
    int64_t head = row / heads_each;
    std::vector<double> share(static_cast<size_t>(tokens)), mixed(static_cast<size_t>(width));
    double total = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const Coded &own = t < first ? k0 : k1;
      int64_t length = t < first ? first : block, at = t < first ? t : t - first;
      double score = 0;
      for (int64_t d = 0; d < width; ++d)
        score += query[size_t(row * width + d)] * own.values[size_t((head * length + at) * width + d)];
      share[size_t(t)] = t == hidden[0] || t == hidden[1] ? 0 : std::exp(score * 0.3);
      total += share[size_t(t)];
      for (int64_t d = 0; d < width; ++d)
        mixed[size_t(d)] += share[size_t(t)] * values.values[size_t((head * tokens + t) * width + d)];
    }
    for (int64_t d = 0; d < width; ++d)
      worst = std::max(worst, std::fabs(mixed[size_t(d)] / total - out[size_t(row * width + d)]));
    worst = std::max(worst, std::fabs(std::log(total) - lse[size_t(row)]));
  }
  expect(worst < 1e-3, "attention over codes is attention over numbers", bits * 1000 + long(width));
  expect(rarefy_attend(&stretch, 1, query.data(), 1, heads, heads_each, width, 0.3f, hidden, 2, out.data(), lse.data(),
                       memory, bytes - 1, message, sizeof message) == -1, "too little memory is refused", bits);
  stretch.tokens = tokens + 1;
  expect(rarefy_attend(&stretch, 1, query.data(), 1, heads, heads_each, width, 0.3f, hidden, 2, out.data(), lse.data(),
                       memory, bytes, message, sizeof message) == -1, "a stretch with gaps is refused", bits);
  std::free(memory);
}

}  // namespace
