// The paged cache of latents: where a token's row is written, and keys in the form a kernel reads.
#pragma once
#include <bit>

#include "isa/kernels.h"

namespace farthing {

struct Cache {  // one row: a layer's latents, or a key-value head
  CacheType type;
  uint8_t* data;   // [blocks * block_size][c + r]
  float* scale;    // [blocks * block_size][2] (latent, rotary) of fp8 and int8, else null
  int block_size;  // tokens
  int64_t layer_bytes = 0, layer_scales = 0;  // from a row's data and scales to the next one's

  Cache row(int i) const {  // the i-th row after this one
    Cache found = *this;
    found.data += i * layer_bytes;
    if (scale) found.scale += i * layer_scales;
    return found;
  }
};

struct Batch {                  // the tokens of one step, sorted by sequence; see farthing.ops.api.Batch
  const int32_t* positions;     // [T]
  const int64_t* slots;         // [T]
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* context_lens;  // [sequences]
  const int32_t* block_table;   // [sequences][max_blocks]
  int sequences, max_blocks;
  const int32_t* visible = nullptr;  // [T] cached tokens that each token attends to; null: its position + 1

  int keys(int token) const { return visible ? visible[token] : positions[token] + 1; }
};

// Scales of latents and keys in an FP8 cache; 0: every row has its own.
struct FixedScales {
  float latent = 0.0f, key = 0.0f;
};

// Stores latent [c] and rotated key [r] in a slot, each with a scale in 8-bit caches.
void write_latent(const Kernels& kernels, const Cache& cache, int64_t slot, const float* latent, int c,
                  const float* k_pe, int r, FixedScales fixed = {});

// Whether a number is NaN, infinite, or too large for bfloat16.
inline bool has_overflow(const uint16_t* x, int n) {
  uint32_t any = 0;
  for (int i = 0; i < n; ++i) any |= (x[i] & 0x7fffu) + 0x80u;
  return any & 0x8000u;
}
inline bool has_overflow(const float* x, int n) {
  uint32_t any = 0;
  for (int i = 0; i < n; ++i) any |= (std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu) + 0x808000u;
  return any >> 31;
}

// Keys of a sequence, a block at a time. One per thread.
class KeyReader {
 public:
  struct Source {
    int sequence, group;  // and which of the cache's rows, from its first one on
    bool operator==(const Source& o) const { return sequence == o.sequence && group == o.group; }
  };

  // keys32 and keys16 [BlockShape::keys][width] are scratch of `fetch`.
  KeyReader(const Kernels& kernels, const Cache& cache, const Batch& batch, KeyShape shape, float* keys32,
            uint16_t* keys16);

  // What attends to keys of 8 bits as cached, or null.
  static const ByteAttend* in_bytes(const Kernels& kernels, const Cache& cache, const KeyShape& shape);
  // What attention reads of this cache.
  static Kernels::Keys form(const Kernels& kernels, const Cache& cache, const KeyShape& shape) {
    if (cache.type == CacheType::f32) return Kernels::Keys::f32;
    return in_bytes(kernels, cache, shape) ? Kernels::Keys::bytes : kernels.keys;
  }

  // Keys [at, at + b.keys) of a sequence into b; the first one after b.skipped instead of those before it.
  // Rows of b see what b.visible and b.hidden say, none more than the next. Kernels multiply every value by
  // every row's weight, also by 0: so one that is not finite, and that some rows do not see, becomes zeros,
  // and the sums of rows that see it NaN. Values of 8 bits are finite, and their scales are left out where
  // the weight is 0.
  void fetch(Source from, int at, AttendBlock& b);
  // Finds keys [at, at + keys) of the block after the one just fetched, for the kernel to prefetch. The first
  // `skipped` are not looked up.
  void look_ahead(Source from, int at, int keys, int skipped);
  // Keys [begin, end) in float32, or in bfloat16: [keys][width].
  void copy(Source from, int begin, int end, bool halves, void* to) const;

 private:
  template <class F>
  void for_runs(Source from, int begin, int end, F&& f) const;
  template <class F>
  void for_rows(Source from, int begin, int end, F&& f) const;
  const uint16_t* half(const uint8_t* data, const float* scale, uint16_t* to) const;
  void find_addresses(Source from, int at, int keys, int skipped, const uint16_t** rows) const;
  void find_rows(Source from, int at, const AttendBlock& b);
  void find_bytes(Source from, int at, const AttendBlock& b);
  template <class F>
  void clear_damaged(const AttendBlock& b, F&& damaged) const;
  void align_groups(int keys);
  bool in_place() const;

  const Kernels& kernels_;
  const Cache& cache_;
  const Batch& batch_;
  const KeyShape shape_;
  const Kernels::Keys form_;
  const int block_;  // most keys of a block
  float* keys32_;
  uint16_t* keys16_;
  const uint16_t* rows_[2 * kTileBlock.keys] = {};  // keys of a block, and cached rows of the one after it
  float scales_[2 * kKeyBlock];                     // of keys of 8 bits, as AttendBlock::key_scales
  Source next_ = {-1, 0};                           // contents of the second half of rows
  int next_at_ = 0, next_keys_ = 0, next_skipped_ = 0;
};

}  // namespace farthing
