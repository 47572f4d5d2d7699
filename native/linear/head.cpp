// The output head: logits, of which only the k largest and the log of the sum of exponentials leave.
#include <algorithm>
#include <cmath>
#include <limits>

#include "layers/backend.h"
#include "linear/head.h"

namespace farthing {
namespace {

// Inserts into a list of k, best first.
inline void insert(Best* list, int k, Best b) {
  if (!(b > list[k - 1])) return;
  int i = k - 1;
  for (; i > 0 && b > list[i - 1]; --i) list[i] = list[i - 1];
  list[i] = b;
}

// z becomes cap tanh(z / cap).
void soft_cap(const Kernels& kernels, float* z, int n, float cap) {
  float out[kColumns];
  std::fill_n(out, n, 2.0f * cap);
  for (int i = 0; i < n; ++i) z[i] *= 2.0f / cap;
  kernels.gate(out, z, n, false);
  for (int i = 0; i < n; ++i) z[i] = out[i] - cap;
}

void reduce_chunk(const Kernels& kernels, const float* logits, int n, int64_t first, int k, Best* best,
                  float* max, float* sum) {
  kernels.exp_sum(logits, n, max, sum);
  if (!all_finite(logits, n)) *sum = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(best, k, Best{});
  if (k == 1) {
    const int i = static_cast<int>(std::find(logits, logits + n, *max) - logits);
    best[0] = {*max, first + std::min(i, n - 1)};
    return;
  }
  for (int i = 0; i < n; ++i) insert(best, k, {logits[i], first + i});
}

// Scratch of one call.
struct Space {
  int chunks;
  Act x;                 // [T], or a row per thread for one token
  float *norms, *tiles;  // [threads][prepare_floats], [threads][T][kColumns]
  Best* best;            // [chunks][T][k]
  float *max, *sum;      // [chunks][T]

  Space(Workspace& work, const Kernels& kernels, const Matrix& w, int tokens, int k, int threads) {
    const size_t each = threads, T = tokens;
    chunks = (w.panels + kChunk - 1) / kChunk;
    x = work.act(w, std::max(tokens, threads), kernels.act_split(), w.sparse);
    norms = work.take<float>(each * prepare_floats(w));
    tiles = work.take<float>(each * T * kColumns);
    best = work.take<Best>(chunks * T * k);
    max = work.take<float>(chunks * T);
    sum = work.take<float>(chunks * T);
  }
};

}  // namespace

void Sizes::top_logits(const Matrix& head, int tokens, int k) {
  work.reset();
  Space(work, kernels, head, tokens, k, threads);
}

void Backend::top_logits(const Packed& packed, Rows x, int tokens, const float* norm, float eps, float cap,
                         int k, float* values, int64_t* ids, float* logsumexp) {
  const Matrix& w = packed.m;
  work_.reset();
  const Space space(work_, kernels, w, tokens, k, pool.size());
  enum Phase { kPrepare, kReduce };
  pool.run([&](Team& team) {
    const Act act = prepare(team, kPrepare, w, space.x, x, tokens, norm, eps, space.norms);
    float* tile = space.tiles + static_cast<size_t>(team.id()) * tokens * kColumns;
    team.for_units(kReduce, 1, space.chunks, [&](int, int c) {
      const int count = std::min(kChunk, w.panels - c * kChunk), n = std::min(kColumns, w.n - c * kColumns);
      kernels.tile(w, c * kChunk, count, act, tokens, tile, kColumns);
      for (int t = 0; t < tokens; ++t) {
        const size_t at = static_cast<size_t>(c) * tokens + t;
        if (cap != 0.0f) soft_cap(kernels, tile + t * kColumns, n, cap);
        reduce_chunk(kernels, tile + t * kColumns, n, static_cast<int64_t>(c) * kColumns, k,
                     space.best + at * k, space.max + at, space.sum + at);
      }
    });
  });
  for (int t = 0; t < tokens; ++t) {
    float top = space.max[t];
    for (int c = 1; c < space.chunks; ++c) top = std::max(top, space.max[c * tokens + t]);
    double total = 0.0;
    std::vector<Best> list(k);
    for (int c = 0; c < space.chunks; ++c) {
      const size_t at = static_cast<size_t>(c) * tokens + t;
      total += static_cast<double>(space.sum[at]) * std::exp(static_cast<double>(space.max[at] - top));
      for (int i = 0; i < k; ++i) insert(list.data(), k, space.best[at * k + i]);
    }
    if (!std::isfinite(top) || !std::isfinite(total))
      throw NotFinite("logits are NaN or infinite: the weights are broken, or the model overflows");
    for (int i = 0; i < k; ++i) values[t * k + i] = list[i].value, ids[t * k + i] = list[i].id;
    logsumexp[t] = top + static_cast<float>(std::log(total));
  }
}

}  // namespace farthing
