// Block-sparse panels times rows: loops over cells with the same number of blocks (see cells.h). Sums run in
// the order of the record, for every number of rows. Included by gemm.inl.
namespace farthing {
namespace {

// Straight-line code where registers hold its sums.
#if defined(__AVX2__)
#define EACH_BLOCK EACH
#else
#define EACH_BLOCK for
#endif

// Distances of one to three rows.
struct Strides {
  size_t one, three;
  explicit Strides(size_t stride) : one(stride), three(3 * stride) { asm("" : "+r"(one), "+r"(three)); }
};

// Addresses in up to 12 rows, each the sum of two registers. Where compilers see how they belong together,
// they keep an address per row and column instead, most of them on the stack.
template <int M>
class RowsAt {
 public:
  RowsAt(const void* first, const Strides& by) : a_(static_cast<const uint8_t*>(first)), by_(by) {
    if constexpr (M > 4) b_ = after(a_);
    if constexpr (M > 8) c_ = after(b_);
  }
  const uint8_t* operator[](int m) const {
    const uint8_t* p = m < 4 ? a_ : m < 8 ? b_ : c_;
    return m % 4 == 0 ? p : p + (m % 4 == 3 ? by_.three : m % 4 * by_.one);
  }

 private:
  const uint8_t* after(const uint8_t* p) const {
    p += 4 * by_.one;
    asm("" : "+r"(p));
    return p;
  }

