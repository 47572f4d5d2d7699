// Records of block-sparse matrices: made from dense ones, and checked when they come from a file.
#include "linear/cells.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pack/pack.h"

namespace farthing {
namespace {

unsigned blocks_of(const Matrix& w, const uint8_t* data, int cell) {  // bits of the blocks that are not zero
  const int columns = cell_columns(w), bytes = w.block_bytes();
  const uint8_t nothing = w.format_traits().zero_byte();
  unsigned found = 0;
  for (int b = 0; b < columns / kBlock; ++b) {
    const uint8_t* at = data + static_cast<size_t>(cell * columns / kBlock + b) * bytes;
    for (int i = 0; i < bytes; ++i)
      if (at[i] != nothing) {
        found |= 1u << b;
        break;
      }
  }
  return found;
}

// Masks of the cells of a panel.
std::vector<unsigned> masks_of(const Matrix& w, const uint8_t* record) {
  std::vector<unsigned> masks(w.kp / cell_columns(w));
  for (size_t i = 0; i < masks.size(); ++i)
    masks[i] = blocks_of(w, record + w.head_bytes(), static_cast<int>(i));
  return masks;
}

void append(const Matrix& w, const uint8_t* record, const std::vector<unsigned>& masks,
            std::vector<uint8_t>& out) {
  std::vector<uint16_t> index(kCellBlocks, 0);
  for (unsigned blocks = kCellBlocks; blocks; --blocks)
    for (size_t i = 0; i < masks.size(); ++i)
      if (static_cast<unsigned>(__builtin_popcount(masks[i])) == blocks) {
        index.push_back(static_cast<uint16_t>(i << kCellBlocks | masks[i]));
        ++index[kCellBlocks - blocks];
      }
  const int count = static_cast<int>(index.size()) - kCellBlocks, columns = cell_columns(w);
  const size_t start = out.size(), bytes = w.block_bytes();
  out.resize(start + cells_data_at(w, count));
  std::memcpy(out.data() + start, record, kPanel * sizeof(float));
  std::memcpy(out.data() + start + kPanel * sizeof(float), index.data(), index.size() * sizeof(uint16_t));
  for (int i = 0; i < count; ++i) {
    const int cell = index[kCellBlocks + i] >> kCellBlocks, k = cell * columns;
    if (w.format_traits().grouped())
      std::memcpy(out.data() + start + cells_scales_at(count) + i * 32, record + 64 + k / w.group * 32, 32);
    for (int b = 0; b < kCellBlocks; ++b) {
      const uint8_t* at = record + w.head_bytes() + static_cast<size_t>(k / kBlock + b) * bytes;
      if (masks[cell] >> b & 1) out.insert(out.end(), at, at + bytes);
    }
  }
  out.resize(round_up(out.size(), size_t{64}));
}

}  // namespace

bool to_cells(const Matrix& w, const BlockCosts& costs, std::vector<uint8_t>& cells,
              std::vector<uint64_t>& offsets) {
  if (std::isinf(costs[0])) return false;
  // Costs are those of 64 columns; a cell of a narrower group is a part of one.
  const int times = kCellBlocks * kBlock / cell_columns(w);
  double cost = 0.0;
  std::vector<std::vector<unsigned>> masks;
  for (int p = 0; p < w.panels; ++p) {
    masks.push_back(masks_of(w, w.record(p)));
    for (const unsigned mask : masks.back()) cost += mask ? costs[times * __builtin_popcount(mask) - 1] : 0.0;
  }
  if (cost >= static_cast<double>(w.panels) * static_cast<double>(masks[0].size())) return false;
  for (int p = 0; p < w.panels; ++p) {
    offsets.push_back(cells.size());
    append(w, w.record(p), masks[p], cells);
  }
  offsets.push_back(cells.size());
  return true;
}

void check_cells(const Matrix& w, const uint8_t* records, size_t bytes) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
  };
  const int most = w.kp / cell_columns(w), widest = cell_columns(w) / kBlock;
  const size_t block = w.block_bytes();
  require(w.offsets[0] == 0 && w.offsets[w.panels] == bytes, "panel table");
  for (int p = 0; p < w.panels; ++p) {
    const uint64_t begin = w.offsets[p], end = w.offsets[p + 1];
    require(begin % 64 == 0 && begin < end && end <= bytes && end - begin >= cells_data_at(w, 0),
            "panel table");
    const Cells c = cells_of(w, records + begin);
    require(c.count <= most && end - begin >= cells_data_at(w, c.count), "cells of a panel");
    size_t stored = 0;
    const uint16_t* cell = c.cells;
    for (int blocks = kCellBlocks; blocks; --blocks)
      for (int i = 0, before = -1; i < c.counts[kCellBlocks - blocks]; ++i, ++cell, stored += blocks) {
        const int at = *cell >> kCellBlocks, mask = *cell & ((1 << kCellBlocks) - 1);
        require(at > before && at < most && mask >> widest == 0 && __builtin_popcount(mask) == blocks,
                "cells of a panel");
        before = at;
      }
    require(end - begin == round_up(cells_data_at(w, c.count) + stored * block, size_t{64}),
            "cells of a panel");
  }
}

}  // namespace farthing
