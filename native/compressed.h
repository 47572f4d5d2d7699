// Attention to a window and a compressed past, and hyper-connections (DeepSeek-V4, sections 2.2 and 2.3).
//
// Legend: T tokens; H query heads of size d, of which the last r are rotated; Hi index heads of size di;
// n streams of D columns.
#pragma once
#include <vector>

#include "latent_cache.h"
#include "matrix.h"

namespace farthing {

constexpr int kMostPools = 2;  // of attention, and of its indexer

// How tokens become an entry: values times the softmax, per column, of gates + bias; then a norm.
struct EntryPool {
  int dim;            // of an entry; an overlapped pool has twice the columns
  const float* bias;  // [rate][columns]
  const float* norm;  // [dim]
};

struct Compressed {
  int heads, dim, rope, index_heads, index_dim;
  int window;       // tokens up to its own that one sees
  int rate;         // tokens that become an entry; 0: there are none
  bool overlapped;  // entries pool the first half of the columns of the tokens before those, too
  float eps;
  const float *norm, *cos, *sin;  // [d] of keys, [max_len][r / 2]
  std::vector<float> ones;        // [d], the weight of the queries' norm
  std::vector<EntryPool> pools;

  int columns(const EntryPool& pool) const { return overlapped ? 2 * pool.dim : pool.dim; }
  int open_tokens() const { return overlapped ? 2 * rate : rate; }
  int open_columns() const {
    int sum = 0;
    for (const EntryPool& pool : pools) sum += 2 * columns(pool);
    return sum;
  }
  void check() const;  // throws std::invalid_argument
};

struct CompressedArgs {
  Rows q;        // [T, H d], normed and rotated in place
  Rows x;        // [T, …]: the key, values and gates of each pool
  Rows index_q;  // [T, Hi di], rotated in place; or null
  int tokens;
  Cache own;                  // the window's tokens
  Cache entries[kMostPools];  // of each pool
  float* open;                // [slots][open_tokens][open_columns]: position p in row p % open_tokens
  const int32_t* slots;       // [sequences] of `open`
  Batch batch;                // with the block table of entries, whose blocks hold `entry_size` of them
  const int64_t* own_slots;   // [T]
  const int32_t* own_table;   // [sequences][own_blocks]
  int own_blocks;
  int64_t own_total;  // slots of `own`, after which those of entries follow in memory
};

// The cache rows that each token reads, and how many: its entries, or those at select [T][selected], then its
// window. Rows of entries are numbered after those of `own`. slots [T][most], counts [T].
void compressed_reads(const Compressed& w, const CompressedArgs& in, const int32_t* select, int selected,
                      int32_t* slots, int most, int32_t* counts);

// Hyper-connections: how the coefficients of a token follow from a product with its streams.
struct Streams {
  int count, hidden;  // n, D
  int steps;          // of the normalization
  float eps;
  bool ends;  // streams are summed a last time: nothing is added to them
  const float *base, *scale;
};

}  // namespace farthing
