// The instruction set, the checks of terms, and products on the pool.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <atomic>

#include "internal.h"

using namespace rarefy;

namespace {

bool supported(const Kernels &kernels) {
  if (&kernels == &scalar_kernels) return true;
#ifdef RAREFY_WIDE
  __builtin_cpu_init();
  bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&kernels == &avx2_kernels) return wide;
  return wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

const Kernels *const all[] = {
#ifdef RAREFY_WIDE
    &avx512_kernels, &avx2_kernels,
#endif
    &scalar_kernels};

const Kernels *named(const char *name) {
  for (const Kernels *kernels : all)
    if (name && std::strcmp(kernels->name, name) == 0 && supported(*kernels)) return kernels;
  return nullptr;
}

const Kernels *best() {
  if (const Kernels *wanted = named(std::getenv("RAREFY_CPU"))) return wanted;
  for (const Kernels *kernels : all)
    if (supported(*kernels)) return kernels;
  return &scalar_kernels;
}

std::atomic<const Kernels *> chosen{nullptr};

const Kernels &kernels() {
  const Kernels *now = chosen.load();
  if (!now) chosen.store(now = best());
  return *now;
}

struct Failure {
  char *message;
  size_t capacity;
  bool deep;  // whether contents are checked besides sizes

  __attribute__((format(printf, 2, 3))) int32_t operator()(const char *format, ...) const {
    va_list arguments;
    va_start(arguments, format);
    if (message && capacity) std::vsnprintf(message, capacity, format, arguments);
    va_end(arguments);
    return -1;
  }
};

int64_t width_of(int32_t type) {
  return type == RAREFY_F32 ? 4 : type == RAREFY_F16 || type == RAREFY_BF16 ? 2 : type == RAREFY_U8 ? 1 : 0;
}
bool is_float(int32_t type) { return type == RAREFY_F32 || type == RAREFY_F16 || type == RAREFY_BF16; }

// A tensor that a description asks for: exactly so many bytes, or none and no memory either.
int32_t sized(const Failure &fail, const char *name, const rarefy_span &span, int64_t bytes) {
  if (span.bytes == bytes && (bytes == 0) == (span.data == nullptr)) return 0;
  return fail("'%s' has %lld bytes, but its description asks for %lld; prepare the layer again.", name,
              (long long)span.bytes, (long long)bytes);
}

// Row pointers or offsets that rise from 0 to `end`.
template <class Int> int32_t rising(const Failure &fail, const char *name, const Int *p, int64_t count, int64_t end) {
  for (int64_t i = 0; i + 1 < count; ++i)
    if (p[i] > p[i + 1] || p[i] < 0) return fail("'%s' falls at place %lld; prepare the layer again.", name, (long long)i);
  if (count && (p[0] < 0 || p[count - 1] > end))
    return fail("'%s' leads beyond the %lld elements there are; prepare the layer again.", name, (long long)end);
  return 0;
}

int32_t check_scales(const rarefy_term &t, const Failure &fail, int64_t places) {
  int64_t width = width_of(t.scale_type), scale = 0;
  bool levels = t.scale_layout == RAREFY_NIBBLES || t.scale_layout == RAREFY_OCTETS;
  switch (t.scale_layout) {
    case RAREFY_UNIT_SCALE: break;
    case RAREFY_SINGLE: scale = places * 16 * width; break;
    case RAREFY_SIGNED: scale = places * 32 * width; break;
    case RAREFY_PAIRS:
      if (t.bits != 1) return fail("'scale' holds pairs, which go with 1 bit, not %d.", t.bits);
      scale = places * 32 * width;
      break;
    case RAREFY_NIBBLES: scale = places * 16; break;
    case RAREFY_OCTETS: scale = places * 32; break;
    default: return fail("'scale' has the unknown layout %d.", t.scale_layout);
  }
  if (!levels && t.scale_layout != RAREFY_UNIT_SCALE && !is_float(t.scale_type))
    return fail("'scale' has the unknown type %d.", t.scale_type);
  if (sized(fail, "scale", t.scale, scale)) return -1;
  int64_t second = 0;
  if (levels) {
    if ((t.second_numbers != 2 && t.second_numbers != 4) || !is_float(t.second_type) || t.second_groups < 1 ||
        (t.second_rows != 1 && (t.second_rows < 16 || t.second_rows % 16)))
      return fail("'second_order' has a description that no kernel reads.");
    int64_t tiles = ceil_div(groups_of(t), t.second_groups) * t.second_numbers * width_of(t.second_type);
    second = t.second_rows == 1 ? tiles_of(t) * 16 * tiles : ceil_div(t.rows, t.second_rows) * tiles;
  }
  return sized(fail, "second_order", t.second_order, second);
}

int32_t check_codes(const rarefy_term &t, const Failure &fail) {
  int64_t places = tiles_of(t) * groups_of(t), units = tiles_of(t) * units_of(t);
  if (check_scales(t, fail, places)) return -1;
  if (t.group_size < t.columns && t.group_size % (t.kind == RAREFY_KEPT ? 32 : 4))
    return fail("'scale' is shared by %lld columns, which no kernel reads.", (long long)t.group_size);
  if (t.zero_type != RAREFY_NONE && t.zero_type != RAREFY_U8 && !is_float(t.zero_type))
    return fail("'zero_point' has the unknown type %d.", t.zero_type);
  if (sized(fail, "zero_point", t.zero_point, places * 16 * width_of(t.zero_type))) return -1;
  if (t.table.bytes && sized(fail, "table", t.table, int64_t(4) << t.bits)) return -1;
  if (t.table.bytes && t.scale_layout == RAREFY_SIGNED && t.bits < 3)
    return fail("'table' of %d bits cannot have a scale for each sign.", t.bits);
  if (t.kind == RAREFY_CODES) return sized(fail, "codes", t.codes, units * 64 * t.bits);
  bool plain = t.scale_layout != RAREFY_PAIRS && (t.table.bytes != 0 || t.scale_layout != RAREFY_SIGNED);
  bool whole = t.zero == float(int32_t(t.zero)) && t.zero >= 0 && t.zero < float(1 << t.bits) && t.second_numbers != 4;
  if (!plain || !whole || (t.zero_type != RAREFY_NONE && (t.zero_type != RAREFY_U8 || t.table.bytes)))
    return fail("'zero_point' of a sparse weight has to be a whole code.");
  if (t.table.bytes && (t.bits < 3 || static_cast<const float *>(t.table.data)[int32_t(t.zero)] != 0))
    return fail("'table' of a sparse weight needs a code for zero.");
  if (sized(fail, "positions", t.positions, units * 64) ||
      sized(fail, "pointers", t.pointers, (tiles_of(t) + 1) * 8))
    return -1;
  if (t.codes.bytes < slack) return fail("'codes' have %lld bytes; prepare the layer again.", (long long)t.codes.bytes);
  if (!fail.deep) return 0;
  const int64_t *pointers = static_cast<const int64_t *>(t.pointers.data);
  const uint64_t *masks = static_cast<const uint64_t *>(t.positions.data);
  if (rising(fail, "pointers", pointers, tiles_of(t) + 1, t.codes.bytes - slack)) return -1;
  if (pointers[tiles_of(t)] != t.codes.bytes - slack)
    return fail("'codes' have more than the %lld elements of all tiles; prepare the layer again.",
                (long long)pointers[tiles_of(t)]);
  for (int64_t tile = 0; tile < tiles_of(t); ++tile) {
    int64_t bytes = 0;
    for (int64_t q = 0; q < units_of(t) * 8; ++q) {
      int64_t kept = __builtin_popcountll(masks[tile * units_of(t) * 8 + q]);
      bytes += t.bits > 4 ? kept : (kept + 1) / 2;
    }
    if (pointers[tile] + bytes > pointers[tile + 1])
      return fail("'positions' keep more codes than tile %lld of 'codes' holds.", (long long)tile);
  }
  return 0;
}

int32_t check_values(const rarefy_term &t, const Failure &fail) {
  if (!is_float(t.scale_type)) return fail("'values' have the unknown type %d.", t.scale_type);
  if (sized(fail, "positions", t.positions, tiles_of(t) * units_of(t) * 64) ||
      sized(fail, "pointers", t.pointers, (tiles_of(t) + 1) * 8))
    return -1;
  if (t.codes.bytes < slack) return fail("'codes' have %lld bytes; prepare the layer again.", (long long)t.codes.bytes);
  if (!fail.deep) return 0;
  const int64_t *pointers = static_cast<const int64_t *>(t.pointers.data);
  const uint16_t *masks = static_cast<const uint16_t *>(t.positions.data);
  if ((t.codes.bytes - slack) % width_of(t.scale_type)) return fail("'codes' end within a value; prepare the layer again.");
  int64_t stored = (t.codes.bytes - slack) / width_of(t.scale_type), lanes = units_of(t) * 32;
  if (rising(fail, "pointers", pointers, tiles_of(t) + 1, stored)) return -1;
  if (pointers[tiles_of(t)] != stored)
    return fail("'codes' have more than the %lld elements of all tiles; prepare the layer again.",
                (long long)pointers[tiles_of(t)]);
  for (int64_t tile = 0; tile < tiles_of(t); ++tile) {
    int64_t kept = 0;
    for (int64_t k = 0; k < lanes; ++k) kept += __builtin_popcount(masks[tile * lanes + k]);
    if (pointers[tile] + kept > pointers[tile + 1])
      return fail("'positions' keep more values than tile %lld of 'codes' holds.", (long long)tile);
  }
  return 0;
}

int32_t check_entries(const rarefy_term &t, const Failure &fail) {
  if (t.scale_type != RAREFY_F16 && t.scale_type != RAREFY_BF16)
    return fail("'entries' have the unknown type %d.", t.scale_type);
  int64_t places = ceil_div(t.columns, 65536) * tiles_of(t), slices = t.codes.bytes / 64;
  if (t.codes.bytes % 64) return fail("'entries' end within a slice; prepare the layer again.");
  if (sized(fail, "pointers", t.pointers, (places + 1) * 4) || sized(fail, "positions", t.positions, places * 48))
    return -1;
  if (!fail.deep) return 0;
  const int32_t *starts = static_cast<const int32_t *>(t.pointers.data);
  if (rising(fail, "pointers", starts, places + 1, slices)) return -1;
  if (starts[places] != slices)
    return fail("'entries' have more than the %lld slices of all tiles; prepare the layer again.",
                (long long)starts[places]);
  for (int64_t place = 0; place < places; ++place) {
    const uint8_t *other = static_cast<const uint8_t *>(t.positions.data) + place * 48 + 32;
    const int32_t *entries = static_cast<const int32_t *>(t.codes.data);
    for (int lane = 0; lane < 16; ++lane)
      if (other[lane] > 15) return fail("'positions' name row %d of 16.", other[lane]);
    for (int64_t i = 16 * int64_t(starts[place]); i < 16 * int64_t(starts[place + 1]); ++i)
      if (place / tiles_of(t) * 65536 + (entries[i] & 0xffff) >= t.columns)
        return fail("'entries' name a column beyond %lld.", (long long)t.columns);
  }
  return 0;
}

int32_t check_groups(const rarefy_term &t, const Failure &fail) {
  if (t.group_size % 16 || t.group_size > largest_group)
    return fail("'codes' have groups of %lld columns, which no kernel reads.", (long long)t.group_size);
  if (!is_float(t.scale_type)) return fail("'scale' has the unknown type %d.", t.scale_type);
  if (sized(fail, "pointers", t.pointers, (t.rows + 1) * 4)) return -1;
  int64_t kept = t.positions.bytes / 2;
  if (t.positions.bytes % 2) return fail("'positions' end within a number; prepare the layer again.");
  if (sized(fail, "codes", t.codes, kept * (t.group_size / 8) * t.bits + slack) ||
      sized(fail, "scale", t.scale, kept * width_of(t.scale_type)) ||
      sized(fail, "zero_point", t.zero_point, kept * width_of(t.zero_type)))
    return -1;
  if (!fail.deep) return 0;
  if (rising(fail, "pointers", static_cast<const int32_t *>(t.pointers.data), t.rows + 1, kept)) return -1;
  const uint16_t *ids = static_cast<const uint16_t *>(t.positions.data);
  for (int64_t i = 0; i < kept; ++i)
    if (ids[i] >= ceil_div(t.columns, t.group_size))
      return fail("'positions' name group %d of %lld.", ids[i], (long long)ceil_div(t.columns, t.group_size));
  return 0;
}

int32_t check(const rarefy_term &t, const Failure &fail) {
  if (t.rows < 1 || t.columns < 1 || t.group_size < 1 || t.group_size > t.columns || t.rows > INT32_MAX ||
      t.columns > INT32_MAX)
    return fail("A weight of %lld x %lld with groups of %lld is beyond what kernels count.", (long long)t.rows,
                (long long)t.columns, (long long)t.group_size);
  if (t.bits < 1 || t.bits > 8) return fail("'codes' of %d bits are unknown; kernels read 1 to 8.", t.bits);
  switch (t.kind) {
    case RAREFY_CODES:
    case RAREFY_KEPT: return check_codes(t, fail);
    case RAREFY_TABLES:
      if (t.bits > 4 || t.entries < 1 || t.entries > 1 << t.bits || !is_float(t.scale_type) ||
          (t.group_size < t.columns && t.group_size % panel_columns))
        return fail("'table' has a description that no kernel reads.");
      if (sized(fail, "codes", t.codes, tiles_of(t) * panels_of(t) * 256 * t.bits)) return -1;
      return sized(fail, "table", t.table, tiles_of(t) * groups_of(t) * 16 * t.entries * width_of(t.scale_type));
    case RAREFY_VALUES: return check_values(t, fail);
    case RAREFY_ENTRIES: return check_entries(t, fail);
    case RAREFY_GROUPS: return check_groups(t, fail);
    default: return fail("A term of the unknown kind %d.", t.kind);
  }
}

int32_t check_shapes(const rarefy_term *terms, int32_t count, const Failure &fail) {
  if (count < 1 || count > max_terms) return fail("%d terms; a product has 1 to %d.", count, max_terms);
  for (int32_t i = 0; i < count; ++i) {
    if (terms[i].rows != terms[0].rows || terms[i].columns != terms[0].columns)
      return fail("Term %d is %lld x %lld, but the first is %lld x %lld.", i, (long long)terms[i].rows,
                  (long long)terms[i].columns, (long long)terms[0].rows, (long long)terms[0].columns);
    if (check(terms[i], fail)) return -1;
  }
  return 0;
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Whether any of the terms multiplies activations in 32 bits.
bool reads_floats(const rarefy_term *terms, int32_t count, int32_t mode) {
  for (int32_t i = 0; i < count; ++i)
    if (mode == RAREFY_EXACT || !multiplies_bytes(terms[i])) return true;
  return false;
}

// Tokens that blocks have room for.
int64_t rows_of(int64_t tokens, int32_t mode) {
  return tokens <= few || mode == RAREFY_EXACT ? tokens : ceil_div(tokens, abreast) * abreast;
}

// Memory that grows and stays, one for each thread that calls.
struct Scratch {
  void *memory = nullptr;
  int64_t bytes = 0;

  void *get(int64_t wanted) {
    if (wanted > bytes) {
      std::free(memory);
      bytes = aligned(wanted);
      memory = std::aligned_alloc(64, size_t(bytes));
      if (!memory) bytes = 0;
    }
    return memory;
  }
  ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch;

struct Product {
  const rarefy_term *terms;
  int32_t count, type;
  rarefy_input input;
  const char *x;
  int64_t x_stride, y_stride, tokens_at_once, tiles_at_once;
  float *y;
  void *result;
};

void fill(void *context, int64_t chunk) {
  const Product &p = *static_cast<Product *>(context);
  int64_t first = chunk * p.tokens_at_once, last = first + p.tokens_at_once;
  for (int64_t token = first; token < last && token < p.input.tokens; ++token)
    kernels().token(&p.input, token, p.x + token * p.x_stride * width_of(p.type), p.type);
}

void multiply(void *context, int64_t chunk) {
  const Product &p = *static_cast<Product *>(context);
  int64_t last = tiles_of(p.terms[0]), first = chunk * p.tiles_at_once;
  if (first + p.tiles_at_once < last) last = first + p.tiles_at_once;
  kernels().tiles(p.terms, p.count, &p.input, first, last, p.y, p.terms[0].rows);
}

void finish(void *context, int64_t chunk) {
  const Product &p = *static_cast<Product *>(context);
  int64_t first = chunk * p.tokens_at_once, last = first + p.tokens_at_once, rows = p.terms[0].rows;
  for (int64_t token = first; token < last && token < p.input.tokens; ++token)
    kernels().convert(p.y + token * rows,
                      static_cast<char *>(p.result) + token * p.y_stride * width_of(p.type), p.type, rows);
}

struct Decoding {
  const rarefy_term *terms;
  int32_t count;
  float *weight;
};

void decode_tile(void *context, int64_t tile) {
  const Decoding &d = *static_cast<Decoding *>(context);
  kernels().decode(d.terms, d.count, tile, d.weight);
}

}  // namespace

extern "C" {

int32_t rarefy_abi(void) { return RAREFY_ABI; }

const char *rarefy_instructions(void) { return kernels().name; }

int32_t rarefy_select(const char *name) {
  const Kernels *wanted = named(name);
  if (!wanted) return -1;
  chosen.store(wanted);
  return 0;
}

int32_t rarefy_check(const rarefy_term *term, char *message, size_t capacity) {
  return check(*term, Failure{message, capacity, true});
}

int64_t rarefy_tile_count(int64_t rows) { return ceil_div(rows, tile_rows); }

int64_t rarefy_input_bytes(const rarefy_term *terms, int32_t count, int64_t tokens, int32_t mode) {
  rarefy_input input;
  rarefy_input_begin(&input, terms, count, tokens, mode, nullptr);
  int64_t bytes = reads_floats(terms, count, mode) ? aligned(tokens * input.stride * 4) : 0;
  for (int32_t i = 0; i < input.blockings; ++i) {
    bytes += 2 * aligned(rows_of(tokens, mode) * input.blocks[i].count * 4);
    if (mode == RAREFY_FAST) bytes += aligned(rows_of(tokens, mode) * code_stride(input));
  }
  return bytes;
}

void rarefy_input_begin(rarefy_input *input, const rarefy_term *terms, int32_t count, int64_t tokens, int32_t mode,
                        void *memory) {
  char *next = static_cast<char *>(memory);
  auto take = [&](int64_t bytes) {
    char *own = next;
    if (next) next += aligned(bytes);
    return own;
  };
  std::memset(input, 0, sizeof *input);
  input->tokens = tokens, input->columns = terms[0].columns, input->mode = mode;
  input->stride = panels_of(terms[0]) * panel_columns;
  if (reads_floats(terms, count, mode)) input->x = reinterpret_cast<float *>(take(tokens * input->stride * 4));
  for (int32_t i = 0; i < count; ++i) {
    if (!reads_blocks(terms[i])) continue;
    int64_t size = block_of(terms[i]);
    bool known = false;
    for (int32_t j = 0; j < input->blockings; ++j) known = known || input->blocks[j].size == size;
    if (known || input->blockings == RAREFY_BLOCKINGS) continue;
    rarefy_blocks &own = input->blocks[input->blockings++];
    own.size = size, own.count = ceil_div(input->columns, size);
    int64_t rows = rows_of(tokens, mode);
    own.scale = reinterpret_cast<float *>(take(rows * own.count * 4));
    own.sum = reinterpret_cast<float *>(take(rows * own.count * 4));
    if (mode == RAREFY_FAST) own.codes = reinterpret_cast<int8_t *>(take(rows * code_stride(*input)));
  }
}

void rarefy_input_token(const rarefy_input *input, int64_t token, const void *x, int32_t type) {
  kernels().token(input, token, x, type);
}

void rarefy_tiles(const rarefy_term *terms, int32_t count, const rarefy_input *input, int64_t first, int64_t last,
                  float *y, int64_t y_stride) {
  kernels().tiles(terms, count, input, first, last, y, y_stride);
}

int32_t rarefy_linear(const rarefy_term *terms, int32_t count, const void *x, int64_t x_stride, void *y,
                      int64_t y_stride, int32_t type, int64_t tokens, int32_t mode, char *message, size_t capacity) {
  Failure fail{message, capacity, false};
  if (check_shapes(terms, count, fail)) return -1;
  if (!is_float(type)) return fail("The input has the unknown type %d.", type);
  if (tokens < 1) return 0;
  Product p{};
  p.terms = terms, p.count = count, p.type = type, p.x = static_cast<const char *>(x), p.result = y;
  p.x_stride = x_stride, p.y_stride = y_stride;
  int64_t bytes = aligned(rarefy_input_bytes(terms, count, tokens, mode)), tiles = tiles_of(terms[0]);
  bool direct = type == RAREFY_F32 && y_stride == terms[0].rows;  // products are such floats themselves
  char *memory = static_cast<char *>(scratch.get(bytes + (direct ? 0 : tokens * terms[0].rows * 4)));
  if (!memory) return fail("There is no memory for %lld tokens.", (long long)tokens);
  rarefy_input_begin(&p.input, terms, count, tokens, mode, memory);
  p.y = direct ? static_cast<float *>(y) : reinterpret_cast<float *>(memory + bytes);
  p.tokens_at_once = 8;
  // Alone, a thread takes all tiles at once; several take pieces small enough that none waits long for another.
  int64_t pieces = rarefy_threads(0) > 1 ? 8 * rarefy_threads(0) : 1;
  p.tiles_at_once = std::max(ceil_div(tiles, pieces), chunk_tiles);
  rarefy_parallel(fill, &p, ceil_div(tokens, p.tokens_at_once));
  rarefy_parallel(multiply, &p, ceil_div(tiles, p.tiles_at_once));
  if (!direct) rarefy_parallel(finish, &p, ceil_div(tokens, p.tokens_at_once));
  return 0;
}

int32_t rarefy_decode(const rarefy_term *terms, int32_t count, float *weight, char *message, size_t capacity) {
  if (check_shapes(terms, count, Failure{message, capacity, false})) return -1;
  Decoding d{terms, count, weight};
  rarefy_parallel(decode_tile, &d, tiles_of(terms[0]));
  return 0;
}

uint64_t rarefy_read(const void *data, int64_t bytes) { return kernels().read(data, bytes); }

}  // extern "C"
