// The ops of farthing.ops.api on packed weights, raw rows and one thread pool.
//
// Legend: T tokens; D hidden size; E routed experts; I expert width; c latent; r rotary size; H heads.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "attention/compressed.h"
#include "attention/delta.h"
#include "cache/latent_cache.h"
#include "isa/kernels.h"
#include "layers/streams.h"
#include "pack/pack.h"
#include "threads/shared_sum.h"
#include "threads/threads.h"
#include "threads/workspace.h"

namespace farthing {

constexpr int kMostExperts = 1024;  // of a router, so that a token's scores fit on the stack

struct Router {  // see farthing.ops.api.RouterSpec
  int experts = 0, top_k = 0, groups = 1, top_k_groups = 1;
  int identities = 0;  // the last of `experts`, which have no weights: their output is the normed input
  enum class Scoring { sigmoid, softmax, sqrt_softplus } scoring = Scoring::sigmoid;
  bool top2_sum = true, normalize = true;
  float scale = 1.0f;
  float mass = -1.0f;  // adaptive when not negative
  int min_experts = 2;
  std::vector<float> bias;
  std::vector<float> logit_bias;    // added before the activation; empty: none
  std::vector<float> expert_scale;  // of the chosen experts' final weights; empty: none

  void check() const;  // throws on sizes that choose_experts would not survive
};

struct Mlp {                        // both null: an expert of another rank, or an identity
  std::shared_ptr<Packed> gate_up;  // interleaved panels, [2 I, D]
  std::shared_ptr<Packed> down;     // [D, I]
  std::vector<float> in_bias;       // of the rows of gate_up, or empty
  std::vector<float> out_bias;      // [D] padded to whole panels, or empty
};

// Logits that are NaN or infinite.
struct NotFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kMostParts = 2;

struct Moe {
  Router router;
  std::shared_ptr<Packed> gate;  // [E, D], or [E + 1, D]; null: no router, the shared MLP alone
  bool has_shared = false;       // then the last of the experts
  int parts = 1;                 // of each expert: ranges of its width whose outputs are summed apart
  bool shared_gate = false;      // the last row of `gate`, whose sigmoid scales the shared expert's output
  int hidden = 0;
  Gate activation;
  std::vector<Mlp> experts;  // [expert][part]

  void check_gate() const;  // these throw std::invalid_argument on matrices that do not fit together
  // The next part, with a bias of each row of gate_up (null: none), and of down's.
  void add(std::shared_ptr<Packed> gate_up, std::shared_ptr<Packed> down, const float* in_bias,
           const float* out_bias);
  int routed() const { return gate ? router.experts : 0; }
  int weighted() const { return routed() - router.identities; }  // routed experts that have weights
  int halves() const { return gate ? 2 : 1; }  // of the routed experts, which are summed apart
  const Mlp& expert(int e, int part = 0) const { return experts[static_cast<size_t>(e) * parts + part]; }
  const Mlp* first(int part) const {  // of the routed experts that are on this rank, or null
    for (size_t i = part; i < experts.size(); i += parts)
      if (experts[i].down) return &experts[i];
    return nullptr;
  }
};

// Latent attention, or grouped-query attention: then each of `groups` key-value heads is a row of the cache
// whose latent is the value and whose rotary part is the whole key, and there are no W_UK and W_UV.
struct Attention {
  int heads = 0, nope = 0, rope = 0, value = 0, latent = 0;
  float scale = 1.0f;
  bool interleaved = true;
  std::vector<std::shared_ptr<Packed>> w_uk;  // a head: [c, n]
  std::vector<std::shared_ptr<Packed>> w_uv;  // a head: [v, c]
  const float* norm = nullptr;                // [c]
  const float* cos = nullptr;                 // [max_len, r / 2]
  const float* sin = nullptr;

  // Of grouped-query attention, whose queries, keys and values are changed in place before they are used:
  int groups = 1;                 // key-value heads; heads / groups queries share one
  int rotated = 0;                // leading elements of a query or key head that are rotated
  const float* bias = nullptr;    // [(H + 2 G) d] added to queries, keys and values, or null
  const float* q_norm = nullptr;  // [d] of each head, or [H d] of all heads together; or null
  const float* k_norm = nullptr;  // [d], or [G d]
  const float* v_norm = nullptr;  // [d] of each value, or null
  bool whole_norm = false;        // the norms are those of all heads together
  bool gated = false;             // H d further columns, and as many of bias, whose sigmoid scales the output
  int window = 0;                 // keys up to its own that a token sees; 0: all of them
  const float* sinks = nullptr;   // [H] a score of each head that has no value, or null
  FixedScales fixed = {};         // of values and keys
  // Queries come normed and rotated, and the cache is filled: a row's latent is key and value at once.
  bool prepared = false;

