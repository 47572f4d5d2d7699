// The packed weight matrix and the activations a kernel reads.
//
// Legend: N output rows, K input columns, G columns that share a scale, M activation rows.
// A matrix is cut into panels of 16 output rows, one contiguous record each; formats.h describes the records.
//
// K is padded with zeros to a multiple that depends on the format, N to a multiple of 16. Block-sparse
// matrices of integers have records of their own (cells.h).
#pragma once
#include <cstddef>
#include <cstdint>

#include "pack/formats.h"

namespace farthing {

constexpr int kBlock = 16;      // columns of a sparsity block
constexpr int kCellBlocks = 4;  // most blocks of a cell (cells.h)
constexpr int kMaxParts = 16;   // maximum NUMA nodes of a matrix

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
  int group = 0;  // of the activations' scales, and of the weights' group scales
  int kp = 0;     // padded K
  int panels = 0;
  bool zero = false;
  bool sparse = false;
  float act_top = 127.0f;             // largest integer of the activations, 7 for 4 bits (held in int8) …
  float act_clip = 1.0f;              // … and the share of a group's largest magnitude that it represents
  const int32_t* order = nullptr;     // [k] column of the input that each column multiplies, or -1: none; …
  int ordered = 0;                    // … of so many; null: the same
  float act_scale = 0.0f;             // above 0: one calibrated scale for every input, none measured (q8)
  int act_terms = 1;                  // integers whose sum is an input: 2 where what one leaves is kept too
  size_t stride = 0;                  // bytes of a dense record, without low nibbles of planes
  const uint64_t* offsets = nullptr;  // [panels + 1] of a sparse matrix, from base[0]
  int parts = 1;                      // NUMA nodes
  int first[kMaxParts + 1] = {};      // first panel of each part
  const uint8_t* base[kMaxParts] = {};

  const uint8_t* record(int panel) const {
    if (sparse) return base[0] + offsets[panel];
    const int i = part_of(panel);
    return base[i] + stride * static_cast<size_t>(panel - first[i]);
  }
  // Low nibbles of a panel of planes. Those of a part follow all of its records, so that the high ones alone
  // are one stream too.
  const uint8_t* low_plane(int panel) const {
    const int i = part_of(panel);
    return base[i] + stride * panels_of(i) + plane_bytes() * static_cast<size_t>(panel - first[i]);
  }
  int part_of(int panel) const {
    int i = 0;
    while (i + 1 < parts && panel >= first[i + 1]) ++i;
    return i;
  }
  size_t panels_of(int part) const { return static_cast<size_t>(first[part + 1] - first[part]); }
  size_t part_bytes(int part) const { return (stride + plane_bytes()) * panels_of(part); }
  size_t dense_bytes() const { return (stride + plane_bytes()) * static_cast<size_t>(panels); }
  size_t panel_bytes(int panel) const { return sparse ? offsets[panel + 1] - offsets[panel] : stride; }
  int inputs() const { return order ? ordered : k; }  // columns of the input
  int groups() const { return group ? (kp + group - 1) / group : 1; }
  int head_bytes() const {  // of a dense record: everything before its data
    int scales = 0;
    switch (format_traits().scales) {
      case Scales::none: break;
      case Scales::blocks: scales = groups() * 64; break;
      case Scales::rows: scales = 64; break;
      case Scales::groups:
      case Scales::units: scales = 64 + scale_bytes() + (zero ? groups() * kPanel : 0);
    }
    return round_up(scales, 64);
  }
  // Of the scales of groups, in the order of formats.h: float16 ones or exponents, or units and their
  // multiples.
  int units() const { return format_traits().scales == Scales::units ? (kp + kUnit - 1) / kUnit : groups(); }
  int multiples_at() const {
    return units() * (has_powers() ? 1 : 2) * kPanel * (format_traits().minimums ? 2 : 1);
  }
  bool has_powers() const { return format_traits().powers && format_traits().powers == group; }
  int scale_bytes() const {
    const int multiples = format_traits().scales == Scales::units ? groups() * kPanel : 0;
    return multiples_at() + multiples * (format_traits().minimums ? 2 : 1);
  }
  const FormatTraits& format_traits() const { return traits(format); }
  size_t data_bytes() const {  // of a dense record
    return static_cast<size_t>(kp) * format_traits().bytes_a_column() - plane_bytes();
  }
  size_t plane_bytes() const { return has_planes() ? static_cast<size_t>(kp) * (kPanel / 2) : 0; }
  int block_bytes() const { return kBlock * format_traits().bytes_a_column(); }  // of a sparsity block
  bool quantized() const { return format_traits().quantized(); }
  // Whether the checkpoint itself rounds inputs, so that nothing is left to keep.
  bool rounds_inputs() const { return act_top != 127.0f || act_clip != 1.0f || act_scale > 0.0f; }
  // Whether rows in blocks may multiply it: inputs of 4 bits are rounded group by group.
  bool fits_blocks() const {
    if (!quantized()) return format_traits().halves;
    return !sparse && format_traits().planes == Planes::none && act_top == 127.0f && act_clip == 1.0f &&
           act_terms == 1;
  }
  // Whether a column can be read without scales of groups or blocks (Kernels::unpack).
  bool has_plain_columns() const {
    const Scales s = format_traits().scales;
    return !sparse && (s == Scales::none || s == Scales::rows) && !format_traits().nibbles() &&
           format_traits().planes == Planes::none;
  }
  bool has_planes() const { return format_traits().planes == Planes::both; }
  Matrix high_plane() const {  // the same records, without low nibbles
    Matrix m = *this;
    m.format = Format::q8_high;
    return m;
  }
  // A dense matrix without data. The group matters only to formats that let each matrix choose it; 0: theirs.
  static Matrix describe(Format format, int n, int k, int group, bool zero = false) {
    Matrix m;
    m.format = format;
    m.n = n;
    m.k = k;
    const FormatTraits& f = traits(format);
    m.group = f.grouped() || (f.scales == Scales::blocks && group) ? group : f.group;
    m.zero = zero;
    m.kp = round_up(k, traits(format).multiple);
    m.panels = (n + kPanel - 1) / kPanel;
    m.stride = m.head_bytes() + m.data_bytes();
    return m;
  }
};

