// The packed weight matrix and the activations a kernel reads.
//
// Legend: N output rows, K input columns, G columns that share a scale, M activation rows.
// A matrix is cut into panels of 16 output rows. A panel is one contiguous record, so that a
// matrix-vector product reads memory as one stream:
//
//   f32   [K][16] float
//   bf16  [K/2][16][2] bfloat16                                   (so a 16 x 32 block is an AMX tile)
//   fp8   [K/128][16] float scales, then [K][16] e4m3
//   q8    [16] float row scales, then [K/4][16][4] uint8 = q + 128 (so a 16 x 64 block is an AMX tile)
//   q4    [16] float row scales; [K/G][16] float16 scales relative to the row's largest magnitude, which may
//         be negative; with zero points [K/G][16] int8; then [K/8][16][4] bytes: low nibble k % 8 < 4, high
//         nibble the rest, each q + 8
//
// K is padded with zeros to a multiple of 2 (f32), 32 (bf16, fp8) or 64 (q8), N to a multiple of 16, the
// header before the data to 64 bytes. The record of a block-sparse q8 or q4 matrix starts with one byte per
// 64 columns, whose bits mark the 16 x 16 blocks that follow; the others are zero.
#pragma once
#include <cstddef>
#include <cstdint>

namespace farthing {

constexpr int kPanel = 16;
constexpr int kBlock = 16;      // columns of a sparsity block
constexpr int kActGroup = 128;  // columns of activations that share a scale if the weights have no groups
constexpr int kMaxParts = 8;    // maximum NUMA nodes of a matrix

enum class Format : uint32_t { f32 = 0, bf16 = 1, fp8 = 2, q8 = 3, q4 = 4 };

struct FormatTraits {
  const char* name;    // in farthing._native.Format
  int multiple;        // of columns that K is padded to
  int bytes_a_column;  // of a panel's data
  int offset;          // of the stored integers: the value is what is stored plus this
  bool quantized;      // the activations are integers too
  bool grouped;        // each matrix chooses its group of columns, which has scales and maybe zero points
  int group;           // columns that share a scale of the activations, where it is not chosen; 0: no scales
};
constexpr FormatTraits kFormats[] = {
    {"F32", 2, 64, 0, false, false, 0},
    {"BF16", 32, 32, 0, false, false, 0},
    {"FP8", 32, 16, 0, false, false, kActGroup},
    {"Q8", 64, 16, -128, true, false, kActGroup},
    {"Q4", 1, 8, -8, true, true, 0},
};
constexpr const FormatTraits& traits(Format format) { return kFormats[static_cast<int>(format)]; }

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }
inline size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

struct Rows {  // float32 rows of a tensor
  float* at;
  int64_t stride;
  float* row(int64_t i) const { return at + i * stride; }
};

struct Matrix {
  Format format = Format::f32;
  int n = 0, k = 0;
  int group = 0;  // of the activations' scales, and of q4's weight scales
  int kp = 0;     // padded K
  int panels = 0;
  bool zero = false;
  bool sparse = false;
  float act_top = 127.0f;             // largest integer of the activations, 7 for 4 bits (held in int8) …
  float act_clip = 1.0f;              // … and the share of a group's largest magnitude that it represents
  float act_scale = 0.0f;             // above 0: one calibrated scale for every input, none measured (q8)
  size_t stride = 0;                  // bytes of a dense record
  const uint64_t* offsets = nullptr;  // [panels + 1] of a sparse matrix, from base[0]
  int parts = 1;                      // NUMA nodes
  int first[kMaxParts + 1] = {};      // first panel of each part
  const uint8_t* base[kMaxParts] = {};

  const uint8_t* record(int panel) const {
    if (sparse) return base[0] + offsets[panel];
    int i = 0;
    while (i + 1 < parts && panel >= first[i + 1]) ++i;
    return base[i] + stride * static_cast<size_t>(panel - first[i]);
  }
  size_t panel_bytes(int panel) const { return sparse ? offsets[panel + 1] - offsets[panel] : stride; }
  int groups() const { return group ? (kp + group - 1) / group : 1; }
  int mask_bytes() const { return sparse ? round_up((kp + 63) / 64, 64) : 0; }
  int head_bytes() const {  // of a record: everything before its data
    const int rows = quantized() ? 64 : 0;
    const int scales = format == Format::q4    ? groups() * (zero ? 48 : 32)
                       : format == Format::fp8 ? groups() * 64
                                               : 0;
    return mask_bytes() + round_up(rows + scales, 64);
  }
  size_t data_bytes() const { return static_cast<size_t>(kp) * traits(format).bytes_a_column; }
  int block_bytes() const { return kBlock * traits(format).bytes_a_column; }  // of a sparsity block
  bool quantized() const { return traits(format).quantized; }
  void lay_out() {  // what follows from format, n, k, group and zero
    kp = round_up(k, traits(format).multiple);
    panels = (n + kPanel - 1) / kPanel;
    stride = head_bytes() + data_bytes();
  }
};

// Row stride of activations for K columns: whole cache lines, one more so that rows do not share a cache set.
inline int act_stride(int k) { return round_up(k, 64) + 64; }

// M rows of activations in the forms the kernels of one format read. Rows are padded with zeros.
struct Act {
  int ld = 0;              // row stride, elements
  int groups = 0;          // row stride of scale and comp
  int blocks = 0;          // row stride of block_comp
  float* f32 = nullptr;    // f32, bf16, fp8
  uint16_t* hi = nullptr;  // bf16 on AMX: x = hi + lo to 16 bits of mantissa; q8 and q4: hi alone
  uint16_t* lo = nullptr;
  int8_t* q = nullptr;  // q8, q4
  float* scale = nullptr;
  int32_t* comp = nullptr;        // -offset * sum of a group: removes the +8 or +128 of the weights
  int32_t* block_comp = nullptr;  // the same per 16 columns, for sparse matrices
};

inline Act row(const Act& a, int m) {
  Act r = a;
  const size_t i = static_cast<size_t>(m), at = i * a.ld;
  if (a.f32) r.f32 = a.f32 + at;
  if (a.hi) r.hi = a.hi + at;
  if (a.lo) r.lo = a.lo + at;
  if (a.q) r.q = a.q + at, r.scale = a.scale + i * a.groups, r.comp = a.comp + i * a.groups;
  if (a.block_comp) r.block_comp = a.block_comp + i * a.blocks;
  return r;
}

}  // namespace farthing
