// Hyper-connections, and all layers of DeepSeek-V4 in one call (sections 2.1 to 2.3 of its paper).
//
// Legend: T tokens; n streams of D columns; C of them that one unit of work takes.
#pragma once
#include <memory>
#include <vector>

#include "attention/compressed.h"
#include "pack/matrix.h"
#include "pack/pack.h"
#include "threads/shared_sum.h"

namespace farthing {

struct Moe;

// How a half of a layer reads the streams, and how its output is added to them while they mix. A token's
// coefficients follow from a product with all of its streams, divided by their root mean square.
struct Streams {
  int count, hidden;  // n, D
  int columns;        // C: the product's rows [unit][coefficients, padded to panels] have n C columns
  int steps;          // of the normalization of the mixing matrix
  float eps, norm_eps;
  bool ends;  // streams are summed a last time: nothing is added to them
  std::shared_ptr<Packed> product;
  const float *base, *scale;

  int units() const { return (hidden + columns - 1) / columns; }
  int coefficients() const { return ends ? count : count * (count + 2); }
  int panels() const { return (coefficients() + kPanel - 1) / kPanel; }  // of a unit
  int mixed() const { return count * (count + 1); }
  void check() const;  // throws std::invalid_argument
};

struct StreamsArgs {
  Rows x;  // [T, n D]; with y overwritten: stream j becomes mix[j] y and the sum of mix[n + i n + j] stream i
  Rows y;  // [T, D], or null
  Rows mix;  // [T, n (n + 1)] of y, then overwritten by those of the next output
  int tokens;
  Rows out;  // [T, D] the sum of the streams that the half reads, or null: y is added, no more
};

struct StreamedLayer {
  const Streams *attention_streams, *feed_streams;
  const float *norm, *q_norm, *feed_norm;
  std::shared_ptr<Packed> first, q, index_q;  // first: the queries' latent, and all that is kept of a token
  std::vector<std::shared_ptr<Packed>> o_a;   // of each group of heads
  std::shared_ptr<Packed> o_b;
  const Compressed* heads;
  const Moe* feed;
  const int64_t* chosen;                       // [vocabulary][k] experts, or null: the router chooses
  int past, row;                               // which of StreamedArgs::pasts, and which layer there
  std::shared_ptr<SharedSum> o_sum, feed_sum;  // as in Layer
};

struct StreamedLayers {
  std::vector<StreamedLayer> layers;
  std::vector<float> x, u, mix, first, q, index_q, heads, latent, y;  // passed from one op to the next
  std::vector<int64_t> chosen;
  const Streams* ends = nullptr;  // after the last layer; null: another stage has it
};

struct StreamedArgs {
  Rows x;  // [T, n D]
  int tokens;
  int first, last;     // the layers first .. last - 1
  const int64_t* ids;  // [T]
  int64_t vocabulary;
  std::vector<Past> pasts;
  PastBatch batch;
  float eps;
  int64_t* counts;  // as in LayersArgs
  int64_t counts_stride;
  Rows out;  // [T, D] after the last of all layers; else [T, n D]
};

}  // namespace farthing