  const uint8_t *a_, *b_ = nullptr, *c_ = nullptr;
  const Strides by_;
};

// The blocks of a cell, first to last.
template <int Blocks>
struct BlocksOf {
  int at[Blocks];
  explicit BlocksOf(unsigned mask) {
    EACH (int i = 0; i < Blocks; ++i, mask &= mask - 1)
      at[i] = Blocks == kCellBlocks ? i : __builtin_ctz(mask);
  }
};

// What takes the offset back out of the sums of a cell's blocks, from at most two numbers.
template <int Blocks>
inline i32x16 cell_comp(const CellInput& in, unsigned cell, const BlocksOf<Blocks>& blocks) {
  if constexpr (Blocks == kCellBlocks) return splati(in.comp_all);
  if constexpr (Blocks == 3) return sub_at(splati(in.comp_all), in.comp + __builtin_ctz(~cell));
  if constexpr (Blocks == 2) return add_at(splati(in.comp[blocks.at[0]]), in.comp + blocks.at[1]);
  return splati(in.comp[blocks.at[0]]);
}

// What is read while a panel's cells are computed.
struct CellCursor {
  const uint16_t *cells, *scales;
  const uint8_t *data, *first;  // of the blocks
  int at = 0;
};

// One or two rows read a record as a stream.
template <int M, Format F, int Bytes>
[[gnu::always_inline]] inline void fetch_columns(const uint8_t* p) {
  if constexpr (M > kStream) return;
  EACH (int at = 0; at < Bytes; at += 64) {
    if constexpr (traits(F).nibbles()) prefetch(p + prefetch_distances.nibbles_near + at);
    prefetch_far(p + prefetch_distances.bytes + at);
  }
}

// More rows prefetch the next panels: as many bytes as a cell and its scales have.
template <int M, Format F, int Bytes>
[[gnu::always_inline]] inline void fetch_cell(const CellCursor& c, const uint8_t* record, Ahead ahead) {
  constexpr int scales = traits(F).grouped() ? kPanel * sizeof(uint16_t) : 0;
  if (M <= kStream || c.at < ahead.from || c.at >= ahead.to) return;
  const uint8_t* from = record + ahead.distance + (c.data - c.first) + c.at * scales;
  EACH (int at = 0; at < Bytes + scales; at += 64) prefetch_far(from + at);
}

// The next `count` cells, all with the same number of blocks.
template <int M, Format F, int Blocks>
[[gnu::always_inline]] inline void add_cells(const Matrix& w, const uint8_t* record, int count, const Act& x,
                                             Ahead ahead, CellCursor& c, f32x16 (&total)[M]) {
  constexpr bool grouped = traits(F).grouped(), small = traits(F).small() || is_signed(F);
  constexpr int step = 8 * traits(F).bytes_a_column();
  const int width = cell_columns(w);
  const Strides q_by(x.ld), cells_by(x.cell_count * sizeof(CellInput));
  for (const int end = c.at + count; c.at < end; ++c.at) {
    fetch_cell<M, F, Blocks * kBlock / 8 * step>(c, record, ahead);
    const unsigned cell = *c.cells++;
    const size_t index = cell >> kCellBlocks;
    const RowsAt<M> in(x.cells + index, cells_by);
    const auto of_row = [&](int m) -> const CellInput& { return *reinterpret_cast<const CellInput*>(in[m]); };
    const BlocksOf<Blocks> blocks(cell & 15);
    i32x16 acc[M], more[M] = {};
    EACH (int m = 0; m < M; ++m) acc[m] = is_signed(F) ? i32x16{} : cell_comp(of_row(m), cell, blocks);
    EACH_BLOCK (int i = 0; i < Blocks; ++i) {
      const RowsAt<M> q(x.q + index * width + blocks.at[i] * kBlock, q_by);
      EACH_BLOCK (int j = 0; j < kBlock; j += 8, c.data += step) {
        const bytes64 a = quad<F, 0>(c.data), b = quad<F, 1>(c.data);
        fetch_columns<M, F, step>(c.data);
        EACH (int m = 0; m < M; ++m) acc[m] = dot4_at<small>(acc[m], a, q[m] + j);
        EACH (int m = 0; m < M; ++m) {
          i32x16& second = M <= kStream ? more[m] : acc[m];
          second = dot4_at<small>(second, b, q[m] + j + 4);
        }
      }
    }
    const f32x16 scale = grouped ? half_to_float(c.scales) : splat(1.0f);
    if (grouped) c.scales += kPanel;
    EACH (int m = 0; m < M; ++m) {
      const float by = of_row(m).scale;
      total[m] = fma(to_float(acc[m] + more[m]), grouped ? scale * by : splat(by), total[m]);
    }
  }
}

template <int M, Format F>
void panel_sparse(const Matrix& w, int panel, const Act& x, Ahead ahead, float* out, int ldo) {
  const uint8_t* record = w.record(panel);
  const Cells cells = cells_of(w, record);
  CellCursor c{cells.cells, cells.scales, cells.data, cells.data};
  if constexpr (M <= kStream) fetch_head<true>(record, cells.data, 0);
  f32x16 total[M] = {};
  add_cells<M, F, 4>(w, record, cells.counts[0], x, ahead, c, total);
  add_cells<M, F, 3>(w, record, cells.counts[1], x, ahead, c, total);
  add_cells<M, F, 2>(w, record, cells.counts[2], x, ahead, c, total);
  add_cells<M, F, 1>(w, record, cells.counts[3], x, ahead, c, total);
  const f32x16 row = load<f32x16>(cells.rows);
  EACH (int m = 0; m < M; ++m) store(out + m * ldo, total[m] * row);
}

template <int M, size_t... I>
PanelKernel sparse_in(const Matrix& w, std::index_sequence<I...>) {
  PanelKernel found = nullptr;
  const auto try_one = [&]<Format F>() {
    if constexpr (traits(F).cells)
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

#include "linear/many_cells.inl"

namespace farthing {
namespace {

// `count` panels times any number of rows, in blocks of rows, which stay in L1 from one panel to the next.
// What follows the panels is prefetched meanwhile.
void sparse_tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
#if defined(__AVX512VNNI__)
  if (sparse_many(w, panel, count, x, rows, out, ldo)) return;
#endif
  const int terms = w.act_terms, at_once = kSparseRows / terms, blocks = (rows + at_once - 1) / at_once;
  size_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += w.panel_bytes(panel + i);
  for (int b = 0, m = 0; b < blocks; ++b) {
    const int some = (rows - m + blocks - b - 1) / (blocks - b);
    const PanelKernel kernel = sparse_of(w, some * terms);
    for (int i = 0; i < count; ++i) {
      const int cells = blocks == 1 ? kMostCells : cells_of(w, w.record(panel + i)).count;
      const Ahead ahead{bytes, cells * b / blocks, cells * (b + 1) / blocks};
      add_terms<kSparseRows>(terms, some, kPanel, out + static_cast<size_t>(m) * ldo + 16 * i, ldo,
                             [&](float* to, int ld) { kernel(w, panel + i, row(x, m), ahead, to, ld); });
    }
    m += some;
  }
}

}  // namespace
}  // namespace farthing
