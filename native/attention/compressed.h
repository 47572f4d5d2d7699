// Attention to a window and a compressed past (DeepSeek-V4, section 2.3).
//
// Legend: T tokens; H query heads of size d, of which the last r are rotated; Hi index heads of size di.
#pragma once
#include <vector>

#include "cache/latent_cache.h"
#include "pack/matrix.h"

namespace farthing {

struct Attention;
struct Indexer;

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
  const Attention* attention;     // over the rows that a token reads, as a cache of blocks of one
  const Indexer* index;           // which selects among entries, or null
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

// What the layers of one rate keep, from the first of them on.
struct Past {
  Cache own;                  // the window's tokens
  Cache entries[kMostPools];  // of each pool
  float* open;                // [slots][open_tokens][open_columns]: position p in row p % open_tokens
  int64_t layer_open;         // elements, from a layer's to the next one's
  int64_t own_total;          // slots of `own`, after which those of entries follow in memory

  Past row(int i) const {
    return {own.row(i), {entries[0].row(i), entries[1].row(i)}, open + i * layer_open, layer_open, own_total};
  }
};

struct PastBatch {
  Batch batch;               // with the block table of entries, whose blocks hold `entry_size` of them
  const int32_t* slots;      // [sequences] of `open`
  const int64_t* own_slots;  // [T]
  const int32_t* own_table;  // [sequences][own_blocks]
  int own_blocks;
};

struct CompressedArgs {
  Rows q;        // [T, H d], normed and rotated in place
  Rows x;        // [T, …]: the key, values and gates of each pool, weights of index heads
  Rows index_q;  // [T, Hi di], rotated in place; or null
  int tokens;
  Past past;
  PastBatch batch;
  Rows out;  // [T, H d]
};

// Memory of selections that stays from call to call.
struct Selected {
  std::vector<int32_t> entries;               // [T][top_k], ascending, then -1
  std::vector<int32_t> last, sequences;       // [T]: the last entry that a token sees, and whose it is
  std::vector<int32_t> rows, counts, starts;  // [T][most] rows of the cache, how many, 0 … T
};

}  // namespace farthing