// Row stride of activations for K columns: whole cache lines, one more so that rows do not share a cache set.
inline int act_stride(int k) { return round_up(k, 64) + 64; }

// Scratch of a thread that brings a row into the form kernels read: normed, and in the matrix's order.
inline size_t prepare_floats(const Matrix& w) {
  return static_cast<size_t>(w.order ? 2 : 1) * act_stride(w.k);
}

// Columns of activations that share a scale in the form for many rows on tiles (amx_blocks.inl), at most: a
// pair of panels and 32 rows of that many bytes fit in L1 together. All blocks of K columns have about the
// same.
constexpr int kBlockColumns = 512;
inline int block_columns(int k) {
  const int blocks = (k + kBlockColumns - 1) / kBlockColumns;
  return round_up((k + blocks - 1) / blocks, 64);
}

// What integers leave of a value is at most half of their scale, and held as integers up to 127.
constexpr float kLeftLevels = 254.0f;

// What kernels read of a row of activations for one cell of a sparse matrix, besides q.
struct CellInput {
  int32_t comp[kCellBlocks];  // -offset * sum of the columns of each block: takes the offset back out
  int32_t comp_all;           // their sum
  float scale;                // of the cell's group
};

// M rows of activations in the forms the kernels of one format read. Rows are padded with zeros.
//
// With two terms, a row has two of q, scale, comp, cells and flipped, one after the other: integers, and what
// they leave, in units of 1 / kLeftLevels of their scale. Kernels multiply both as if they were two rows, and
// `tile` adds the products.
//
// In blocks of ld columns, for tiles: [blocks][M][ld] of q or hi, with a scale and comp of every block, and
// `rest` with as many further ones: what is left of a row's block that has outliers; scale 0: it has none.
struct Act {
  int ld = 0;              // row stride, elements
  int groups = 0;          // row stride of scale and comp
  int cell_count = 0;      // row stride of cells
  int terms = 1;           // rows of integers per row
  int blocks = 0;          // of columns; 0: rows are whole
  size_t block = 0;        // from one block to the next, elements
  float* f32 = nullptr;    // the others
  uint16_t* hi = nullptr;  // on AMX, for bf16: x = hi + lo to 16 bits of mantissa; in blocks x = hi
  uint16_t* lo = nullptr;
  uint32_t* pairs = nullptr;  // for fp8: of two columns hi, then lo; instead of f32 where they are fast
  int8_t* q = nullptr;        // quantized formats
  int8_t* rest = nullptr;
  float* scale = nullptr;
  int32_t* comp = nullptr;     // -offset * sum of a group: takes the weights' offset back out
  CellInput* cells = nullptr;  // for sparse matrices
  uint8_t* flipped = nullptr;  // q + 128, for many rows (many_rows.inl, many_cells.inl)
};

// Which matrices take activations as hi + lo: bfloat16 as halves, fp8 as pairs. flipped: quantized ones as
// q + 128 too.
struct Split {
  bool halves = false, pairs = false, flipped = false;
};

inline Act row(const Act& a, int m) {
  Act r = a;
  const size_t i = static_cast<size_t>(m), at = i * a.ld, term = i * a.terms;
  if (a.f32) r.f32 = a.f32 + at;
  if (a.hi) r.hi = a.hi + at;
  if (a.lo) r.lo = a.lo + at;
  if (a.pairs) r.pairs = a.pairs + at;
  if (a.q) r.q = a.q + term * a.ld, r.scale = a.scale + term * a.groups, r.comp = a.comp + term * a.groups;
  if (a.rest) r.rest = a.rest + at;
  if (a.cells) r.cells = a.cells + term * a.cell_count;
  if (a.flipped) r.flipped = a.flipped + term * a.ld;
  return r;
}

}  // namespace farthing
