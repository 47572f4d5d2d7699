// Records of block-sparse matrices of integers.
//
// The columns of a panel are cut into cells, as wide as a group of scales and at most 64, of up to four
// blocks of 16 x 16. Blocks of zeros are not stored, nor are cells without other blocks. The cells of a
// record are sorted by their number of blocks, so that kernels run loops of constant length:
//
//   [16] float row scales; [4] uint16 cells with 4, 3, 2 and 1 blocks; [cells] uint16, column / width of the
//   cell << 4 | its blocks, one bit each; from the next multiple of 32 bytes on, if the format has group
//   scales, [cells][16] float16; from the next multiple of 64 bytes on, the blocks as in a dense record.
#pragma once
#include "pack/matrix.h"

namespace farthing {

constexpr int kMostCells = 1 << 12;  // of a panel

inline int cell_columns(const Matrix& w) {
  const int widest = kCellBlocks * kBlock;
  return w.group < widest ? w.group : widest;
}

// Whether a matrix can be stored in cells.
inline bool has_cells(const Matrix& w) {
  return w.format_traits().cells && !w.zero && w.kp % 64 == 0 && w.group % (2 * kBlock) == 0 &&
         w.kp / cell_columns(w) <= kMostCells;
}

struct Cells {  // of one panel
  const float* rows;
  const uint16_t* counts;  // of cells with kCellBlocks, …, 1 blocks
  const uint16_t* cells;
  const uint16_t* scales;
  const uint8_t* data;
  int count;
};

// Offsets of the parts of a record with `count` cells.
inline size_t cells_scales_at(int count) {
  return round_up(kPanel * sizeof(float) + (kCellBlocks + count) * sizeof(uint16_t), size_t{32});
}
inline size_t cells_data_at(const Matrix& w, int count) {
  const size_t scales = w.format_traits().grouped() ? kPanel * sizeof(uint16_t) : 0;
  return round_up(cells_scales_at(count) + count * scales, size_t{64});
}

inline Cells cells_of(const Matrix& w, const uint8_t* record) {
  Cells c;
  c.rows = reinterpret_cast<const float*>(record);
  c.counts = reinterpret_cast<const uint16_t*>(record + kPanel * sizeof(float));
  c.cells = c.counts + kCellBlocks;
  c.count = c.counts[0] + c.counts[1] + c.counts[2] + c.counts[3];
  c.scales = reinterpret_cast<const uint16_t*>(record + cells_scales_at(c.count));
  c.data = record + cells_data_at(w, c.count);
  return c;
}

}  // namespace farthing
