// Runs a program of step.h: runs of small operations token by token, then the products and attention between them on
// the pool, one hand-over to the pool for each.
#include "step.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "internal.h"
#include "step/table.h"

namespace rarefy {
namespace {

constexpr int32_t max_rotations = 4;  // tables of angles that a program may have
constexpr int64_t line = 64;          // bytes
constexpr int64_t pieces_each = 6;    // of the weights of a product, for each thread
constexpr int64_t few_tokens = 4;     // up to so many, small operations are not worth the pool

int64_t padded(int64_t count, int64_t to = 16) { return ceil_div(count, to) * to; }

bool same_rotation(const rarefy_op &a, const rarefy_op &b) { return a.data == b.data && a.scale == b.scale; }

// Operations from `at` on that run together: PROJECTs of one input.
int32_t group_end(const rarefy_program &p, int32_t at, int32_t end) {
  int32_t last = at + 1;
  while (last < end && p.ops[last].kind == RAREFY_PROJECT && p.ops[last].x == p.ops[at].x) ++last;
  return last;
}

struct Weights {
  const rarefy_term *terms = nullptr;
  int32_t count = 0;
};

Weights weights_of(const rarefy_program &p, int32_t first, int32_t last) {
  Weights all;
  for (int32_t i = first; i < last; ++i) {
    if (!p.ops[i].terms) continue;
    if (!all.terms) all.terms = p.ops[i].first;
    all.count += p.ops[i].terms;
  }
  return all;
}

// How a step's memory is laid out; the same function counts it and hands it out.
struct Memory {
  char *base;
  int64_t used = 0;
  template <class T> T *take(int64_t count) {
    T *place = reinterpret_cast<T *>(base + used);
    used += padded(count * int64_t(sizeof(T)), line);
    return place;
  }
};

struct Step {
  const rarefy_program &program;
  const StepKernels &own;
  rarefy_cache *cache;
  const int64_t *tokens;
  int64_t count, start;
  int32_t mode;
  bool every;
  float *logits;

  float *buffers = nullptr, *angles = nullptr, *scores = nullptr;
  void *input_memory = nullptr;
  int32_t rotations = 0;
  const rarefy_op *rotation[max_rotations] = {};
  int64_t slots = 1;

  int64_t stride(int32_t buffer) const {
    return buffer == program.logits ? program.vocabulary : padded(program.widths[buffer]);
  }

  void lay_out(Memory &memory, int64_t positions) {
    int64_t floats = 0;
    for (int32_t b = 0; b < program.buffers; ++b)
      if (b != program.logits) floats += stride(b) * count;
    buffers = memory.take<float>(floats);
    rotations = 0;
    for (int32_t i = 0; i < program.count; ++i) {
      if (program.ops[i].kind != RAREFY_ROTATE) continue;
      int32_t known = 0;
      while (known < rotations && !same_rotation(*rotation[known], program.ops[i])) ++known;
      if (known == rotations) rotation[rotations++] = &program.ops[i];
    }
    angles = memory.take<float>(rotations * count * program.head_dim);
    int64_t group = program.heads / program.kv_heads;
    int64_t pairs = count * program.kv_heads;
    slots = rarefy_threads(0) < pairs ? rarefy_threads(0) : pairs;
    scores = memory.take<float>(slots * group * padded(positions));
    int64_t most = 0;
    for (int32_t i = 0; i < program.count;) {
      if (program.ops[i].kind != RAREFY_PROJECT) {
        ++i;
        continue;
      }
      int32_t last = group_end(program, i, i < program.head ? program.head : program.count);
      Weights all = weights_of(program, i, last);
      if (all.count) {
        int64_t bytes = rarefy_input_bytes(all.terms, all.count, count, mode);
        most = bytes > most ? bytes : most;
      }
      i = last;
    }
    input_memory = memory.take<char>(most);
  }

  // Row `token` of a buffer; logits begin at the first token that has them.
  float *at(int32_t buffer, int64_t token) const {
    if (buffer == program.logits) return logits + (every ? token : 0) * program.vocabulary;
    float *place = buffers;
    for (int32_t b = 0; b < buffer; ++b)
      if (b != program.logits) place += stride(b) * count;
    return place + token * stride(buffer);
  }

  void turn() {  // the sines and cosines of all tokens
    int64_t half = program.head_dim / 2;
    for (int32_t r = 0; r < rotations; ++r)
      for (int64_t t = 0; t < count; ++t) {
        float *cosine = angles + (r * count + t) * program.head_dim, *sine = cosine + half;
        const float *speed = static_cast<const float *>(rotation[r]->data);
        for (int64_t k = 0; k < half; ++k) {
          float angle = float(start + t) * speed[k];
          cosine[k] = std::cos(angle) * rotation[r]->scale;
          sine[k] = std::sin(angle) * rotation[r]->scale;
        }
      }
  }

