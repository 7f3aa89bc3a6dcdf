// A step of a small decoder with every operation: tokens together and one by one, on every instruction set, in memory
// of exactly the size that was asked for. Included by native.cpp.
#pragma once
#include "../step.h"

namespace {

constexpr int64_t hidden = 52, inner = 77, words = 43, head_dim = 16, positions = 12;
constexpr int32_t q_heads = 4, kv_heads = 2, step_layers = 2;
enum { HIDDEN, NORMED, BRANCH, Q, K, V, MIXED, GATED, UP, LOGITS, BUFFERS };

struct Decoder {
  std::vector<Weight> weights;
  std::vector<float> table, gains, angles, bias;
  std::vector<rarefy_op> ops;
  std::vector<int64_t> widths{hidden, hidden, hidden, q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim,
                              q_heads * head_dim, inner, inner, words};
  rarefy_program program{};

  Decoder() : table(size_t(words * hidden)), gains(64), angles(head_dim / 2), bias(size_t(words)) {
    for (std::vector<float> *all : {&table, &gains, &angles, &bias})
      for (float &value : *all) value = draw_float();
    weights.reserve(64);
    rarefy_op op = make(RAREFY_EMBED, 0, HIDDEN);
    op.data = table.data(), op.type = RAREFY_F32, op.rows = words, op.columns = hidden;
    ops.push_back(op);
    for (int32_t layer = 0; layer < step_layers; ++layer) {
      norm(HIDDEN, NORMED, 1);
      // What stands together has its terms together.
      size_t first = weights.size();
      for (int32_t out : {Q, K, V}) project(NORMED, out);
      together.push_back({ops.size() - 3, first, 3});
      norm(Q, Q, q_heads);
      for (int32_t x : {Q, K}) {
        op = make(RAREFY_ROTATE, x, 0);
        op.heads = x == Q ? q_heads : kv_heads, op.data = angles.data();
        ops.push_back(op);
      }
      op = make(RAREFY_ATTEND, Q, MIXED);
      op.y = K, op.z = V, op.layer = layer, op.scale = 0.25f, op.window = layer ? 3 : 0, op.softcap = layer ? 2.f : 0.f;
      ops.push_back(op);
      project(MIXED, BRANCH);
      together.push_back({ops.size() - 1, weights.size() - 1, 1});
      add();
      norm(HIDDEN, NORMED, 1);
      first = weights.size();
      for (int32_t out : {GATED, UP}) project(NORMED, out);
      together.push_back({ops.size() - 2, first, 2});
      op = make(RAREFY_GATE, GATED, GATED);
      op.y = UP, op.activation = layer ? RAREFY_GELU_TANH : RAREFY_SILU;
      ops.push_back(op);
      project(GATED, BRANCH);
      together.push_back({ops.size() - 1, weights.size() - 1, 1});
      add();
    }
    program.head = int32_t(ops.size());
    norm(HIDDEN, NORMED, 1);
    op = make(RAREFY_PROJECT, NORMED, LOGITS);
    op.rows = words, op.columns = hidden, op.data = table.data(), op.type = RAREFY_F32, op.bias = bias.data();
    ops.push_back(op);
    op = make(RAREFY_CAP, LOGITS, 0);
    op.softcap = 30;
    ops.push_back(op);
    for (const Weight &weight : weights) terms.push_back(weight.term);
    for (const Together &group : together)
      for (size_t i = 0; i < group.count; ++i) ops[group.op + i].first = &terms[group.weight + i];
    program.ops = ops.data(), program.widths = widths.data(), program.count = int32_t(ops.size());
    program.buffers = BUFFERS, program.logits = LOGITS, program.layers = step_layers, program.heads = q_heads;
    program.kv_heads = kv_heads, program.head_dim = head_dim, program.vocabulary = words;
  }

  // Logits of all tokens, put through in pieces.
  std::vector<float> run(const std::vector<int64_t> &tokens, int64_t piece, int32_t mode, int32_t type) const {
    size_t size = size_t(step_layers * kv_heads * positions * head_dim * (type == RAREFY_F32 ? 4 : 2));
    std::vector<char> keys(size), values(size);
    rarefy_cache cache{keys.data(), values.data(), type, positions, 0};
    std::vector<float> logits(tokens.size() * size_t(words));
    char message[256] = "";
    for (size_t at = 0; at < tokens.size(); at += size_t(piece)) {
      int64_t count = std::min<int64_t>(piece, int64_t(tokens.size() - at));
      int64_t bytes = rarefy_step_bytes(&program, count, cache.length + count, mode);
      void *memory = std::aligned_alloc(64, size_t(bytes));
      expect(rarefy_step(&program, &cache, &tokens[at], count, mode, 1, &logits[at * size_t(words)], memory, bytes,
                         message, sizeof message) == 0, message, long(at));
      expect(rarefy_step(&program, &cache, &tokens[at], count, mode, 1, logits.data(), memory, bytes - 64, message,
                         sizeof message) == -1, "too little memory is refused", bytes);
      std::free(memory);
    }
    return logits;
  }

 private:
  struct Together {
    size_t op, weight, count;
  };
  std::vector<Together> together;
  std::vector<rarefy_term> terms;

  static rarefy_op make(int32_t kind, int32_t x, int32_t out) {
    rarefy_op op{};
    op.kind = kind, op.x = x, op.out = out, op.scale = 1, op.heads = 1;
    return op;
  }
  void norm(int32_t x, int32_t out, int32_t heads) {
    rarefy_op op = make(RAREFY_NORM, x, out);
    op.heads = heads, op.eps = 1e-5f, op.data = gains.data();
    ops.push_back(op);
  }
  void add() {
    rarefy_op op = make(RAREFY_ADD, HIDDEN, 0);
    op.y = BRANCH;
    ops.push_back(op);
  }
  void project(int32_t x, int32_t out) {
    rarefy_op op = make(RAREFY_PROJECT, x, out);
    op.rows = widths[size_t(out)], op.columns = widths[size_t(x)], op.terms = 1;
    weights.emplace_back(op.rows, op.columns, 4, 16);
    for (float &scale : weights.back().scales) scale *= 0.05f;
    ops.push_back(op);
  }
};

double apart(const std::vector<float> &a, const std::vector<float> &b) {
  double most = 0, reach = 1e-9;
  for (size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, std::fabs(double(a[i]) - b[i]));
    reach = std::max(reach, std::fabs(double(b[i])));
  }
  return most / reach;
}

void steps() {
  Decoder decoder;
  char message[256] = "";
  expect(rarefy_step_check(&decoder.program, message, sizeof message) == 0, message, 0);
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < positions; ++i) tokens.push_back(int64_t(draw() >> 8) % words);
  rarefy_select("scalar");
  std::vector<float> wanted = decoder.run(tokens, 1, RAREFY_EXACT, RAREFY_F32);
  for (const char *name : {"scalar", "avx2", "avx512"}) {
    if (rarefy_select(name) != 0) continue;
    for (int64_t piece : {int64_t(1), int64_t(3), int64_t(5), positions}) {
      expect(apart(decoder.run(tokens, piece, RAREFY_EXACT, RAREFY_F32), wanted) < 1e-4, "exact steps agree", piece);
      expect(apart(decoder.run(tokens, piece, RAREFY_EXACT, RAREFY_F16), wanted) < 2e-2, "a half cache is close", piece);
      expect(apart(decoder.run(tokens, piece, RAREFY_FAST, RAREFY_F32), wanted) < 0.3, "fast steps are near", piece);
    }
  }
}

}  // namespace
