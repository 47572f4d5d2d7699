// The ops: what farthing.ops.api defines, over packed weights, raw rows and one pool of threads.
//
// Legend: T tokens; D hidden size; E routed experts; I expert width; c latent; r rotary size; H heads.
#pragma once
#include <memory>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "shared_sum.h"
#include "threads.h"

namespace farthing {

// Grow-only memory an op cuts its scratch from; one op runs at a time.
class Workspace {
 public:
  ~Workspace();
  void reset() { used_ = 0; }
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(raw(count * sizeof(T)));
  }
  Act act(const Matrix& w, int rows, bool split, bool sparse);

 private:
  void* raw(size_t bytes);
  struct Chunk {
    uint8_t* at;
    size_t size;
  };
  std::vector<Chunk> chunks_;
  size_t used_ = 0, chunk_ = 0;
};

struct Router {  // see farthing.ops.api.RouterSpec
  int experts = 0, top_k = 0, groups = 1, top_k_groups = 1;
  bool sigmoid = true, top2_sum = true, normalize = true;
  float scale = 1.0f;
  float mass = -1.0f;  // adaptive when not negative
  int min_experts = 2;
  std::vector<float> bias;
};

struct Mlp {                        // both null: an expert of another rank
  std::shared_ptr<Packed> gate_up;  // interleaved panels, [2 I, D]
  std::shared_ptr<Packed> down;     // [D, I]
};

struct Moe {
  Router router;
  std::shared_ptr<Packed> gate;  // null: no router, the shared MLP alone
  std::vector<Mlp> experts;
  bool has_shared = false;  // then the last of `experts`
  int hidden = 0;
};

struct Attention {
  int heads = 0, nope = 0, rope = 0, value = 0, latent = 0;
  float scale = 1.0f;
  bool interleaved = true;
  std::vector<std::shared_ptr<Packed>> w_uk;  // a head: [c, n]
  std::vector<std::shared_ptr<Packed>> w_uv;  // a head: [v, c]
  const float* norm = nullptr;                // [c]
  const float* cos = nullptr;                 // [max_len, r / 2]
  const float* sin = nullptr;
};

enum class CacheType : int { f32 = 0, bf16 = 1, fp8 = 2, int8 = 3 };

struct Cache {  // one layer of the latent cache
  CacheType type;
  uint8_t* data;  // [blocks * block_size][c + r]
  float* scale;   // [blocks * block_size][2] or null
  int block_size;
  int64_t layer_bytes = 0, layer_scales = 0;  // from a layer's data and scales to the next one's
};

struct Batch {
  const int32_t* positions;
  const int64_t* slots;
  const int32_t* query_start;
  const int32_t* context_lens;
  const int32_t* block_table;
  int sequences, max_blocks;
  const int32_t* visible = nullptr;  // cached tokens that each token attends to; null: its position + 1

  int keys(int token) const { return visible ? visible[token] : positions[token] + 1; }
};

struct Layer {  // one layer's weights; attention and feed belong to whoever made the layer
  const float *norm, *q_norm, *feed_norm;
  std::shared_ptr<Packed> qkv_a, q_b, o;  // q_b null: the query comes whole from qkv_a
  const Attention* attention;
  const Moe* feed;
  int q_width;  // columns of qkv_a's output that are the query, or its latent
  std::shared_ptr<SharedSum> o_sum,
      feed_sum;  // over the ranks that share attention, and the feed; null: this one alone
};

struct Layers {
  std::vector<Layer> layers;
  std::vector<float> qkv, q, heads, hidden;  // what an op leaves for the next
  static Rows rows(std::vector<float>& memory, int tokens, int width);
};

struct Indexer;
struct IndexBatch;

class Backend {
 public:
  Backend(int threads, const char* isa, const std::string& topology, bool pin);

  void rms_norm(Rows x, int tokens, int k, const float* weight, float eps, Rows out);
  void linear(const Packed& w, Rows x, int tokens, const float* norm, float eps, Rows residual, Rows out);
  void moe(const Moe& w, Rows x, int tokens, const float* norm, float eps, int64_t* counts, Rows out,
           const int64_t* chosen = nullptr, const float* chosen_weights = nullptr, bool residual = true);
  void route(const Moe& w, Rows n, int tokens, int64_t* ids, float* weights);
  void mla(const Attention& w, Rows q, Rows kv, int tokens, const Cache& cache, const Batch& batch, float eps,
           Rows out);
  // See indexer.h: q [T, H d], k [T, d], w [T, H] -> out [T, top_k], or null: the keys are cached, no more.
  void index(const Indexer& s, Rows q, Rows k, Rows w, int tokens, const Cache& cache,
             const IndexBatch& batch, int32_t* out);
  // h [T, D] through every layer; counts [layer][E] or null; out is not x.
  void layers(Layers& model, Rows x, int tokens, const Cache& cache, const Batch& batch, float eps,
              int64_t* counts, int64_t counts_stride, Rows out);
  void top_logits(const Packed& head, Rows x, int tokens, const float* norm, float eps, int k, float* values,
                  int64_t* ids, float* logsumexp);
  void softmax(Rows x, int rows, int n, Rows out);

  Pool pool;
  const Kernels& kernels;
  std::shared_ptr<Arena> arena;

 private:
  Act prepare(Team& team, int phase, const Matrix& w, const Act& act, Rows x, int tokens, const float* norm,
              float eps, float* scratch);
  Workspace work_;
};

// Rows `ids` of a table [rows][ld] of bfloat16 (half) or float32, to float32 [tokens][hidden]. Throws on an
// id that is none.
void embed(const uint8_t* table, bool half, int64_t ld, int64_t rows, const int64_t* ids, int tokens,
           int hidden, float* out);

// One token: scores [E] (before the activation) to k chosen experts and weights; skipped ones have id -1.
void choose_experts(const Router& r, float* scores, int32_t* ids, float* weights);

}  // namespace farthing
