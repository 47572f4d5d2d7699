// Block-sparse panels times rows: loops over cells with the same number of blocks (see cells.h). Sums run in
// the order of the record, for every number of rows. Included by gemm.inl.
namespace farthing {
namespace {

// The blocks of a cell, first to last.
template <int Blocks>
struct BlocksOf {
  int at[Blocks];
  explicit BlocksOf(unsigned mask) {
    EACH (int i = 0; i < Blocks; ++i, mask &= mask - 1)
      at[i] = Blocks == kCellBlocks ? i : __builtin_ctz(mask);
  }
};

// Offsets removed from the sums of a cell's blocks of one row.
template <int Blocks>
inline i32x16 cell_comp(const int32_t* of_blocks, const BlocksOf<Blocks>& blocks) {
#if defined(__AVX512F__)
  i32x16 sum = splati(of_blocks[blocks.at[0]]);  // broadcasts from memory cost less than from registers
  EACH (int i = 1; i < Blocks; ++i) sum += splati(of_blocks[blocks.at[i]]);
  return sum;
#else
  int32_t sum = 0;
  EACH (int i = 0; i < Blocks; ++i) sum += of_blocks[blocks.at[i]];
  return splati(sum);
#endif
}

// What is read while a panel's cells are computed.
struct CellCursor {
  const uint16_t *cells, *scales;
  const uint8_t* data;
  int at = 0;
};

// The next `count` cells, all with the same number of blocks.
template <int M, Format F, int Blocks>
[[gnu::always_inline]] inline void add_cells(const Matrix& w, int count, const Act& x, Ahead ahead,
                                             CellCursor& c, f32x16 (&total)[M]) {
  constexpr bool grouped = traits(F).grouped();
  constexpr int bytes = Blocks * kBlock * traits(F).bytes_a_column();
  const int width = cell_columns(w);
  for (const int end = c.at + count; c.at < end; ++c.at) {
    const unsigned cell = *c.cells++;
    const int k = static_cast<int>(cell >> kCellBlocks) * width, g = k / w.group;
    const uint8_t *data[1] = {c.data}, *none[1] = {};
    fetch_ahead<M>(data, ahead, c.at, bytes);
    i32x16 acc[M], more[M] = {};
    const BlocksOf<Blocks> blocks(cell & 15);
    EACH (int m = 0; m < M; ++m) acc[m] = cell_comp(x.block_comp + m * x.blocks + k / kBlock, blocks);
    if constexpr (Blocks == kCellBlocks) {
      dot_columns<M, 1, F>(data, none, x.q + k, x.ld, Blocks * kBlock, acc, more);
    } else {
      for (int i = 0; i < Blocks; ++i)
        dot_columns<M, 1, F>(data, none, x.q + k + blocks.at[i] * kBlock, x.ld, kBlock, acc, more);
    }
    c.data = data[0];
    const f32x16 scale = grouped ? half_to_float(c.scales) : splat(1.0f);
    if (grouped) c.scales += kPanel;
    EACH (int m = 0; m < M; ++m) {
      const float by = x.scale[m * x.groups + g];
      total[m] = fma(to_float(acc[m] + more[m]), grouped ? scale * by : splat(by), total[m]);
    }
  }
}

template <int M, Format F>
void panel_sparse(const Matrix& w, int panel, const Act& x, Ahead ahead, float* out, int ldo) {
  const Cells cells = cells_of(w, w.record(panel));
  CellCursor c{cells.cells, cells.scales, cells.data};
  f32x16 total[M] = {};
  add_cells<M, F, 4>(w, cells.counts[0], x, ahead, c, total);
  add_cells<M, F, 3>(w, cells.counts[1], x, ahead, c, total);
  add_cells<M, F, 2>(w, cells.counts[2], x, ahead, c, total);
  add_cells<M, F, 1>(w, cells.counts[3], x, ahead, c, total);
  const f32x16 row = load<f32x16>(cells.rows);
  EACH (int m = 0; m < M; ++m) store(out + m * ldo, total[m] * row);
}

template <int M, size_t... I>
PanelKernel sparse_in(const Matrix& w, std::index_sequence<I...>) {
  PanelKernel found = nullptr;
  const auto try_one = [&]<Format F>() {
    if constexpr (traits(F).quantized && traits(F).planes == Planes::none)
      if (w.format == F) found = panel_sparse<M, F>;
  };
  (try_one.template operator()<Format{I}>(), ...);
  return found;
}

template <int M = kSparseRows>
PanelKernel sparse_of(const Matrix& w, int rows) {
  if constexpr (M > 1)
    if (rows < M) return sparse_of<M - 1>(w, rows);
  return sparse_in<M>(w, std::make_index_sequence<std::size(kFormats)>());
}

}  // namespace
}  // namespace farthing

#include "many_cells.inl"

namespace farthing {
namespace {

// One panel times any number of rows; the next panel is prefetched meanwhile.
void sparse_tile(const Matrix& w, int panel, const Act& x, int rows, float* out, int ldo) {
  const Cells cells = cells_of(w, w.record(panel));
#if defined(__AVX512VNNI__)
  if (sparse_many(w, panel, cells, x, rows, out, ldo)) return;
#endif
  const int blocks = (rows + kSparseRows - 1) / kSparseRows, count = cells.count;
  for (int b = 0, m = 0; b < blocks; ++b) {
    const int some = (rows - m + blocks - b - 1) / (blocks - b);
    const PanelKernel kernel = sparse_of(w, some);
    const Ahead ahead{w.panel_bytes(panel), count * b / blocks, count * (b + 1) / blocks};
    kernel(w, panel, row(x, m), ahead, out + static_cast<size_t>(m) * ldo, ldo);
    m += some;
  }
}

}  // namespace
}  // namespace farthing
