// What can be held against plain C++ without Python, for the sanitizers: layouts there and back, products of every width
// on every instruction set, attention over codes, steps of a decoder, the pool under several callers and after fork, and
// refusal of wrong sizes.
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../rarefy.h"

namespace {

int failures = 0;

void expect(bool holds, const char *what, long detail) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s (%ld)\n", what, detail);
  ++failures;
}

uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u; }
float draw_float() { return float(int32_t(draw())) / 2147483648.f; }

struct Weight {
  std::vector<uint32_t> stream;
  std::vector<uint8_t> tiles, zeros;
  std::vector<float> scales;
  rarefy_term term{};

  Weight(int64_t rows, int64_t columns, int32_t bits, int64_t group) {
    int64_t words = (columns + 31) / 32, tile_count = rarefy_tile_count(rows), groups = (columns + group - 1) / group;
    stream.resize(size_t(rows * words * bits));
    for (uint32_t &word : stream) word = draw() ^ draw() >> 13;
    tiles.resize(size_t(tile_count * words * bits * 64));
    rarefy_pack_codes(stream.data(), tiles.data(), rows, columns, bits);
    scales.resize(size_t(tile_count * groups * 16));
    zeros.resize(scales.size());
    for (float &scale : scales) scale = draw_float();
    for (uint8_t &zero : zeros) zero = uint8_t(draw() % (1u << bits));
    term.kind = RAREFY_CODES, term.bits = bits, term.scale_layout = RAREFY_SINGLE, term.scale_type = RAREFY_F32;
    term.zero_type = RAREFY_U8, term.rows = rows, term.columns = columns, term.group_size = group;
    term.multiplier = 1;
    term.codes = {tiles.data(), int64_t(tiles.size())};
    term.scale = {scales.data(), int64_t(scales.size() * 4)};
    term.zero_point = {zeros.data(), int64_t(zeros.size())};
  }
  uint32_t code(int64_t row, int64_t column) const {
    int64_t bit = (row * ((term.columns + 31) / 32) + column / 32) * term.bits * 32 + column % 32 * term.bits;
    uint64_t both = stream[size_t(bit / 32)];
    if (size_t(bit / 32 + 1) < stream.size()) both |= uint64_t(stream[size_t(bit / 32 + 1)]) << 32;
    return uint32_t(both >> bit % 32) & ((1u << term.bits) - 1);
  }
  double value(int64_t row, int64_t column) const {
    int64_t groups = (term.columns + term.group_size - 1) / term.group_size;
    size_t at = size_t((row / 16 * groups + column / term.group_size) * 16 + row % 16);
    return double(scales[at]) * (double(code(row, column)) - zeros[at]);
  }
};

void products(int64_t rows, int64_t columns, int32_t bits, int64_t group, int64_t tokens) {
  Weight w(rows, columns, bits, group);
  char message[256] = "";
  expect(rarefy_check(&w.term, message, sizeof message) == 0, message, bits);
  std::vector<uint32_t> back(w.stream.size());
  rarefy_unpack_codes(w.tiles.data(), back.data(), rows, columns, bits);
  expect(back == w.stream, "codes come back", bits);
  std::vector<float> x(size_t(tokens * columns)), y(size_t(tokens * rows)), dense(size_t(rows * columns));
  for (float &v : x) v = draw_float();
  expect(rarefy_decode(&w.term, 1, dense.data(), message, sizeof message) == 0, message, bits);
  for (int32_t mode : {RAREFY_EXACT, RAREFY_FAST}) {
    expect(rarefy_linear(&w.term, 1, x.data(), columns, y.data(), rows, RAREFY_F32, tokens, mode, message,
                         sizeof message) == 0, message, bits);
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0, reach = 1e-6;
        for (int64_t k = 0; k < columns; ++k) {
          expect(std::fabs(w.value(r, k) - dense[size_t(r * columns + k)]) < 1e-4, "decoded value", k);
          sum += w.value(r, k) * x[size_t(m * columns + k)];
          reach += std::fabs(w.value(r, k) * x[size_t(m * columns + k)]) + (1 << bits) * 1e-2;
        }
        double error = std::fabs(sum - y[size_t(m * rows + r)]) / reach;
        expect(error < (mode == RAREFY_EXACT ? 1e-5 : 2e-2), mode == RAREFY_EXACT ? "exact" : "fast", bits);
      }
  }
}

