// Everything around the scores of attention to a compressed past: what is kept of tokens, the entries that
// they become, and which rows of the cache a token reads. Scores and sums are those of mla.cpp.
//
// Legend: see compressed.h.
#include "compressed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "backend.h"
#include "cache_rows.h"

namespace farthing {
namespace {

// A window of tokens that the step completes: an entry of a sequence.
struct Closed {
  int sequence, entry;
};

class Preparation {
 public:
  Preparation(const Kernels& kernels, const Compressed& w, const CompressedArgs& in, float* scratch, int row)
      : kernels_(kernels), w_(w), in_(in), scratch_(scratch), row_(row) {
    for (int b = 0; w.rate && b < in.batch.sequences; ++b) {
      const int last = in.batch.context_lens[b],
                first = last - (in.batch.query_start[b + 1] - in.batch.query_start[b]);
      for (int e = first / w.rate; e < last / w.rate; ++e) closed_.push_back({b, e});
    }
  }

  void run(Team& team) const {
    const int heads = w_.heads + 1 + (in_.index_q.at ? w_.index_heads : 0);
    float* scratch = scratch_ + static_cast<size_t>(team.id()) * row_;
    team.for_units(0, in_.tokens, heads, [&](int t, int h) {
      if (h < w_.heads) return query(t, h);
      if (h == w_.heads) return key(t, scratch);
      turn(in_.index_q.row(t) + static_cast<int64_t>(h - w_.heads - 1) * w_.index_dim, w_.index_dim,
           in_.batch.positions[t]);
    });
    if (!w_.rate) return;
    team.for_units(1, static_cast<int>(closed_.size()), static_cast<int>(w_.pools.size()),
                   [&](int i, int pool) { make_entry(closed_[i], pool, scratch); });
    team.barrier();  // entries read what is kept before it is overwritten
    team.for_units(2, 1, in_.batch.sequences, [&](int, int b) { keep(b); });
  }

 private:
  void query(int t, int h) const {
    float* row = in_.q.row(t) + static_cast<int64_t>(h) * w_.dim;
    kernels_.rms_norm(row, w_.ones.data(), w_.eps, w_.dim, row);
    turn(row, w_.dim, in_.batch.positions[t]);
  }

  void key(int t, float* row) const {
    kernels_.rms_norm(in_.x.row(t), w_.norm, w_.eps, w_.dim, row);
    turn(row, w_.dim, in_.batch.positions[t]);
    store(in_.own, in_.own_slots[t], row, w_.dim);
  }

  // The last elements of a row, rotated by the angle of a position.
  void turn(float* row, int dim, int position) const {
    const int64_t at = static_cast<int64_t>(position) * (w_.rope / 2);
    float* last = row + dim - w_.rope;
    rotate_row(last, w_.rope, w_.cos + at, w_.sin + at, true, 1.0f, last);
  }

  void store(const Cache& cache, int64_t slot, const float* row, int dim) const {
    write_row(kernels_, cache.type, cache.data, static_cast<size_t>(slot) * dim, row, dim, nullptr);
  }

  // The pooled columns of a sequence's token: in the step, or kept of earlier ones.
  const float* pooled(int sequence, int position) const {
    const int last = in_.batch.query_start[sequence + 1], length = in_.batch.context_lens[sequence];
    const int t = last - (length - position);
    if (t >= in_.batch.query_start[sequence]) return in_.x.row(t) + w_.dim;
    return kept(sequence, position);
  }

  float* kept(int sequence, int position) const {
    const int64_t row =
        static_cast<int64_t>(in_.slots[sequence]) * w_.open_tokens() + position % w_.open_tokens();
    return in_.open + row * w_.open_columns();
  }

