// Hyper-connections in one pass per half of a layer, and the layers that they connect. See streams.h.
#include "layers/streams.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "layers/backend.h"

namespace farthing {
namespace {

constexpr int kTogether = 16;  // tokens of a unit

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The mixing matrix m [n][n], made doubly stochastic: columns first, then rows and columns in turn.
void balance(float* m, int n, int steps, float eps) {
  for (int i = 0; i < n; ++i) {
    const float top = *std::max_element(m + i * n, m + (i + 1) * n);
    float sum = 0.0f;
    for (int j = 0; j < n; ++j) sum += m[i * n + j] = std::exp(m[i * n + j] - top);
    for (int j = 0; j < n; ++j) m[i * n + j] = m[i * n + j] / sum + eps;
  }
  for (int step = 0; step < 2 * steps - 1; ++step) {
    const int along = step % 2 ? 1 : n, across = step % 2 ? n : 1;  // a column's elements are n apart
    for (int i = 0; i < n; ++i) {
      float sum = eps;
      for (int j = 0; j < n; ++j) sum += m[i * across + j * along];
      for (int j = 0; j < n; ++j) m[i * across + j * along] /= sum;
    }
  }
}

// In an order of its own, so that it does not depend on the compiler: n is a multiple of 8.
float square_sum(const float* x, int n) {
  float sums[8] = {};
  for (int i = 0; i < n; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] += x[i + j] * x[i + j];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// One call.
class Connection {
  enum Phase { kMix, kCollapse };

 public:
  Connection(const Kernels& kernels, const Streams& s, const StreamsArgs& in, Workspace& work, int threads)
      : kernels_(kernels),
        s_(s),
        in_(in),
        n_(s.count),
        ld_(act_stride(n_ * s.columns)),
        rows_(s.panels() * kPanel) {
    const auto T = static_cast<size_t>(in.tokens);
    inputs_ = work.take<float>(static_cast<size_t>(threads) * ld_);
    acts_ = work.act(s.product->m, threads * kTogether, kernels.act_split(), false);
    parts_ = work.take<float>(T * s.units() * rows_);
    squares_ = work.take<float>(T * s.units());
  }

  void run(Team& team) const {
    const int blocks = (in_.tokens + kTogether - 1) / kTogether;
    float* input = inputs_ + static_cast<size_t>(team.id()) * ld_;
    const Act act = row(acts_, team.id() * kTogether);
    team.for_units(kMix, blocks, s_.units(), [&](int block, int unit) { mix(block, unit, input, act); });
    if (!in_.out.at) return;
    team.barrier();
    team.for_units(kCollapse, in_.tokens, s_.units(), [&](int t, int unit) { collapse(t, unit); });
  }

 private:
  int begin(int unit) const { return unit * s_.columns; }
  int columns(int unit) const { return std::min(s_.columns, s_.hidden - begin(unit)); }

  // Some columns of all streams: y is added, and their part of the product is taken.
  void mix(int block, int unit, float* input, const Act& act) const {
    const Matrix& m = s_.product->m;
    const int first = block * kTogether, some = std::min(kTogether, in_.tokens - first),
              count = columns(unit);
    for (int i = 0; i < some; ++i) {
      std::fill_n(input, ld_, 0.0f);
      for (int j = 0; j < n_; ++j) stream(first + i, j, unit, input + j * s_.columns);
      if (in_.y.at)
        for (int j = 0; j < n_; ++j)
          std::memcpy(part(first + i, j, unit), input + j * s_.columns, sizeof(float) * count);
      if (!in_.out.at) continue;
      squares_[static_cast<size_t>(first + i) * s_.units() + unit] = square_sum(input, ld_);
      kernels_.store_act(m, act, i, 0, input, m.k);
    }
    if (in_.out.at)
      kernels_.tile(m, unit * s_.panels(), s_.panels(), act, some,
                    parts_ + (static_cast<size_t>(unit) * in_.tokens + first) * rows_, rows_);
  }

  float* part(int t, int stream, int unit) const {
    return in_.x.row(t) + static_cast<int64_t>(stream) * s_.hidden + begin(unit);
  }

  // The new columns of a stream.
  void stream(int t, int j, int unit, float* to) const {
    const int count = columns(unit);
    if (!in_.y.at) {
      std::memcpy(to, part(t, j, unit), sizeof(float) * count);
      return;
    }
    const float* own = in_.mix.row(t);
    kernels_.axpy(to, in_.y.row(t) + begin(unit), own[j], count);
    for (int i = 0; i < n_; ++i) kernels_.axpy(to, part(t, i, unit), own[n_ + i * n_ + j], count);
  }

  // The coefficient `i` of a token, times what divides it.
  float found(int t, int i, float inverse) const {
    float sum = 0.0f;
    for (int unit = 0; unit < s_.units(); ++unit)
      sum += parts_[(static_cast<size_t>(unit) * in_.tokens + t) * rows_ + i];
    return sum * inverse;
  }

  void collapse(int t, int unit) const {
    float squares = 0.0f;
    for (int i = 0; i < s_.units(); ++i) squares += squares_[static_cast<size_t>(t) * s_.units() + i];
    const float mean = squares / (static_cast<float>(n_) * static_cast<float>(s_.hidden));
    const float inverse = 1.0f / std::sqrt(mean + s_.norm_eps);
    float* to = in_.out.row(t) + begin(unit);
    std::fill_n(to, columns(unit), 0.0f);
    for (int i = 0; i < n_; ++i)
      kernels_.axpy(to, part(t, i, unit), sigmoid(found(t, i, inverse) * s_.scale[0] + s_.base[i]) + s_.eps,
                    columns(unit));
    if (unit || s_.ends) return;
    float* own = in_.mix.row(t);
    for (int i = 0; i < n_; ++i)
      own[i] = 2.0f * sigmoid(found(t, n_ + i, inverse) * s_.scale[1] + s_.base[n_ + i]);
    for (int i = 0; i < n_ * n_; ++i)
      own[n_ + i] = found(t, 2 * n_ + i, inverse) * s_.scale[2] + s_.base[2 * n_ + i];
    balance(own + n_, n_, s_.steps, s_.eps);
  }

  const Kernels& kernels_;
  const Streams& s_;
  const StreamsArgs& in_;
  const int n_, ld_, rows_;
  float* inputs_;   // [threads][ld]
  Act acts_;        // [threads][kTogether]
  float* parts_;    // [units][T][rows]
  float* squares_;  // [T][units]
};

}  // namespace

void Streams::check() const {
  if (count < 1 || hidden < 1 || columns < 1 || !product)
    throw std::invalid_argument("sizes of streams do not fit together");
  const Matrix& m = product->m;
  if (m.quantized() || m.k != count * columns || m.n != units() * panels() * kPanel)
    throw std::invalid_argument("a product with streams is not of their size");
}

void Backend::streams(const Streams& s, const StreamsArgs& in) {
  work_.reset();
  const Connection call(kernels, s, in, work_, pool.size());
  pool.run([&](Team& team) { call.run(team); });
}

void Backend::layers(StreamedLayers& model, const StreamedArgs& in) {
  const Rows none{nullptr, 0};
  const int T = in.tokens;
  if (in.first < 0 || in.first >= in.last || in.last > static_cast<int>(model.layers.size()))
    throw std::out_of_range("layers " + std::to_string(in.first) + " to " + std::to_string(in.last) + " of " +
                            std::to_string(model.layers.size()));
  const Streams& s = *model.layers[in.first].attention_streams;
  const bool ends = model.ends && in.last == static_cast<int>(model.layers.size());
  const Rows x = ends ? Layers::rows(model.x, T, s.count * s.hidden) : in.out;
  for (int t = 0; t < T; ++t) std::memcpy(x.row(t), in.x.row(t), sizeof(float) * s.count * s.hidden);
  const Rows u = Layers::rows(model.u, T, s.hidden), y = Layers::rows(model.y, T, s.hidden),
             mix = Layers::rows(model.mix, T, s.mixed());
  int64_t* counts = in.counts;
  for (int i = in.first; i < in.last; ++i) {
    const StreamedLayer& l = model.layers[i];
    streams(*l.attention_streams, {x, i == in.first ? none : y, mix, T, u});
    attend(model, l, in, u, y);
    if (l.o_sum) l.o_sum->add(y, T, s.hidden);
    streams(*l.feed_streams, {x, y, mix, T, u});
    const int k = l.feed->router.top_k;
    model.chosen.resize(l.chosen ? static_cast<size_t>(T) * k : 0);
    for (int t = 0; l.chosen && t < T; ++t) {
      if (in.ids[t] < 0 || in.ids[t] >= in.vocabulary)
        throw std::out_of_range("token id " + std::to_string(in.ids[t]) + " is not in the vocabulary of " +
                                std::to_string(in.vocabulary));
      std::copy_n(l.chosen + in.ids[t] * k, k, model.chosen.data() + static_cast<size_t>(t) * k);
    }
    moe(*l.feed,
        {u, T, l.feed_norm, in.eps, y, counts, l.chosen ? model.chosen.data() : nullptr, nullptr, false});
    if (l.feed_sum) l.feed_sum->add(y, T, s.hidden);
    if (counts) counts += in.counts_stride;
  }
  streams(ends ? *model.ends : s, {x, y, mix, T, ends ? in.out : none});
}

void Backend::attend(StreamedLayers& model, const StreamedLayer& l, const StreamedArgs& in, Rows u, Rows y) {
  const Rows none{nullptr, 0};
  const int T = in.tokens, latent = l.q->m.k;
  const Rows first = Layers::rows(model.first, T, l.first->rows());
  linear(*l.first, {u, T, l.norm, in.eps, none, first});
  const Rows q = Layers::rows(model.q, T, l.q->m.n);
  linear(*l.q, {first, T, l.q_norm, in.eps, none, q});
  Rows index_q = none;
  if (l.index_q) {
    index_q = Layers::rows(model.index_q, T, l.index_q->m.n);
    linear(*l.index_q, {first, T, l.q_norm, in.eps, none, index_q});
  }
  const Rows heads = Layers::rows(model.heads, T, l.q->m.n);
  compressed(
      *l.heads,
      {q, {first.at + latent, first.stride}, index_q, T, in.pasts[l.past].row(l.row), in.batch, heads});
  const Rows groups = Layers::rows(model.latent, T, l.o_b->m.inputs());
  Rows from = heads, to = groups;
  for (const auto& o : l.o_a) {
    linear(*o, {from, T, nullptr, 0.0f, none, to});
    from.at += o->m.inputs(), to.at += o->m.n;
  }
  linear(*l.o_b, {groups, T, nullptr, 0.0f, none, y});
}

}  // namespace farthing
