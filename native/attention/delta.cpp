// Gated DeltaNet as one op. A unit is one value head of one sequence, or those of one key head where units
// are enough, whose tokens pass through its state in order, kDeltaSteps at a time, so that the state is read
// and written once for each of those.
//
// Legend: see delta.h.
#include "attention/delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "layers/backend.h"

namespace farthing {
namespace {

constexpr float kNormEps = 1e-6f;  // of the L2 norm of queries and keys
constexpr int kMostWidth = 8;
constexpr int kTailParts = 8;  // units of a sequence's tail
constexpr int kUnitsEach = 4;  // of heads, of a thread: more become units of several heads

// Scratch of one thread.
struct Space {
  float *q, *k, *v, *out;  // [kDeltaSteps][dk] or [dv]
  float *q_norm, *k_norm;  // [dk] of all threads: weights that make an RMSNorm an L2 norm, with the scale

  Space(Workspace& work, const Delta& w, int threads) {
    const size_t each = static_cast<size_t>(threads) * kDeltaSteps;
    q = work.take<float>(each * w.key_dim);
    k = work.take<float>(each * w.key_dim);
    v = work.take<float>(each * w.value_dim);
    out = work.take<float>(each * w.value_dim);
    q_norm = work.take<float>(w.key_dim);
    k_norm = work.take<float>(w.key_dim);
  }

  void fill(const Delta& w) const {
    const float root = std::sqrt(static_cast<float>(w.key_dim));
    std::fill_n(k_norm, w.key_dim, 1.0f / root);
    std::fill_n(q_norm, w.key_dim, 1.0f / static_cast<float>(w.key_dim));
  }

  Space of(const Delta& w, int thread) const {
    const size_t at = static_cast<size_t>(thread) * kDeltaSteps;
    Space s = *this;
    s.q += at * w.key_dim, s.k += at * w.key_dim, s.v += at * w.value_dim, s.out += at * w.value_dim;
    return s;
  }
};

class Call {
 public:
  Call(const Kernels& kernels, const Delta& w, const DeltaArgs& in, const Space& space)
      : kernels_(kernels), w_(w), in_(in), space_(space) {}

  enum Phase { kAdvance, kKeepTail };

  void run(Team& team) const {
    const Space mine = space_.of(w_, team.id());
    // Value heads of one key head share its queries and keys.
    const int sharing = w_.value_heads / w_.key_heads,
              together = in_.batch.sequences * w_.key_heads >= kUnitsEach * team.size() ? sharing : 1;
    team.for_units(kAdvance, in_.batch.sequences, w_.value_heads / together,
                   [&](int b, int unit) { advance(b, unit * together, together, mine); });
    team.barrier();  // every head of a key head reads the tail of its queries and keys
    const int step = (w_.channels() + kTailParts - 1) / kTailParts;
    team.for_units(kKeepTail, in_.batch.sequences, kTailParts, [&](int b, int part) {
      const int at = part * step;
      if (at < w_.channels()) keep_tail(b, at, std::min(step, w_.channels() - at));
    });
  }

 private:
  void advance(int b, int head, int heads, const Space& s) const {
    const int first = in_.batch.query_start[b], last = in_.batch.query_start[b + 1];
    for (int i = head; i < head + heads; ++i) begin(b, i, first < last && in_.batch.positions[first] == 0);
    for (int t = first; t < last; t += kDeltaSteps) {
      const int count = std::min(kDeltaSteps, last - t);
      take_keys(b, head / (w_.value_heads / w_.key_heads), t, count, s);
      for (int i = head; i < head + heads; ++i) steps(b, i, t, count, s);
    }
  }

  float* state(int slot, int head) const {
    return in_.state.data + (static_cast<size_t>(slot) * w_.value_heads + head) * w_.key_dim * w_.value_dim;
  }

  // A state from which the sequence's tokens go on.
  void begin(int b, int head, bool fresh) const {
    const size_t size = static_cast<size_t>(w_.key_dim) * w_.value_dim;
    float* to = state(in_.state.slots[b], head);
    if (fresh) std::fill_n(to, size, 0.0f);
    else if (forked(b)) std::memcpy(to, state(in_.state.sources[b], head), sizeof(float) * size);
  }

