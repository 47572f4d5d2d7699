// Attention to a compressed past as one op: what is kept of tokens, the entries that they become, and which
// rows of the cache a token reads. Scores and sums are those of mla.cpp, those of entries of indexer.cpp.
//
// Legend: see compressed.h.
#include "attention/compressed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "attention/indexer.h"
#include "cache/cache_rows.h"
#include "layers/backend.h"

namespace farthing {
namespace {

constexpr int kTogether = 32;                      // tokens that attend at once, which bounds partial sums
constexpr int64_t kMostScores = int64_t{1} << 22;  // of entries, in memory at once

// A window of tokens that the step completes: an entry of a sequence.
struct Closed {
  int sequence, entry;
};

class Preparation {
 public:
  Preparation(const Kernels& kernels, const Compressed& w, const CompressedArgs& in, float* scratch, int row)
      : kernels_(kernels), w_(w), in_(in), batch_(in.batch.batch), scratch_(scratch), row_(row) {
    for (int b = 0; w.rate && b < batch_.sequences; ++b) {
      const int last = batch_.context_lens[b],
                first = last - (batch_.query_start[b + 1] - batch_.query_start[b]);
      for (int e = first / w.rate; e < last / w.rate; ++e) closed_.push_back({b, e});
    }
  }

  enum Phase { kRotate, kMakeEntries, kKeepOpen };

  void run(Team& team) const {
    const int heads = w_.heads + 1 + (in_.index_q.at ? w_.index_heads : 0);
    float* scratch = scratch_ + static_cast<size_t>(team.id()) * row_;
    team.for_units(kRotate, in_.tokens, heads, [&](int t, int h) {
      if (h < w_.heads) return query(t, h);
      if (h == w_.heads) return key(t, scratch);
      turn(in_.index_q.row(t) + static_cast<int64_t>(h - w_.heads - 1) * w_.index_dim, w_.index_dim,
           batch_.positions[t]);
    });
    if (!w_.rate) return;
    team.for_units(kMakeEntries, static_cast<int>(closed_.size()), static_cast<int>(w_.pools.size()),
                   [&](int i, int pool) { make_entry(closed_[i], pool, scratch); });
    team.barrier();  // entries read what is kept before it is overwritten
    team.for_units(kKeepOpen, 1, batch_.sequences, [&](int, int b) { keep(b); });
  }

 private:
  void query(int t, int h) const {
    float* row = in_.q.row(t) + static_cast<int64_t>(h) * w_.dim;
    kernels_.rms_norm(row, w_.ones.data(), w_.eps, w_.dim, row);
    turn(row, w_.dim, batch_.positions[t]);
  }

  void key(int t, float* row) const {
    kernels_.rms_norm(in_.x.row(t), w_.norm, w_.eps, w_.dim, row);
    turn(row, w_.dim, batch_.positions[t]);
    store(in_.past.own, in_.batch.own_slots[t], row, w_.dim, 2);
  }

  // The last elements of a row, rotated by the angle of a position.
  void turn(float* row, int dim, int position) const {
    const int64_t at = static_cast<int64_t>(position) * (w_.rope / 2);
    float* last = row + dim - w_.rope;
    rotate_row(last, w_.rope, w_.cos + at, w_.sin + at, true, 1.0f, last);
  }

  // scales: of a slot in an 8-bit cache, of which the first is the row's.
  void store(const Cache& cache, int64_t slot, const float* row, int dim, int scales) const {
    write_row(kernels_, cache.type, cache.data, static_cast<size_t>(slot) * dim, row, dim,
              cache.scale ? cache.scale + slot * scales : nullptr);
  }

  // The pooled columns of a sequence's token: in the step, or kept of earlier ones.
  const float* pooled(int sequence, int position) const {
    const int last = batch_.query_start[sequence + 1], length = batch_.context_lens[sequence];
    const int t = last - (length - position);
    if (t >= batch_.query_start[sequence]) return in_.x.row(t) + w_.dim;
    return kept(sequence, position);
  }

  float* kept(int sequence, int position) const {
    const int64_t row =
        static_cast<int64_t>(in_.batch.slots[sequence]) * w_.open_tokens() + position % w_.open_tokens();
    return in_.past.open + row * w_.open_columns();
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
    const Cache& to = in_.past.entries[number];
    const int64_t block =
        batch_.block_table[static_cast<int64_t>(c.sequence) * batch_.max_blocks + c.entry / to.block_size];
    store(to, block * to.block_size + c.entry % to.block_size, sum, pool.dim, number ? 1 : 2);
  }

  void keep(int b) const {
    const int begin = batch_.query_start[b], end = batch_.query_start[b + 1];
    for (int t = std::max(begin, end - w_.open_tokens()); t < end; ++t)
      std::memcpy(kept(b, batch_.positions[t]), in_.x.row(t) + w_.dim, sizeof(float) * w_.open_columns());
  }

