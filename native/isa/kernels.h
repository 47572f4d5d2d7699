// The table of inner kernels, one per instruction set, chosen once at run time.
#pragma once
#include "isa/prefetch.h"
#include "linear/cells.h"
#include "pack/matrix.h"
#include "pack/source.h"

namespace farthing {

// A query for keys of 8 bits. Its numbers follow as two bytes or pairs of two, in two arrays of [width] bytes
// that multiply the same keys.
struct ByteQuery {
  int32_t minus[2];  // of latents and rotary part: what the sums start at, to take an offset of keys out
  float scale[2];
  float unused[12];
  uint8_t bytes[];

  static size_t size(int width) { return sizeof(ByteQuery) + 2 * static_cast<size_t>(width); }
  const ByteQuery* row(int i, int width) const {
    return reinterpret_cast<const ByteQuery*>(reinterpret_cast<const uint8_t*>(this) + i * size(width));
  }
};
// Columns of a key of 8 bits that is attended to as cached; from the least on, queries take no more room than
// as floats.
constexpr int kLeastByteColumns = 128, kMostByteColumns = 2048;

// One block of online softmax attention: rows of queries against keys, both at most those of its BlockShape.
struct AttendBlock {
  const float* q;       // [rows][width], scaled
  const uint16_t* q16;  // bfloat16 [rows][width]; tiles: [rows / 16][width / 2][16][2], padded with zeros
  int rows;
  int width;   // padded to 32
  int latent;  // padded to 32
  int first;   // column from which queries are not zero: 0, or latent
  int keys;
  const float* k32;               // [keys][width] or null
  const uint16_t* const* rows16;  // or the address of each key, the last repeated up to BlockShape::keys,
                                  // then as many cached rows of the next block, to be prefetched
  int row_bytes;                  // of a cached row
  const ByteQuery* q_bytes;       // [rows], where rows16 has keys of 8 bits as cached …
  const float* key_scales;        // … and [2][kKeyBlock] the scales of their latents and rotary parts
  const int* visible;             // [rows] keys of this block each row may see …
  const int* hidden;              // [rows] … but for so many, the first ones; null: for none
  int skipped;                    // first keys of the block that no row sees: they are not read
  float* max;                     // [rows] reference of the weights: a score at most kSlack below the largest
  float* sum;                     // [rows] running sum
  float* out;                     // [rows][latent] running, not divided by sum; tiles: padded to 16 rows
  bool fresh;                     // nothing has been added to out yet, and it is not read
};
constexpr int kKeyBlock = 64, kTileRows = 16;
struct BlockShape {
  int rows = kTileRows, keys = kKeyBlock;
};
constexpr BlockShape kTileBlock = {64, 128};

enum class CacheType : int { f32 = 0, bf16 = 1, fp8 = 2, int8 = 3 };
inline int cell_bytes(CacheType t) { return t == CacheType::f32 ? 4 : t == CacheType::bf16 ? 2 : 1; }

// The layout of a key row in attention's arrays: latent, zeros, rotary, zeros.
struct KeyShape {
  int latent, rope;   // c, r
  int latent_padded;  // to 32
  int width;          // latent_padded + r padded to 32
};

// One token's index heads against keys in one contiguous array.
struct IndexBlock {
  const float* q32;     // [dim][heads], or null
  const uint16_t* q16;  // [dim / 2][heads][2] bfloat16, or null
  const float* w;       // [heads]
  int heads;            // padded to 16
  int dim;              // padded to 32
  const float* k32;     // [keys][dim], for q32
  const uint16_t* k16;  // [keys][dim], for q16
  int keys;
  float* out;  // [keys] sums over the heads of w ReLU(q . key)
};

constexpr int kDeltaSteps = 16;  // tokens of a head that pass through its state together

// Tokens through the state of one head of Gated DeltaNet (delta.h), in order.
struct DeltaHead {
  float* state;  // [key_dim][value_dim]
  int key_dim, value_dim;
  int steps;                  // at most kDeltaSteps
  const float *q, *k;         // [steps][key_dim], normed
  const float* v;             // [steps][value_dim]
  const float *decay, *beta;  // [steps]
  float* out;                 // [steps][value_dim]
};

// C [rows][ldc] = A [rows][lda] B [depth][columns], or C += A B. A has plain rows; B has rows of float, or of
// pairs of bfloat16: [depth / 2][columns][2].
struct Product {
  const void* a;
  int lda;
  const void* b;
  int columns;  // multiple of 16; row stride of b
  float* c;
  int ldc;
  int rows;   // multiple of kProductRows
  int depth;  // multiple of 32
  bool add;
};
constexpr int kProductRows = 16;

// Online softmax of a tile of expanded attention: scores of keys (rows) against kTileQueries queries.
constexpr int kTileQueries = 48, kWideBlock = 96;  // queries of a tile; keys that are expanded at once
constexpr float kUnseen = -1.0e25f;  // far below every score, and far above that of a hidden key
struct Scores {
  float* scores;       // [keys][kTileQueries], overwritten
  int keys;            // multiple of 32
  const int* visible;  // [kTileQueries] keys each query sees …
  const int* hidden;   // [kTileQueries] … but for so many, the first ones
  bool masked;         // whether a query sees fewer than `keys`
  float* max;          // [kTileQueries] reference of the weights, as in AttendBlock; at first kUnseen
  float* sum;          // [kTileQueries]
  float* out;          // [values][kTileQueries], rescaled if the reference moved
  int values;
  void* weights;  // [keys][kTileQueries] as the B of a product
};

// Inner loops of expanded attention for one element type: float, or bfloat16 with float sums.
struct Wide {
  void (*product)(const Product& p);
  // [depth][columns] floats to the B of a product; both are multiples of 32 and 16.
  void (*pack)(const float* in, int depth, int columns, void* out);
  void (*weigh)(const Scores& s);
};

// The gate of an MLP: (up + shift) g sigmoid(alpha g (1 + cubic g^2)) with g at most limit and up within it
// on both sides. Without changes SiLU; GELU's approximation by tanh is another.
struct Gate {
  float alpha = 1.0f, cubic = 0.0f, limit = __builtin_inff(), shift = 0.0f;
  bool silu() const { return alpha == 1.0f && cubic == 0.0f && limit == __builtin_inff() && shift == 0.0f; }
};

// The values that weights are rounded to, as multiples of a scale: integers in [low, high], or codes.
constexpr int kHalves = 256;
struct Levels {
  float low, high;
  const float* codes;  // [2 * kHalves] the nearest code of every half from -kHalves / 2 on; null: integers
};

constexpr int kSweepRows = 48, kSweepBlock = 64;  // rows of GPTQ's sweep side by side; columns of a block

// Columns of a block of the sweep (calibrate.h), after the feedback of earlier blocks.
struct SweepBlock {
  Levels levels;
  int columns;                 // at most kSweepBlock
  float* left;                 // [columns][kSweepRows], used up
  const float* const* own;     // [columns] of [kSweepRows]: before any feedback
  const float* const* scales;  // [columns] of [kSweepRows]
  const float* lower;          // lower[j * stride + i]: the share of column i's error that column j takes
  int stride;
  const float* pivots;   // [columns]
  float damping;         // what a squared error counts less
  float* errors;         // [columns][kSweepRows]
  float* const* values;  // [columns] of [kSweepRows]
  float* squared;        // [kSweepRows] sum of the squared errors of outputs
};

struct ConvLayer;
struct ConvPair;
struct Strip;

// The largest number of an array of panels, and the first panel that holds it.
struct Peak {
  float value;
  int panel;
};

// Attention over keys of 8 bits as cached, or null where attend reads them converted.
struct ByteAttend {
  void (*attend)(const AttendBlock& b);
  void (*take_query)(const float* x, int latent, int width, ByteQuery& q);
};

struct Kernels {
  const char* name;
  // A whole row x [w.k] in the form that `w` reads; scratch [w.k], which a matrix with an order needs.
  void store_row(const Matrix& w, const Act& act, int row, const float* x, float* scratch) const {
    if (w.order) {
      for (int i = 0; i < w.k; ++i) scratch[i] = w.order[i] < 0 ? 0.0f : x[w.order[i]];
      x = scratch;
    }
    store_act(w, act, row, 0, x, w.k);
  }
  Split act_split() const { return {splits.halves, splits.pairs && fast_pairs, splits.flipped}; }
  // out[m * ldo + 16 * i + lane] for `count` panels from `panel`, rows 0 … rows of x.
  void (*tile)(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo);
  void (*rms_norm)(const float* x, const float* weight, float eps, int k, float* out);
  // x[0, k) of one row into the form `format` reads, from column `at` (a multiple of the group).
  void (*store_act)(const Matrix& w, const Act& x, int row, int at, const float* values, int k);
  // 16 gate, 16 up, both plus bias [32] unless that is null -> 16
  void (*gate_mul)(const Gate& gate, const float* gate_up, const float* bias, int rows, int ld, float* out,
                   int ldo);
  void (*axpy)(float* y, const float* x, float a, int n);            // y += a x
  void (*add)(float* y, const float* x, int n);                      // y += x
  void (*blend)(float* y, float a, const float* x, float b, int n);  // y = a y + b x
  // next: the row that follows, to prefetch; scratch: [n] if out, aligned, is to bypass the caches, or null.
  void (*softmax)(const float* x, const float* next, int n, float* scratch, float* out);
  // Largest of x and of x + margin * width in each of `count` panels, and of x in all.
  void (*bounds)(const float* x, const float* width, float margin, int count, float* tops, Peak* peak);
  void (*exp_sum)(const float* x, int n, float* max, float* sum);
  void (*attend)(const AttendBlock& b);
  ByteAttend attend_int8, attend_fp8;
  // One cached row to float32 or bfloat16; scale of latent and rotary, or null.
  void (*load_key)(CacheType type, const uint8_t* row, const float* scale, const KeyShape& shape, float* out);
  void (*load_key16)(CacheType type, const uint8_t* row, const float* scale, const KeyShape& shape,
                     uint16_t* out);
  void (*split)(const float* x, int n, uint16_t* hi, uint16_t* lo);  // x = hi + lo in bfloat16, n % 16 == 0
  void (*round_bf16)(const float* x, int n, uint16_t* out);
  // [rows][ldi] to [columns][ldo], multiples of 16.
  void (*transpose)(const float* in, int ldi, int rows, int columns, float* out, int ldo);
  // Writes the data of a dense panel, and the scales of rows that it rounds to integers, [16] or [K / G][16],
  // G 32 or 64.
  void (*pack)(const Matrix& w, const PanelRows& rows, float* scales, uint8_t* data);
  // Columns of a matrix that has_plain_columns: out[k * ldo + n].
  void (*unpack)(const Matrix& w, float* out, int ldo);
  void (*conv)(const ConvLayer& layer, const ConvPair& pair, const Strip* strips,
               int count);  // see vision/layer.h
  void (*image_row)(const float* x, int64_t plane, int width, float scale, uint8_t* out);
  void (*index_scores)(const IndexBlock& b);
  // silu(sum over `count` rows of row * weight), n columns.
  void (*convolve)(const float* const* rows, const float* const* weights, int count, int n, float* out);
  void (*gate)(float* y, const float* z, int n, bool silu);  // y *= sigmoid(z), or silu(z)
  void (*delta)(const DeltaHead& h);
  // Sum over n weights of energy (w - its nearest level)^2; n is a multiple of 16.
  float (*rounding_error)(const Levels& levels, const float* w, const float* energy, float scale, int n);
  void (*sweep_block)(const SweepBlock& b);
  Wide wide, wide_halves;  // the second where there are bfloat16 products, else null
  bool index_halves;       // whether it takes q16 and k16
  Split splits;            // pairs: where the processor is fast with them
  bool blocks;             // takes activations in blocks
  // What attend reads of a rounded cache: k32; or rows16 and q16, tiles with every group of 16 keys, of those
  // up to b.keys, `width` columns apart from each other. ByteAttend reads bytes.
  enum class Keys { f32, tiles, rows, bytes } keys;
  static constexpr BlockShape block(Keys keys) { return keys == Keys::tiles ? kTileBlock : BlockShape{}; }
};

// Whether the matrices of an op take activations in blocks, if they can: with least tokens, 0: never.
inline bool takes_blocks(const Kernels& kernels, int tokens, int least) {
  return kernels.blocks && least > 0 && tokens > 1 && tokens >= least;
}

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx_vnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;
#elif defined(__aarch64__)
extern const Kernels kernels_neon_dotprod;
extern const Kernels kernels_neon_i8mm;
extern const Kernels kernels_neon_bf16;
#endif

const Kernels& select_kernels(const char* name);  // "auto" or a name; throws on an unknown or unsupported one
const char* supported_kernels();                  // names, best first, separated by spaces

}  // namespace farthing
