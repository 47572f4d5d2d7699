// Block-sparse panels times rows: loops over cells with the same number of blocks (see cells.h). Sums run in
// the order of the record, for every number of rows. Included by gemm.inl.
namespace farthing {
namespace {

// Offsets removed from the sums of a cell's blocks of one row.
template <int Blocks>
inline int32_t cell_comp(const int32_t* of_blocks, unsigned mask) {
  int32_t sum = 0;
  EACH (int i = 0; i < Blocks; ++i) {
    sum += of_blocks[Blocks == kCellBlocks ? i : __builtin_ctz(mask)];
    mask &= mask - 1;
  }
  return sum;
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
    const uint8_t* data[1] = {c.data};
    fetch_ahead<M>(data, ahead, c.at, bytes);
    i32x16 acc[M], more[M] = {};
    EACH (int m = 0; m < M; ++m)
      acc[m] = splati(cell_comp<Blocks>(x.block_comp + m * x.blocks + k / kBlock, cell & 15));
    if constexpr (Blocks == kCellBlocks) {
      dot_columns<M, 1, F>(data, {}, x.q + k, x.ld, Blocks * kBlock, acc, more);
    } else {
      unsigned mask = cell & 15;
      for (int i = 0; i < Blocks; ++i, mask &= mask - 1)
        dot_columns<M, 1, F>(data, {}, x.q + k + __builtin_ctz(mask) * kBlock, x.ld, kBlock, acc, more);
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

// One panel times any number of rows; the next panel is prefetched meanwhile.
void sparse_tile(const Matrix& w, int panel, const Act& x, int rows, float* out, int ldo) {
  const int blocks = (rows + kSparseRows - 1) / kSparseRows;
  const int count = cells_of(w, w.record(panel)).count;
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