  void small(const rarefy_op &op, int64_t t) const {
    int64_t width = program.widths[op.x];
    switch (op.kind) {
      case RAREFY_EMBED:
        own.embed(op.data, op.type, tokens[t], op.columns, op.scale, at(op.out, t));
        break;
      case RAREFY_NORM:
        own.norm(at(op.x, t), static_cast<const float *>(op.data), width / op.heads, op.heads, op.eps, at(op.out, t));
        break;
      case RAREFY_ROTATE: {
        int32_t r = 0;
        while (!same_rotation(*rotation[r], op)) ++r;
        const float *cosine = angles + (r * count + t) * program.head_dim;
        own.rotate(at(op.x, t), program.head_dim, op.heads, cosine, cosine + program.head_dim / 2);
        break;
      }
      case RAREFY_GATE: own.gate(at(op.x, t), at(op.y, t), width, op.activation, at(op.out, t)); break;
      case RAREFY_ADD: own.add(at(op.x, t), at(op.y, t), width); break;
      case RAREFY_CAP: own.cap(at(op.x, t), width, op.softcap); break;
      default: break;
    }
  }

  // Keys and values of one token into the cache.
  void store(const rarefy_op &op, int64_t t) const {
    int64_t size = cache->type == RAREFY_F32 ? 4 : 2, row = program.head_dim * size;
    const float *k = at(op.y, t), *v = at(op.z, t);
    for (int64_t h = 0; h < program.kv_heads; ++h) {
      int64_t place = ((op.layer * program.kv_heads + h) * cache->capacity + start + t) * row;
      own.store(k + h * program.head_dim, static_cast<char *>(cache->keys) + place, cache->type, program.head_dim);
      own.store(v + h * program.head_dim, static_cast<char *>(cache->values) + place, cache->type, program.head_dim);
    }
  }

