// Every layer of a model in one call: between the ops nothing but memory that is already there.
#include <cstring>
#include <stdexcept>
#include <string>

#include "layers/backend.h"

namespace farthing {

namespace {
constexpr int kFewRows = 8;  // up to which one thread adds the outputs of attention and feed
}

Rows Layers::rows(std::vector<float>& memory, int tokens, int width) {
  const auto stride = static_cast<int64_t>(round_up(static_cast<size_t>(width), size_t{16}));
  if (memory.size() < static_cast<size_t>(tokens) * stride)
    memory.resize(static_cast<size_t>(tokens) * stride);
  return {memory.data(), stride};
}

void Backend::add_normed(Rows x, int tokens, int hidden, const float* norm, float eps, float scale, Rows y,
                         const Post* both, Rows beside) {
  const auto one = [&](int t) {
    float* to = y.row(t);
    if (both) {
      kernels.rms_norm(to, both->feed_norm, eps, hidden, to);
      kernels.rms_norm(beside.row(t), both->norm, eps, hidden, beside.row(t));
      kernels.add(to, beside.row(t), hidden);
    }
    kernels.rms_norm(to, norm, eps, hidden, to);
    kernels.blend(to, scale, x.row(t), scale, hidden);
  };
  if (tokens > kFewRows)
    return pool.run([&](Team& team) { team.for_units(kOnlyLoop, 1, tokens, [&](int, int t) { one(t); }); });
  for (int t = 0; t < tokens; ++t) one(t);
}

void Backend::layers(Layers& model, const LayersArgs& in) {
  const Rows none{nullptr, 0};
  const int T = in.tokens;
  Rows x = in.x;
  int64_t* counts = in.counts;
  if (in.first < 0 || in.first > in.last || in.last > static_cast<int>(model.layers.size()))
    throw std::out_of_range("layers " + std::to_string(in.first) + " to " + std::to_string(in.last) + " of " +
                            std::to_string(model.layers.size()));
  if (in.caches.size() != model.used.size() || in.batches.size() != model.used.size())
    throw std::invalid_argument(std::to_string(in.caches.size()) + " caches and " +
                                std::to_string(in.batches.size()) + " batches; expected " +
                                std::to_string(model.used.size()) + ", the kinds of layers");
  for (int i = in.first; i < in.last; ++i) {
    const Layer& l = model.layers[i];
    const int hidden = l.o->m.n;
    const Batch& batch = in.batches[l.kind];
    const Rows qkv = Layers::rows(model.qkv, T, l.qkv_a->rows());
    linear(*l.qkv_a, {x, T, l.norm, in.eps, none, qkv});
    const Rows heads = Layers::rows(model.heads, T, l.o->m.inputs() + (l.o_rest ? l.o_rest->m.inputs() : 0));
    if (l.delta) {
      const Rows gates = Layers::rows(model.gates, T, l.gates->m.n);
      linear(*l.gates, {x, T, l.norm, in.eps, none, gates});
      delta(*l.delta, {qkv, gates, T, in.state.row(l.row), batch, in.eps, heads});
    } else {
      Rows q = qkv;
      if (l.q_b) {
        q = Layers::rows(model.q, T, l.q_b->m.n);
        linear(*l.q_b, {qkv, T, l.q_norm, l.inner_eps, none, q});
      }
      const Cache cache = in.caches[l.kind].row(l.row);
      mla(*l.attention, {q, {qkv.at + l.q_width, qkv.stride}, T, cache, batch, l.inner_eps, heads});
    }
    if (l.o_bias) {
      const Rows biased = Layers::rows(model.biased, T, hidden);
      for (int t = 0; t < T; ++t)
        for (int k = 0; k < hidden; ++k) biased.row(t)[k] = x.row(t)[k] + l.o_bias[k];
      x = biased;
    }
    const Rows h = Layers::rows(model.hidden, T, hidden);
    // Over ranks, the residual, which they all have, is added to the sum.
    const Post& post = l.post;
    linear(*l.o, {heads, T, nullptr, in.eps, l.o_sum || post.attention ? none : x, h, l.o_rest.get()});
    if (l.o_sum) l.o_sum->add(h, T, hidden, post.attention ? none : x);
    if (post.attention) add_normed(x, T, hidden, post.attention, in.eps, 1.0f, h);
    moe(*l.feed, {h, T, l.feed_norm, in.eps, in.out, counts, nullptr, nullptr, !l.feed_sum && !post.feed});
    if (l.feed_sum) l.feed_sum->add(in.out, T, hidden, post.feed ? none : h);
    Rows beside = none;
    if (post.beside) {
      beside = Layers::rows(model.beside, T, hidden);
      moe(*post.beside, {h, T, post.input_norm, in.eps, beside, nullptr, nullptr, nullptr, false});
      if (l.o_sum) l.o_sum->add(beside, T, hidden);
    }
    if (post.feed)
      add_normed(h, T, hidden, post.feed, in.eps, post.scale, in.out, post.beside ? &post : nullptr, beside);
    x = in.out;
    if (counts) counts += in.counts_stride;
  }
}

void embed(const uint8_t* table, bool half, int64_t ld, int64_t rows, const int64_t* ids, int tokens,
           int hidden, float* out) {
  for (int t = 0; t < tokens; ++t, out += hidden) {
    if (ids[t] < 0 || ids[t] >= rows)
      throw std::out_of_range("token id " + std::to_string(ids[t]) + " is not in the vocabulary of " +
                              std::to_string(rows));
    const uint8_t* row = table + ids[t] * ld * (half ? 2 : 4);
    if (!half) {
      std::memcpy(out, row, sizeof(float) * hidden);
      continue;
    }
    for (int i = 0; i < hidden; ++i) {
      uint16_t value;
      std::memcpy(&value, row + 2 * i, 2);
      const uint32_t bits = static_cast<uint32_t>(value) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  }
}

}  // namespace farthing