// Compressed sparse rows of uneven length: the layout gives them back, and products and decoding know them.
void entries(int64_t rows, int64_t columns, uint32_t every) {
  std::vector<int32_t> stored, row_ptr{0};
  std::vector<float> dense(size_t(rows * columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; ++k)
      if (draw() >> 8 < (1u << 24) / every * uint32_t(1 + r % 5)) {
        uint32_t value = 0x3f80 + (draw() >> 24);  // a bfloat16
        uint32_t wide = value << 16;
        std::memcpy(&dense[size_t(r * columns + k)], &wide, 4);
        stored.push_back(int32_t(wide | uint32_t(k)));
      }
    row_ptr.push_back(int32_t(stored.size()));
  }
  int64_t tiles = rarefy_tile_count(rows);
  std::vector<int32_t> starts{0};
  for (int64_t t = 0; t < tiles; ++t)
    starts.push_back(starts.back() + (row_ptr[size_t(std::min((t + 1) * 16, rows))] - row_ptr[size_t(t * 16)] + 15) / 16);
  std::vector<int32_t> slices(size_t(starts.back()) * 16), back(stored.size()), back_ptr(row_ptr.size());
  std::vector<uint8_t> lanes(size_t(tiles) * 48);
  stored.reserve(1), slices.reserve(1), back.reserve(1);  // so that there is an address
  rarefy_pack_entries(stored.data(), row_ptr.data(), starts.data(), rows, 1, slices.data(), lanes.data());
  rarefy_unpack_entries(slices.data(), lanes.data(), starts.data(), rows, 1, back.data(), back_ptr.data());
  expect(back == stored && back_ptr == row_ptr, "entries come back", every);
  rarefy_term t{};
  t.kind = RAREFY_ENTRIES, t.bits = 8, t.scale_type = RAREFY_BF16, t.rows = rows, t.columns = columns;
  t.group_size = columns, t.multiplier = 1;
  t.codes = {slices.empty() ? nullptr : slices.data(), int64_t(slices.size()) * 4};
  t.positions = {lanes.data(), int64_t(lanes.size())};
  t.pointers = {starts.data(), int64_t(starts.size()) * 4};
  Weight w(rows, columns, 3, 16);
  rarefy_term both[2] = {w.term, t};
  char message[256] = "";
  expect(rarefy_check(&t, message, sizeof message) == 0, message, every);
  std::vector<float> decoded(dense.size()), x(size_t(5 * columns)), y(size_t(5 * rows)), plain(y.size());
  rarefy_decode(&t, 1, decoded.data(), message, sizeof message);
  expect(decoded == dense, "decoded entries", every);
  for (float &v : x) v = draw_float();
  for (int64_t tokens : {1, 5})
    for (int32_t mode : {RAREFY_EXACT, RAREFY_FAST}) {
      rarefy_linear(both, 1, x.data(), columns, plain.data(), rows, RAREFY_F32, tokens, mode, message, sizeof message);
      rarefy_linear(both, 2, x.data(), columns, y.data(), rows, RAREFY_F32, tokens, mode, message, sizeof message);
      for (int64_t m = 0; m < tokens; ++m)
        for (int64_t r = 0; r < rows; ++r) {
          double wanted = plain[size_t(m * rows + r)], reach = 1 + std::fabs(wanted);
          for (int64_t k = 0; k < columns; ++k) {
            double product = double(dense[size_t(r * columns + k)]) * x[size_t(m * columns + k)];
            wanted += product, reach += std::fabs(product);
          }
          expect(std::fabs(wanted - y[size_t(m * rows + r)]) / reach < 1e-5, "products with entries", long(tokens));
        }
    }
  if (slices.empty()) return;
  lanes[47] = 16;
  expect(rarefy_check(&t, message, sizeof message) == -1, "a row beyond the tile is refused", 0);
  lanes[47] = 15;
  slices[0] = (slices[0] & int32_t(0xffff0000)) | 0xffff;
  expect(rarefy_check(&t, message, sizeof message) == -1, "a column beyond the last is refused", 0);
}