  void run(int32_t begin, int32_t end, int64_t from, int64_t to);
  void run_small(int32_t begin, int32_t end, int64_t from, int64_t to);
  void run_projections(int32_t begin, int32_t end, int64_t from, int64_t to);
  void run_attention(const rarefy_op &op);
};

// task(token) for tokens [from, to), on the pool when there are enough.
template <class Task> void each_token(int64_t from, int64_t to, const Task &task) {
  if (to - from <= few_tokens) {
    for (int64_t t = from; t < to; ++t) task(t);
    return;
  }
  struct Context {
    const Task &task;
    int64_t from, to;
  } context{task, from, to};
  rarefy_parallel(
      [](void *memory, int64_t chunk) {
        Context &own = *static_cast<Context *>(memory);
        int64_t first = own.from + chunk * few_tokens;
        for (int64_t t = first; t < own.to && t < first + few_tokens; ++t) own.task(t);
      },
      &context, ceil_div(to - from, few_tokens));
}

void Step::run_small(int32_t begin, int32_t end, int64_t from, int64_t to) {
  each_token(from, to, [&](int64_t t) {
    for (int32_t i = begin; i < end; ++i) small(program.ops[i], t);
  });
}

void Step::run_projections(int32_t begin, int32_t end, int64_t from, int64_t to) {
  Weights all = weights_of(program, begin, end);
  rarefy_input input;
  if (all.count) {
    rarefy_input_begin(&input, all.terms, all.count, to - from, mode, input_memory);
    each_token(from, to, [&](int64_t t) {
      rarefy_input_token(&input, t - from, at(program.ops[begin].x, t), RAREFY_F32);
    });
  }
  struct Context {
    const Step &step;
    const rarefy_input &input;
    int32_t begin, end;
    int64_t from, to, tiles;  // of a chunk
  } context{*this, input, begin, end, from, to, 0};
  // Alone, a thread takes each weight whole; several take pieces small enough that none waits long for another.
  int64_t total = 0, chunks = 0;
  for (int32_t i = begin; i < end; ++i) total += rarefy_tile_count(program.ops[i].rows);
  int64_t pieces = rarefy_threads(0) > 1 ? pieces_each * rarefy_threads(0) : 1;
  context.tiles = ceil_div(total, pieces) > chunk_tiles ? ceil_div(total, pieces) : chunk_tiles;
  for (int32_t i = begin; i < end; ++i) chunks += ceil_div(rarefy_tile_count(program.ops[i].rows), context.tiles);
  rarefy_parallel(
      [](void *memory, int64_t chunk) {
        const Context &c = *static_cast<Context *>(memory);
        const rarefy_op *op = c.step.program.ops + c.begin;
        int64_t tiles = rarefy_tile_count(op->rows);
        for (int64_t own; chunk >= (own = ceil_div(tiles, c.tiles)); tiles = rarefy_tile_count(op->rows)) {
          chunk -= own;
          ++op;
        }
        int64_t first = chunk * c.tiles, last = first + c.tiles < tiles ? first + c.tiles : tiles;
        int64_t row = first * tile_rows, end = last * tile_rows < op->rows ? last * tile_rows : op->rows;
        float *y = c.step.at(op->out, c.from);
        int64_t stride = c.step.stride(op->out), count = c.to - c.from;
        if (op->terms)
          rarefy_tiles(op->first, op->terms, &c.input, first, last, y, stride);
        else
          c.step.own.dense(op->data, op->type, op->columns, c.step.at(op->x, c.from), c.step.stride(op->x), y, stride,
                           row, end, count);
        if (op->bias)
          for (int64_t t = 0; t < count; ++t)
            for (int64_t r = row; r < end; ++r) y[t * stride + r] += op->bias[r];
      },
      &context, chunks);
}

void Step::run_attention(const rarefy_op &op) {
  each_token(0, count, [&](int64_t t) { store(op, t); });
  struct Context {
    const Step &step;
    const rarefy_op &op;
    std::atomic<int64_t> next;
  } context{*this, op, {0}};
  rarefy_parallel(
      [](void *memory, int64_t slot) {
        Context &c = *static_cast<Context *>(memory);
        const Step &s = c.step;
        const rarefy_program &p = s.program;
        int64_t group = p.heads / p.kv_heads, size = s.cache->type == RAREFY_F32 ? 4 : 2;
        float *scores = s.scores + slot * group * padded(s.start + s.count);
        for (int64_t pair; (pair = c.next.fetch_add(1, std::memory_order_relaxed)) < s.count * p.kv_heads;) {
          int64_t t = s.count - 1 - pair / p.kv_heads, head = pair % p.kv_heads;  // the longest first
          int64_t last = s.start + t + 1, first = c.op.window && c.op.window < last ? last - c.op.window : 0;
          int64_t place = (c.op.layer * p.kv_heads + head) * s.cache->capacity * p.head_dim * size;
          s.own.attend(s.at(c.op.x, t) + head * group * p.head_dim, group, p.head_dim,
                       static_cast<const char *>(s.cache->keys) + place,
                       static_cast<const char *>(s.cache->values) + place, s.cache->type, first, last, c.op.scale,
                       c.op.softcap, scores, s.at(c.op.out, t) + head * group * p.head_dim);
        }
      },
      &context, slots);
}

void Step::run(int32_t begin, int32_t end, int64_t from, int64_t to) {
  for (int32_t i = begin; i < end;) {
    int32_t kind = program.ops[i].kind;
    if (kind == RAREFY_PROJECT) {
      int32_t last = group_end(program, i, end);
      run_projections(i, last, from, to);
      i = last;
    } else if (kind == RAREFY_ATTEND) {
      run_attention(program.ops[i++]);
    } else {
      int32_t last = i + 1;
      while (last < end && program.ops[last].kind != RAREFY_PROJECT && program.ops[last].kind != RAREFY_ATTEND) ++last;
      run_small(i, last, from, to);
      i = last;
    }
  }
}

const StepKernels &step_kernels() {
#ifdef RAREFY_WIDE
  if (!std::strcmp(rarefy_instructions(), "avx512")) return avx512_step;
  if (!std::strcmp(rarefy_instructions(), "avx2")) return avx2_step;
#endif
  return scalar_step;
}

int32_t refuse(char *message, size_t capacity, const char *why, long long a = 0, long long b = 0) {
  if (message && capacity) std::snprintf(message, capacity, why, a, b);
  return -1;
}

// A sentence about what is wrong with operation `at`, or null.
const char *fault(const rarefy_program &p, int32_t at, char *message, size_t capacity) {
  const rarefy_op &op = p.ops[at];
  auto width = [&](int32_t buffer) { return buffer >= 0 && buffer < p.buffers ? p.widths[buffer] : int64_t(-1); };
  int64_t x = width(op.x), out = width(op.out);
  if (op.kind != RAREFY_EMBED && x < 1) return "operation %lld reads a buffer that is not there";
  bool typed = op.type == RAREFY_F32 || op.type == RAREFY_F16 || op.type == RAREFY_BF16;
  switch (op.kind) {
    case RAREFY_EMBED:
      if (!op.data || !typed || out < op.columns || op.columns < 1 || op.rows != p.vocabulary)
        return "operation %lld embeds into a buffer of another width";
      return nullptr;
    case RAREFY_NORM:
      if (!op.data || op.heads < 1 || x % op.heads || out < x) return "operation %lld has a norm of another width";
      return nullptr;
    case RAREFY_PROJECT: {
      if (op.rows < 1 || op.columns < 1 || x < op.columns || out < op.rows || op.x == op.out)
        return "operation %lld projects between buffers of other widths";
      if (op.terms < 0 || op.terms > max_terms || (op.terms ? !op.first : !op.data || !typed))
        return "operation %lld has no weight";
      for (int32_t i = 0; i < op.terms; ++i) {
        if (op.first[i].rows != op.rows || op.first[i].columns != op.columns)
          return "operation %lld has a weight of another shape";
        if (rarefy_check(&op.first[i], message, capacity)) return message;
      }
      return nullptr;
    }
    case RAREFY_ROTATE:
      if (!op.data || op.heads < 1 || x != op.heads * p.head_dim) return "operation %lld rotates heads of another width";
      return nullptr;
    case RAREFY_ATTEND:
      if (x != p.heads * p.head_dim || out < x || width(op.y) != p.kv_heads * p.head_dim ||
          width(op.z) != p.kv_heads * p.head_dim || op.layer < 0 || op.layer >= p.layers || op.window < 0)
        return "operation %lld attends with heads of another width";
      return nullptr;
    case RAREFY_GATE:
      if (width(op.y) != x || out < x || op.activation < 0 || op.activation > RAREFY_RELU)
        return "operation %lld gates buffers of different widths";
      return nullptr;
    case RAREFY_ADD: return width(op.y) == x ? nullptr : "operation %lld adds buffers of different widths";
    case RAREFY_CAP: return op.softcap > 0 ? nullptr : "operation %lld has no cap";
    default: return "operation %lld is of no known kind";
  }
}

}  // namespace
}  // namespace rarefy