  // Softmax, column by column, of the gates of all tokens of a window, and the values' sum: one pass with a
  // running maximum, because columns are next to each other in memory and tokens are not.
  void make_entry(const Closed& c, int number, float* scratch) const {
    const EntryPool& pool = w_.pools[number];
    const int columns = w_.columns(pool), first = c.entry * w_.rate;
    int offset = 0;
    for (int i = 0; i < number; ++i) offset += 2 * w_.columns(w_.pools[i]);
    float *sum = scratch, *top = sum + pool.dim, *weight = top + pool.dim;
    std::fill_n(sum, pool.dim, 0.0f);
    std::fill_n(weight, pool.dim, 0.0f);
    std::fill_n(top, pool.dim, -INFINITY);
    const int begin = w_.overlapped ? std::max(0, first - w_.rate) : first;
    for (int p = begin; p < first + w_.rate; ++p) {
      const int at = w_.overlapped && p >= first ? pool.dim : 0;  // the half of the columns
      const float *values = pooled(c.sequence, p) + offset + at, *gates = values + columns;
      const float* bias = pool.bias + static_cast<size_t>(p % w_.rate) * columns + at;
      for (int i = 0; i < pool.dim; ++i) {
        const float gate = gates[i] + bias[i], best = std::max(top[i], gate);
        const float shrink = std::exp(top[i] - best), grown = std::exp(gate - best);
        sum[i] = sum[i] * shrink + values[i] * grown;
        weight[i] = weight[i] * shrink + grown;
        top[i] = best;
      }
    }
    for (int i = 0; i < pool.dim; ++i) sum[i] /= weight[i];
    kernels_.rms_norm(sum, pool.norm, w_.eps, pool.dim, sum);
    turn(sum, pool.dim, first);
    const Cache& to = in_.entries[number];
    const int64_t block =
        in_.batch
            .block_table[static_cast<int64_t>(c.sequence) * in_.batch.max_blocks + c.entry / to.block_size];
    store(to, block * to.block_size + c.entry % to.block_size, sum, pool.dim);
  }

  void keep(int b) const {
    const int begin = in_.batch.query_start[b], end = in_.batch.query_start[b + 1];
    for (int t = std::max(begin, end - w_.open_tokens()); t < end; ++t)
      std::memcpy(kept(b, in_.batch.positions[t]), in_.x.row(t) + w_.dim, sizeof(float) * w_.open_columns());
  }

