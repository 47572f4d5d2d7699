// Gated DeltaNet (Yang et al. 2024): a causal convolution, and a state per head that every token decays,
// corrects and reads.
//
// Legend: T tokens; Hk key heads; Hv value heads, each Hv / Hk of which share a key head; dk, dv their sizes;
// C = 2 Hk dk + Hv dv channels of the convolution.
#pragma once
#include "cache/latent_cache.h"
#include "pack/matrix.h"

namespace farthing {

struct Delta {
  int key_heads, value_heads, key_dim, value_dim;
  int width;          // tokens under the convolution
  const float* conv;  // [width][C], the oldest token first
  const float* rate;  // [Hv] of decay: exp(rate softplus(a + shift))
  const float* shift;
  const float* norm;  // [dv] of the output

  int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  int values() const { return value_heads * value_dim; }
  void check() const;  // throws std::invalid_argument
};

// One layer's states. A slot belongs to a sequence.
struct DeltaState {
  float* data;  // [slots][Hv][dk][dv]
  float* tail;  // [slots][width - 1][C]: the convolution's input at position p is in row p % (width - 1)
  int64_t layer_data = 0, layer_tail = 0;  // from a layer's to the next one's
  const int32_t* slots = nullptr;          // [sequences], written
  const int32_t* sources = nullptr;        // [sequences], continued; another slot's is left as it is

  DeltaState row(int i) const {  // of the i-th layer after this one
    DeltaState found = *this;
    found.data += i * layer_data, found.tail += i * layer_tail;
    return found;
  }
};

struct DeltaArgs {
  Rows x;      // [T, C + Hv dv]: queries, keys, values, output gates
  Rows gates;  // [T, 2 Hv]: b and a
  int tokens;
  DeltaState state;
  Batch batch;
  float eps;
  Rows out;  // [T, Hv dv]
};

}  // namespace farthing