using namespace rarefy;

int32_t rarefy_step_check(const rarefy_program *program, char *message, size_t capacity) {
  const rarefy_program &p = *program;
  if (!p.ops || !p.widths || p.count < 1 || p.head < 1 || p.head > p.count || p.logits < 0 || p.logits >= p.buffers ||
      p.widths[p.logits] != p.vocabulary)
    return refuse(message, capacity, "The program has no operations, or no buffer of logits");
  if (p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads || p.head_dim < 16 || p.head_dim % 16)
    return refuse(message, capacity, "A head of %lld channels is not a multiple of 16", p.head_dim);
  int32_t rotations = 0;
  const rarefy_op *known[max_rotations];
  for (int32_t i = 0; i < p.count; ++i) {
    if (const char *why = fault(p, i, message, capacity)) return why == message ? -1 : refuse(message, capacity, why, i);
    if (i >= p.head && p.ops[i].kind == RAREFY_ATTEND)
      return refuse(message, capacity, "operation %lld attends after the last layer", i);
    if (p.ops[i].kind != RAREFY_ROTATE) continue;
    int32_t r = 0;
    while (r < rotations && !same_rotation(*known[r], p.ops[i])) ++r;
    if (r == rotations && rotations == max_rotations)
      return refuse(message, capacity, "The program has more than %lld rotary tables", max_rotations);
    if (r == rotations) known[rotations++] = &p.ops[i];
  }
  return 0;
}

int64_t rarefy_step_bytes(const rarefy_program *program, int64_t tokens, int64_t positions, int32_t mode) {
  Step step{*program, step_kernels(), nullptr, nullptr, tokens, 0, mode, false, nullptr};
  Memory memory{nullptr};
  step.lay_out(memory, positions);
  return memory.used;
}

int32_t rarefy_step(const rarefy_program *program, rarefy_cache *cache, const int64_t *tokens, int64_t count,
                    int32_t mode, int32_t every, float *logits, void *memory, int64_t bytes, char *message,
                    size_t capacity) {
  const rarefy_program &p = *program;
  if (cache->type != RAREFY_F32 && cache->type != RAREFY_F16)
    return refuse(message, capacity, "A cache of type %lld is neither 32 nor 16 bits wide", cache->type);
  if (count < 1 || cache->length < 0 || cache->length + count > cache->capacity)
    return refuse(message, capacity, "%lld tokens do not fit the cache's %lld positions", cache->length + count,
                  cache->capacity);
  for (int64_t t = 0; t < count; ++t)
    if (tokens[t] < 0 || tokens[t] >= p.vocabulary)
      return refuse(message, capacity, "Token %lld lies outside the vocabulary of %lld", tokens[t], p.vocabulary);
  Step step{p, step_kernels(), cache, tokens, count, cache->length, mode, every != 0, logits};
  Memory place{static_cast<char *>(memory)};
  step.lay_out(place, cache->length + count);
  if (place.used > bytes || reinterpret_cast<uintptr_t>(memory) % line)
    return refuse(message, capacity, "The step works in %lld bytes, not %lld", place.used, bytes);
  step.turn();
  step.run(0, p.head, 0, count);
  step.run(p.head, p.count, every ? 0 : count - 1, count);
  cache->length += count;
  return 0;
}
