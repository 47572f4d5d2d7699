// The lightning indexer: which cached tokens a query attends to (DeepSeek-V3.2-Exp, section 2.1).
#pragma once
#include "layers/backend.h"

namespace farthing {

struct Indexer {
  int heads, dim, rope, top_k;
  float eps;  // of the keys' LayerNorm
  bool interleaved;
  const float *norm, *bias;  // [dim]
  const float *cos, *sin;    // [max_len, rope / 2]
};

struct IndexBatch {
  const int32_t* positions;    // [T]
  const int64_t* slots;        // [T] where each token's key goes
  const int32_t* sequences;    // [T] row of the block table
  const int32_t* block_table;  // [B][max_blocks]
  int max_blocks;
};

// The k positions of the largest scores, ascending, then -1; of equal scores the earlier one. NaN and minus
// infinity are never chosen. `keys` and `near` are scratch of n each.
void top_positions(const float* scores, int n, int k, uint32_t* keys, uint32_t* near, int32_t* out);

}  // namespace farthing