void wrong_sizes() {
  Weight w(20, 70, 4, 32);
  char message[256] = "";
  for (rarefy_span rarefy_term::*span : {&rarefy_term::codes, &rarefy_term::scale, &rarefy_term::zero_point,
                                        &rarefy_term::table, &rarefy_term::second_order}) {
    rarefy_term broken = w.term;
    (broken.*span).bytes += 4;
    expect(rarefy_check(&broken, message, sizeof message) == -1, "a wrong size is refused", 0);
    std::vector<float> x(70), y(20);
    expect(rarefy_linear(&broken, 1, x.data(), 70, y.data(), 20, RAREFY_F32, 1, RAREFY_EXACT, message,
                         sizeof message) == -1, "a wrong size is not multiplied", 0);
  }
  for (int32_t field = 0; field < 4; ++field) {
    rarefy_term broken = w.term;
    if (field == 0) broken.kind = 99;
    if (field == 1) broken.bits = 9;
    if (field == 2) broken.group_size = 3;
    if (field == 3) broken.rows = 0;
    expect(rarefy_check(&broken, message, sizeof message) == -1 && std::strlen(message) > 10, "refused", field);
  }
}

struct Count {
  int counts[1000];
};
void count_one(void *context, int64_t chunk) {
  __atomic_fetch_add(&static_cast<Count *>(context)->counts[chunk], 1, __ATOMIC_RELAXED);
}
void *run_pool(void *) {
  for (int round = 0; round < 200; ++round) {
    Count c{};
    rarefy_parallel(count_one, &c, 1000);
    for (int count : c.counts) expect(count == 1, "every chunk once", count);
  }
  return nullptr;
}

}  // namespace

#include "attend.h"
#include "blocks.h"
#include "columns.h"
#include "step.h"

int main() {
  rarefy_threads(4);
  for (const char *name : {"scalar", "avx2", "avx512"}) {
    if (rarefy_select(name) != 0) continue;
    for (int32_t bits = 1; bits <= 8; ++bits) {
      products(5, 40, bits, 16, 3);
      products(33, 129, bits, 128, 1);
      products(17, 300, bits, 32, 9);
      products(1, 7, bits, 4, 2);
    }
    products(40, 260, 4, 64, 133);  // more tokens than share one decoding
    for (int32_t bits : {2, 3, 4, 8}) {
      coded_attention(bits, 64, 64, 32, 4);
      coded_attention(bits, 128, 128, 128, 3);
      coded_attention(bits, 32, 32, 16, 5);
    }
    for (int32_t type : {RAREFY_F32, RAREFY_BF16}) {
      listed_attention(type, 64, 16, 16);
      listed_attention(type, 48, 20, 24);
    }
    check_columns();
    entries(33, 129, 30);
    entries(5, 40, 6);
    entries(17, 64, 1u << 24);
  }
  steps();
  wrong_sizes();
  pthread_t others[3];
  for (pthread_t &other : others) pthread_create(&other, nullptr, run_pool, nullptr);
  run_pool(nullptr);
  for (pthread_t other : others) pthread_join(other, nullptr);
  pid_t child = fork();
  if (child == 0) {
    run_pool(nullptr);
    _exit(failures ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(status == 0, "the pool works after fork", status);
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