  const Kernels& kernels_;
  const Compressed& w_;
  const CompressedArgs& in_;
  const Batch& batch_;
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

namespace {

// The last entry that each token sees, and its sequence: what selection reads as positions.
void look_back(const Compressed& w, const Batch& batch, Selected& s) {
  s.last.clear(), s.sequences.clear();
  for (int b = 0; b < batch.sequences; ++b)
    for (int t = batch.query_start[b]; t < batch.query_start[b + 1]; ++t) {
      s.last.push_back((batch.positions[t] + 1) / w.rate - 1);
      s.sequences.push_back(b);
    }
}

// The cache rows that each token reads, and how many: its entries, all or the selected ones, then its window.
// Rows of entries are numbered after those of the window. Returns the most rows of a token.
int find_rows(const Compressed& w, const CompressedArgs& in, int longest, int selected, Selected& s) {
  const Batch& batch = in.batch.batch;
  const Cache &own = in.past.own, &past = in.past.entries[0];
  const int seen = w.rate ? longest / w.rate : 0,
            most = std::min(w.window, longest) + (selected ? selected : seen);
  s.rows.resize(static_cast<size_t>(in.tokens) * most);
  s.counts.resize(in.tokens);
  s.starts.resize(in.tokens + 1);
  for (int t = 0; t <= in.tokens; ++t) s.starts[t] = t;
  for (int b = 0; b < batch.sequences; ++b)
    for (int t = batch.query_start[b]; t < batch.query_start[b + 1]; ++t) {
      const int position = batch.positions[t];
      const int32_t *table = batch.block_table + static_cast<int64_t>(b) * batch.max_blocks,
                    *own_table = in.batch.own_table + static_cast<int64_t>(b) * in.batch.own_blocks;
      int32_t* to = s.rows.data() + static_cast<int64_t>(t) * most;
      int count = 0;
      const auto entry = [&](int e) {
        const int64_t at = static_cast<int64_t>(table[e / past.block_size]) * past.block_size;
        to[count++] = static_cast<int32_t>(in.past.own_total + at + e % past.block_size);
      };
      if (selected) {
        const int32_t* chosen = s.entries.data() + static_cast<int64_t>(t) * selected;
        for (int i = 0; i < selected && chosen[i] >= 0; ++i) entry(chosen[i]);
      } else if (w.rate) {
        for (int e = 0; e < (position + 1) / w.rate; ++e) entry(e);
      }
      for (int p = std::max(0, position - w.window + 1); p <= position; ++p) {
        const int64_t at = static_cast<int64_t>(own_table[p / own.block_size]) * own.block_size;
        to[count++] = static_cast<int32_t>(at + p % own.block_size);
      }
      s.counts[t] = count;
      std::fill(to + count, to + most, to[count - 1]);
    }
  return most;
}

// The last elements of each head, rotated back.
void turn_back(const Compressed& w, const int32_t* positions, Rows out, int t, int h) {
  float* last = out.row(t) + static_cast<int64_t>(h + 1) * w.dim - w.rope;
  const int64_t at = static_cast<int64_t>(positions[t]) * (w.rope / 2);
  const float *cos = w.cos + at, *sin = w.sin + at;
  for (int i = 0; i < w.rope / 2; ++i) {
    const float a = last[2 * i], b = last[2 * i + 1];
    last[2 * i] = a * cos[i] + b * sin[i];
    last[2 * i + 1] = b * cos[i] - a * sin[i];
  }
}

}  // namespace

void Backend::prepare_compressed(const Compressed& w, const CompressedArgs& in) {
  work_.reset();
  const int row = round_up(scratch_row(w), 16);
  float* scratch = work_.take<float>(static_cast<size_t>(pool.size()) * row);
  const Preparation call(kernels, w, in, scratch, row);
  pool.run([&](Team& team) { call.run(team); });
}

int Backend::select_entries(const Compressed& w, const CompressedArgs& in, int longest) {
  if (!w.index || longest / w.rate <= w.index->top_k) return 0;
  const Batch& batch = in.batch.batch;
  const int k = w.index->top_k, weights = in.tokens ? w.dim + w.open_columns() : 0;
  look_back(w, batch, selected_);
  selected_.entries.resize(static_cast<size_t>(in.tokens) * k);
  const int step = static_cast<int>(std::max(int64_t{1}, kMostScores / (longest / w.rate)));
  for (int t = 0; t < in.tokens; t += step) {
    const IndexBatch own{selected_.last.data() + t, nullptr, selected_.sequences.data() + t,
                         batch.block_table, batch.max_blocks};
    index(*w.index, {in.index_q.row(t), in.index_q.stride}, {nullptr, 0},
          {in.x.row(t) + weights, in.x.stride}, std::min(step, in.tokens - t), in.past.entries[1], own,
          selected_.entries.data() + static_cast<size_t>(t) * k);
  }
  return k;
}

void Backend::compressed(const Compressed& w, const CompressedArgs& in) {
  const Batch& batch = in.batch.batch;
  const int longest = *std::max_element(batch.context_lens, batch.context_lens + batch.sequences);
  prepare_compressed(w, in);
  const int chosen = select_entries(w, in, longest), most = find_rows(w, in, longest, chosen, selected_);
  Cache rows = in.past.own;
  rows.block_size = 1;
  for (int t = 0; t < in.tokens; t += kTogether) {
    const int some = std::min(kTogether, in.tokens - t);
    const int32_t* counts = selected_.counts.data() + t;
    const Batch each{batch.positions + t,
                     nullptr,
                     selected_.starts.data(),
                     counts,
                     selected_.rows.data() + static_cast<int64_t>(t) * most,
                     some,
                     most,
                     counts};
    mla(*w.attention,
        {{in.q.row(t), in.q.stride}, {nullptr, 0}, some, rows, each, w.eps, {in.out.row(t), in.out.stride}});
  }
  pool.run([&](Team& team) {
    team.for_units(kOnlyLoop, in.tokens, w.heads,
                   [&](int t, int h) { turn_back(w, batch.positions, in.out, t, h); });
  });
}

}  // namespace farthing