  void take_keys(int b, int key, int t, int count, const Space& s) const {
    const int dk = w_.key_dim, keys = w_.key_heads * dk;
    for (int i = 0; i < count; ++i) {
      convolve(b, t + i, key * dk, dk, s.q + i * dk);
      convolve(b, t + i, keys + key * dk, dk, s.k + i * dk);
      kernels_.rms_norm(s.q + i * dk, space_.q_norm, kNormEps / dk, dk, s.q + i * dk);
      kernels_.rms_norm(s.k + i * dk, space_.k_norm, kNormEps / dk, dk, s.k + i * dk);
    }
  }

  void steps(int b, int head, int t, int count, const Space& s) const {
    const int dk = w_.key_dim, dv = w_.value_dim, value = 2 * w_.key_heads * dk + head * dv;
    float decay[kDeltaSteps], beta[kDeltaSteps];
    for (int i = 0; i < count; ++i) {
      convolve(b, t + i, value, dv, s.v + i * dv);
      const float* gates = in_.gates.row(t + i);
      beta[i] = 1.0f / (1.0f + std::exp(-gates[head]));
      decay[i] = std::exp(w_.rate[head] * softplus(gates[w_.value_heads + head] + w_.shift[head]));
    }
    kernels_.delta({state(in_.state.slots[b], head), dk, dv, count, s.q, s.k, s.v, decay, beta, s.out});
    for (int i = 0; i < count; ++i) {
      float* to = in_.out.row(t + i) + head * dv;
      kernels_.rms_norm(s.out + i * dv, w_.norm, in_.eps, dv, to);
      kernels_.gate(to, in_.x.row(t + i) + w_.channels() + head * dv, dv, true);
    }
  }

  static float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

  // SiLU of the convolution's channels [at, at + n) for token t of sequence b.
  void convolve(int b, int t, int at, int n, float* out) const {
    const int first = in_.batch.query_start[b], position = in_.batch.positions[t];
    const float *rows[kMostWidth], *weights[kMostWidth];
    int count = 0;
    for (int back = std::min(w_.width - 1, position); back >= 0; --back) {  // zeros before the first token
      const float* row =
          t - back >= first ? in_.x.row(t - back) : tail(in_.state.sources[b], position - back);
      rows[count] = row + at;
      weights[count++] = w_.conv + static_cast<size_t>(w_.width - 1 - back) * w_.channels() + at;
    }
    kernels_.convolve(rows, weights, count, n, out);
  }

  bool forked(int b) const { return in_.state.sources[b] != in_.state.slots[b]; }

  float* tail(int slot, int position) const {
    const int64_t row = static_cast<int64_t>(slot) * (w_.width - 1) + position % (w_.width - 1);
    return in_.state.tail + row * w_.channels();
  }

  void keep_tail(int b, int at, int n) const {
    const int first = in_.batch.query_start[b], last = in_.batch.query_start[b + 1], rows = w_.width - 1;
    const int slot = in_.state.slots[b];
    for (int p = 0; p < rows && forked(b); ++p)
      std::memcpy(tail(slot, p) + at, tail(in_.state.sources[b], p) + at, sizeof(float) * n);
    for (int t = std::max(first, last - rows); t < last; ++t)
      std::memcpy(tail(slot, in_.batch.positions[t]) + at, in_.x.row(t) + at, sizeof(float) * n);
  }

  const Kernels& kernels_;
  const Delta& w_;
  const DeltaArgs& in_;
  const Space& space_;
};

}  // namespace

void Delta::check() const {
  if (key_heads < 1 || value_heads < 1 || value_heads % key_heads || key_dim < 1 || value_dim < 1)
    throw std::invalid_argument("key heads do not divide the value heads");
  if (width < 2 || width > kMostWidth)
    throw std::invalid_argument("the convolution is over " + std::to_string(width) +
                                " tokens; expected 2 to " + std::to_string(kMostWidth));
}

void Backend::delta(const Delta& w, const DeltaArgs& in) {
  work_.reset();
  const Space space(work_, w, pool.size());
  space.fill(w);
  const Call call(kernels, w, in, space);
  pool.run([&](Team& team) { call.run(team); });
}

}  // namespace farthing