  // Whether a key is its value times k_norm but for the first rope / 2 elements of each half, which rotate:
  // only those are cached besides the value. Else rope == value, and keys are cached whole.
  bool shared() const { return rotated > 0 && rope < value; }
  // A query head of grouped attention, normed and rotated, as scores read it: `to` has zeros, and what is
  // for the rotary part of a key begins at `first`.
  void put_query(const float* row, float* to, int first) const {
    if (!shared()) {
      for (int i = 0; i < value; ++i) to[first + i] = row[i] * scale;
      return;
    }
    for (int i = 0; i < value; ++i)
      if (i % (value / 2) >= rope / 2) to[i] = row[i] * k_norm[i] * scale;
    for (int i = 0; i < rope; ++i) to[first + i] = row[turning(i)] * scale;
  }
  // The element of a head that is the i-th of those that rotate.
  int turning(int i) const { return i < rope / 2 ? i : value / 2 + i - rope / 2; }

  // The first of a token's keys that it sees.
  int first_key(int keys) const { return window ? std::max(0, keys - window) : 0; }
  // The sum of a head's weights, relative to the reference `max`, with the sink's.
  float with_sink(int head, float max, float sum) const {
    return sinks ? sum + std::exp(sinks[head] - max) : sum;
  }
  bool grouped() const { return rotated > 0 || prepared; }
  int per_group() const { return heads / groups; }
  int group(int head) const { return head / per_group(); }
  void check() const;  // throws std::invalid_argument unless every head has its matrices

  void add(std::shared_ptr<Packed> uk, std::shared_ptr<Packed> uv);  // the next head
  KeyShape shape() const {
    const int padded = round_up(latent, 32);
    return {latent, rope, padded, padded + round_up(rope, 32)};
  }
};

// What some layers have after attention and feed. See farthing.ops.api.LayerHandles.
struct Post {
  const float* attention = nullptr;  // [D] norm of attention's output, before it is added; or null
  const float* feed = nullptr;       // [D] norm of the feed's; or null, and then there is nothing below
  const Moe* beside = nullptr;       // an MLP whose normed output is added to the feed's; or null
  const float *input_norm = nullptr, *norm = nullptr, *feed_norm = nullptr;  // [D] of its input, its output
                                                                             // and the feed's
  float scale = 1.0f;                                                        // of the layer's output
};

struct Layer {  // one layer's weights; attention and feed are owned by the layer's creator
  const float *norm, *q_norm, *feed_norm;
  std::shared_ptr<Packed> qkv_a, q_b, o, o_rest;  // q_b null: the query comes whole from qkv_a
  const Attention* attention;
  const Moe* feed;
  int q_width;          // columns of qkv_a's output that are the query, or its latent
  float inner_eps;      // of the norms within attention
  const float* o_bias;  // [D], or null
  std::shared_ptr<SharedSum> o_sum,
      feed_sum;                  // over the ranks that share attention, and the feed; null: this one alone
  const Delta* delta = nullptr;  // instead of attention: then qkv_a computes queries, keys, values and gates
  std::shared_ptr<Packed> gates = nullptr;  // and this b and a
  Post post = {};
  int kind = 0;  // which of a call's caches and batches are its own
  int row = 0;   // its first row of that cache, or its state's among those of all layers
};

struct Layers {
  std::vector<Layer> layers;
  std::vector<float> qkv, q, gates, heads, biased, hidden, beside;  // passed from one op to the next
  std::vector<int> used;  // rows of each kind's cache, by the layers so far
  int states = 0;         // recurrent layers so far
  void add(Layer layer, int kind);
  static Rows rows(std::vector<float>& memory, int tokens, int width);
};

struct LinearArgs {
  Rows x;  // [T, K]
  int tokens;
  const float* norm;  // [K] or null: rows are normed first
  float eps;
  Rows residual;                 // [T, N], added to the product, or null
  Rows out;                      // [T, N]
  const Packed* rest = nullptr;  // the matrix's further columns, whose product is summed separately; or null
};

struct MoeArgs {
  Rows x;  // [T, D]
  int tokens;
  const float* norm;  // [D]
  float eps;
  Rows out;                               // [T, D]
  int64_t* counts = nullptr;              // [E], increased by the tokens of each expert; or null
  const int64_t* chosen = nullptr;        // [T, k] experts chosen by the caller, or null
  const float* chosen_weights = nullptr;  // [T, k]; null: the router's weights of them
  bool residual = true;                   // whether x is added
};

struct MlaArgs {
  Rows q;   // [T, H (n + r)], before rotation; overwritten if attention is grouped
  Rows kv;  // [T, c + r], before norm and rotation; grouped: keys [T, G d] and values [T, G d], overwritten,
            // and gates [T, H d]
  int tokens;
  Cache cache;
  Batch batch;
  float eps;
  Rows out;  // [T, H v]
};

struct LayersArgs {
  Rows x;  // [T, D]
  int tokens;
  int first, last;             // the layers first .. last - 1
  std::vector<Cache> caches;   // of each kind of layer, such as those with a window, from row 0 on
  std::vector<Batch> batches;  // … and where the tokens are there
  DeltaState state;            // of the model's first layer that has one
  float eps;
  int64_t* counts;  // [layer][E] from the first of them on, rows `counts_stride` apart; or null
  int64_t counts_stride;
  Rows out;  // [T, D], not x
};

struct Indexer;
struct IndexBatch;

constexpr int kExpandTokens = 192;  // tokens of a sequence in a step from which expanding its keys pays
// Tokens of a step from which matrices take activations in blocks, and rows that an expert must have on
// average.
constexpr int kTileTokens = 32, kTileExpertRows = 20;

// What an op takes from a workspace, without running it: the most of what its forms take. invariant: of those
// whose rounding does not depend on the size of a step. `rows`: rows of routed experts, all of which one rank
// may get; the weights' matrices need no data.
struct Sizes {
  const Kernels& kernels;
  int threads;
  CacheType cache;
  bool invariant = false;
  int input_terms = 1;  // see Matrix::act_terms
  bool blocks() const { return !invariant && input_terms == 1; }
  Workspace work{Workspace::Memory::none};

