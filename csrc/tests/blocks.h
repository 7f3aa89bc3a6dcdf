// Attention over listed blocks, in buffers of exactly their size, against double precision, on the instruction set in
// use. Included by native.cpp.
#pragma once
#include "../blocks.h"

namespace {

void listed_attention(int32_t type, int64_t width, int64_t block_q, int64_t block_k) {
  const int64_t heads = 2, queries = 37, keys = 85, rows = (queries + block_q - 1) / block_q;
  const int64_t blocks = (keys + block_k - 1) / block_k, offset = keys - queries;
  // BF16 numbers are upper halves of floats, so that both are the same numbers.
  auto numbers = [&](int64_t count, std::vector<float> &wide, std::vector<uint16_t> &narrow) {
    wide.resize(size_t(count)), narrow.resize(size_t(count));
    for (size_t i = 0; i < wide.size(); ++i) {
      float value = draw_float();
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits &= 0xffff0000u;
      narrow[i] = uint16_t(bits >> 16);
      std::memcpy(&wide[i], &bits, 4);
    }
  };
  std::vector<float> q, k, v, lse(size_t(heads * queries)), out(size_t(heads * queries * width));
  std::vector<uint16_t> q16, k16, v16, out16(out.size());
  numbers(heads * queries * width, q, q16), numbers(keys * width, k, k16), numbers(keys * width, v, v16);
  std::vector<int32_t> start, count, columns, low, high;
  for (int64_t row = 0; row < heads * rows; ++row) {
    start.push_back(int32_t(columns.size()));
    for (int64_t column = 0; column < blocks; ++column)
      if (draw() % 3) columns.push_back(int32_t(column));
    count.push_back(int32_t(columns.size()) - start.back());
  }
  for (int64_t i = 0; i < queries; ++i) low.push_back(3), high.push_back(int32_t(i + offset + 1));
  bool narrow = type == RAREFY_BF16;
  auto data = [&](std::vector<float> &wide, std::vector<uint16_t> &half) { return narrow ? (void *)half.data() : wide.data(); };
  rarefy_chosen call{};
  call.query = data(q, q16), call.key = data(k, k16), call.value = data(v, v16), call.out = data(out, out16);
  call.lse = lse.data(), call.start = start.data(), call.count = count.data(), call.columns = columns.data();
  call.low = low.data(), call.high = high.data();
  for (int64_t *own : {call.query_strides, call.out_strides})
    own[0] = heads * queries * width, own[1] = queries * width, own[2] = width;
  for (int64_t *own : {call.key_strides, call.value_strides}) own[0] = own[1] = keys * width, own[2] = width;
  call.batch = 1, call.heads = heads, call.kv_heads = 1, call.lists = heads, call.queries = queries, call.keys = keys;
  call.width = width, call.block_q = block_q, call.block_k = block_k, call.entries = int64_t(columns.size());
  call.type = type, call.scale = 0.3f;
  int64_t bytes = rarefy_blocks_bytes(&call);
  void *memory = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64));
  char message[256] = "";
  expect(rarefy_attend_blocks(&call, memory, bytes, message, sizeof message) == 0, message, width);
  double worst = 0;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < queries; ++i) {
      std::vector<double> mixed(static_cast<size_t>(width));
      double total = 0;
      int64_t row = head * rows + i / block_q;
      for (int32_t n = 0; n < count[size_t(row)]; ++n)
        for (int64_t t = columns[size_t(start[size_t(row)] + n)] * block_k, end = t + block_k; t < end; ++t) {
          if (t < low[size_t(i)] || t >= high[size_t(i)]) continue;
          double score = 0;
          for (int64_t d = 0; d < width; ++d) score += double(q[size_t((head * queries + i) * width + d)]) * k[size_t(t * width + d)];
          total += std::exp(score * 0.3);
          for (int64_t d = 0; d < width; ++d) mixed[size_t(d)] += std::exp(score * 0.3) * v[size_t(t * width + d)];
        }
      for (int64_t d = 0; d < width; ++d) {
        size_t at = size_t((head * queries + i) * width + d);
        float found = out[at];
        if (narrow) {
          uint32_t bits = uint32_t(out16[at]) << 16;
          std::memcpy(&found, &bits, 4);
        }
        worst = std::max(worst, std::fabs((total > 0 ? mixed[size_t(d)] / total : 0) - found));
      }
      float own = lse[size_t(head * queries + i)];
      if (total > 0) worst = std::max(worst, std::fabs(std::log(total) - double(own)));
      else expect(own == -INFINITY, "a query that sees nothing has no sum", i);
    }
  expect(worst < (narrow ? 2e-2 : 1e-4), "attention over lists is attention over their tokens", width);
  expect(rarefy_attend_blocks(&call, memory, bytes - 1, message, sizeof message) == -1, "too little memory is refused", 0);
  if (!columns.empty()) {
    columns.back() = int32_t(blocks);
    expect(rarefy_attend_blocks(&call, memory, bytes, message, sizeof message) == -1, "unknown blocks are refused", 0);
  }
  std::free(memory);
}

}  // namespace