  const Kernels& kernels_;
  const Compressed& w_;
  const CompressedArgs& in_;
  float* scratch_;  // [threads][row]
  int row_;
  std::vector<Closed> closed_;
};

int scratch_row(const Compressed& w) {
  int most = w.dim;
  for (const EntryPool& pool : w.pools) most = std::max(most, 3 * pool.dim);
  return most;
}

}  // namespace

void Compressed::check() const {
  if (heads < 1 || dim < 2 || rope < 2 || rope % 2 || rope > dim || window < 1 || rate < 0)
    throw std::invalid_argument("sizes of a compressed past do not fit together");
  if (pools.size() > kMostPools || (rate > 0) != !pools.empty())
    throw std::invalid_argument("a compressed past has one pool, or two with an indexer");
}

void Backend::prepare_compressed(const Compressed& w, const CompressedArgs& in) {
  work_.reset();
  const int row = round_up(scratch_row(w), 16);
  float* scratch = work_.take<float>(static_cast<size_t>(pool.size()) * row);
  const Preparation call(kernels, w, in, scratch, row);
  pool.run([&](Team& team) { call.run(team); });
}

void compressed_reads(const Compressed& w, const CompressedArgs& in, const int32_t* select, int selected,
                      int32_t* slots, int most, int32_t* counts) {
  const Cache& past = in.entries[0];
  for (int b = 0; b < in.batch.sequences; ++b)
    for (int t = in.batch.query_start[b]; t < in.batch.query_start[b + 1]; ++t) {
      const int position = in.batch.positions[t];
      int32_t* to = slots + static_cast<int64_t>(t) * most;
      int count = 0;
      const auto entry = [&](int e) {
        const int64_t block =
            in.batch.block_table[static_cast<int64_t>(b) * in.batch.max_blocks + e / past.block_size];
        to[count++] = static_cast<int32_t>(in.own_total + block * past.block_size + e % past.block_size);
      };
      if (select)
        for (int i = 0; i < selected && select[static_cast<int64_t>(t) * selected + i] >= 0; ++i)
          entry(select[static_cast<int64_t>(t) * selected + i]);
      else if (w.rate)
        for (int e = 0; e < (position + 1) / w.rate; ++e) entry(e);
      for (int p = std::max(0, position - w.window + 1); p <= position; ++p) {
        const int64_t block = in.own_table[static_cast<int64_t>(b) * in.own_blocks + p / in.own.block_size];
        to[count++] = static_cast<int32_t>(block * in.own.block_size + p % in.own.block_size);
      }
      counts[t] = count;
      std::fill(to + count, to + most, to[count - 1]);
    }
}

void Backend::turn_back(const Compressed& w, const int32_t* positions, Rows out, int tokens) {
  pool.run([&](Team& team) {
    team.for_units(0, tokens, w.heads, [&](int t, int h) {
      float* last = out.row(t) + static_cast<int64_t>(h + 1) * w.dim - w.rope;
      const int64_t at = static_cast<int64_t>(positions[t]) * (w.rope / 2);
      const float *cos = w.cos + at, *sin = w.sin + at;
      for (int i = 0; i < w.rope / 2; ++i) {
        const float a = last[2 * i], b = last[2 * i + 1];
        last[2 * i] = a * cos[i] + b * sin[i];
        last[2 * i + 1] = b * cos[i] - a * sin[i];
      }
    });
  });
}

// Hyper-connections.

namespace {

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

constexpr int kStreamColumns = 512;  // of a unit

}  // namespace

void Backend::collapse(const Streams& s, Rows x, Rows found, int tokens, Rows out, Rows mix) {
  const int n = s.count, units = (s.hidden + kStreamColumns - 1) / kStreamColumns;
  pool.run([&](Team& team) {
    team.for_units(0, tokens, units, [&](int t, int unit) {
      const float* f = found.row(t);
      const int at = unit * kStreamColumns, columns = std::min(kStreamColumns, s.hidden - at);
      float* to = out.row(t) + at;
      std::fill_n(to, columns, 0.0f);
      for (int i = 0; i < n; ++i)
        kernels.axpy(to, x.row(t) + static_cast<int64_t>(i) * s.hidden + at,
                     sigmoid(f[i] * s.scale[0] + s.base[i]) + s.eps, columns);
      if (unit || s.ends) return;
      float* own = mix.row(t);
      for (int i = 0; i < n; ++i) own[i] = 2.0f * sigmoid(f[n + i] * s.scale[1] + s.base[n + i]);
      for (int i = 0; i < n * n; ++i) own[n + i] = f[2 * n + i] * s.scale[2] + s.base[2 * n + i];
      balance(own + n, n, s.steps, s.eps);
    });
  });
}

void Backend::spread(int n, int hidden, Rows x, Rows y, Rows mix, int tokens, Rows out) {
  const int units = (hidden + kStreamColumns - 1) / kStreamColumns;
  pool.run([&](Team& team) {
    team.for_units(0, tokens, units, [&](int t, int unit) {
      const int at = unit * kStreamColumns, columns = std::min(kStreamColumns, hidden - at);
      const float* own = mix.row(t);
      for (int j = 0; j < n; ++j) {
        float* to = out.row(t) + static_cast<int64_t>(j) * hidden + at;
        std::fill_n(to, columns, 0.0f);
        kernels.axpy(to, y.row(t) + at, own[j], columns);
        for (int i = 0; i < n; ++i)
          kernels.axpy(to, x.row(t) + static_cast<int64_t>(i) * hidden + at, own[n + i * n + j], columns);
      }
    });
  });
}

}  // namespace farthing