  void linear(const Matrix& w, const Matrix* further, int tokens);  // or null: columns packed apart
  void moe(const Moe& w, int tokens, int rows);
  void mla(const Attention& w, const Batch& batch);
  void index(const Indexer& s, int tokens, int keys);
  void top_logits(const Matrix& head, int tokens, int k);
  void greedy(const Matrix& head, int tokens);
};

class Backend {
 public:
  Backend(int threads, const char* isa, const std::string& topology, bool pin);

  void rms_norm(Rows x, int tokens, int k, const float* weight, float eps, Rows out);
  void linear(const Packed& w, const LinearArgs& in);
  void moe(const Moe& w, const MoeArgs& in);
  void route(const Moe& w, Rows n, int tokens, int64_t* ids, float* weights);
  void mla(const Attention& w, const MlaArgs& in);
  void delta(const Delta& w, const DeltaArgs& in);
  void compressed(const Compressed& w, const CompressedArgs& in);
  void streams(const Streams& s, const StreamsArgs& in);
  // See indexer.h: q [T, H d], k [T, d], w [T, H] -> out [T, top_k], or null: the keys are cached, no more.
  void index(const Indexer& s, Rows q, Rows k, Rows w, int tokens, const Cache& cache,
             const IndexBatch& batch, int32_t* out);
  void layers(Layers& model, const LayersArgs& in);
  void layers(StreamedLayers& model, const StreamedArgs& in);
  // cap, unless 0: logits z become cap tanh(z / cap).
  void top_logits(const Packed& head, Rows x, int tokens, const float* norm, float eps, float cap, int k,
                  float* values, int64_t* ids, float* logsumexp);
  // The id of the largest logit of each row, the lowest of equal ones. A head of planes is read in part.
  void greedy(const Packed& head, Rows x, int tokens, const float* norm, float eps, int64_t* ids);
  void softmax(Rows x, int rows, int n, Rows out);
  size_t workspace_bytes() const { return work_.most_used(); }  // of the largest op so far

  Pool pool;
  const Kernels& kernels;
  std::shared_ptr<Arena> arena;
  int expand_tokens = kExpandTokens;  // see expanded.h; 0: never
  int tile_tokens = kTileTokens;      // 0: never
  int input_terms = 1;                // of matrices of integers, from now on: see Matrix::act_terms

 private:
  // Norms and rotates queries and keys, and writes keys, entries and what later entries need.
  void prepare_compressed(const Compressed& w, const CompressedArgs& in);
  // Finds the entries that each token reads; returns how many at most, 0: all.
  int select_entries(const Compressed& w, const CompressedArgs& in, int longest);
  // The first half of a layer of streams: u [T, D] -> y [T, D].
  void attend(StreamedLayers& model, const StreamedLayer& l, const StreamedArgs& in, Rows u, Rows y);
  void product(const Packed& w, const LinearArgs& in);  // `linear` without `Packed::next`
  // y [T, D] = (x + norm(y)) scale, where y may first be the sum of two normed outputs.
  void add_normed(Rows x, int tokens, int hidden, const float* norm, float eps, float scale, Rows y,
                  const Post* both = nullptr, Rows beside = {nullptr, 0});
  void greedy_by_planes(const Packed& head, Rows x, int tokens, const float* norm, float eps, int64_t* ids);
  Act prepare(Team& team, int phase, const Matrix& w, const Act& act, Rows x, int tokens, const float* norm,
              float eps, float* scratch);
  Workspace work_;
  Selected selected_;
};

// Row `row` of a dense packed matrix, to float32 [k]. Throws std::invalid_argument if it has no such row.
void read_row(const Matrix& w, int row, float* out);

// Rows `ids` of a table [rows][ld] of bfloat16 (half) or float32, to float32 [tokens][hidden]. Throws on an
// id that is none.
void embed(const uint8_t* table, bool half, int64_t ld, int64_t rows, const int64_t* ids, int tokens,
           int hidden, float* out);

// One token: scores [E] (before the activation) to k chosen experts and weights; skipped ones have id -1.
void choose_experts(const Router& r, float* scores, int32_t* ids, float* weights);
// The weights of experts that were chosen otherwise, ids without an expert being the nearest with one.
void weigh_experts(const Router& r, float* scores, const int64_t* chosen, int32_t* ids, float* weights);

}  // namespace farthing
