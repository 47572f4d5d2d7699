// Block-sparse panels times many rows with AVX-512: the integers and float sums of cells.inl, in fewer steps.
//
// A dot product takes unsigned bytes times signed ones. Few rows are the signed side, so the weights' offset
// must be taken out of the sums, by another number for every row and cell. Many rows are the unsigned side
// (Act::flipped, q + 128): what their offset adds, 128 times a cell's weights, is the same for all of them.
// Included by cells.inl.
#if defined(__AVX512VNNI__)
namespace farthing {
namespace {

constexpr int kTogether = 12;     // rows whose sums fit in registers
constexpr int kManyFrom = 32;     // rows that pay for the sums of weights
constexpr int kManyCells = 1024;  // of a panel, at most
typedef int16_t CellSum[kPanel];  // of at most 64 weights per row of the panel

template <Format F>
inline bytes64 as_signed(bytes64 v) {
  if constexpr (traits(F).codes == nullptr) return _mm512_sub_epi8(v, _mm512_set1_epi8(8));
  else return look_up(reinterpret_cast<const uint8_t*>(traits(F).codes->of), v);
}

// Eight columns of 16 weights.
template <Format F>
inline void load_signed(const uint8_t* p, bytes64& a, bytes64& b) {
  const bytes64 v = load_bytes(p);
  if constexpr (traits(F).nibbles()) {
    a = as_signed<F>(low_nibbles(v));
    b = as_signed<F>(high_nibbles(v));
  } else {
    a = _mm512_xor_si512(v, _mm512_set1_epi8(-128));
    b = _mm512_xor_si512(load_bytes(p + 64), _mm512_set1_epi8(-128));
  }
}

inline __m512i splat_unsigned(const uint8_t* p) { return splat4(reinterpret_cast<const int8_t*>(p)); }

template <Format F>
void sum_cells(const Cells& cells, CellSum* sums) {
  const __m512i one = _mm512_set1_epi8(1);
  const uint8_t* p = cells.data;
  for (int blocks = kCellBlocks; blocks; --blocks)
    for (int i = 0; i < cells.counts[kCellBlocks - blocks]; ++i, ++sums) {
      i32x16 sum = {};
      for (int j = 0; j < blocks * kBlock; j += 8, p += 8 * traits(F).bytes_a_column()) {
        bytes64 a, b;
        load_signed<F>(p, a, b);
        sum = dot4(dot4(sum, one, a), one, b);
      }
      store(*sums, _mm512_cvtepi32_epi16((__m512i)sum));
    }
}

// A cell's index times this is its group and 32 bits of fraction.
inline uint64_t group_of_cell(const Matrix& w) {
  const uint64_t cells = w.group / cell_columns(w);
  return ((uint64_t{1} << 32) + cells - 1) / cells;
}

template <int M, Format F, int Blocks>
[[gnu::always_inline]] inline void add_many(const Matrix& w, int count, const Act& x, const CellSum* sums,
                                            CellCursor& c, f32x16 (&total)[M]) {
  constexpr bool grouped = traits(F).grouped();
  const int width = cell_columns(w);
  const uint64_t of_cell = group_of_cell(w);
  const Strides q_by(x.ld), scales_by(x.groups * sizeof(float));
  for (const int end = c.at + count; c.at < end; ++c.at) {
    const unsigned cell = *c.cells++;
    const size_t index = cell >> kCellBlocks;
    const RowsAt<M> scales(x.scale + (index * of_cell >> 32), scales_by);
    const i32x16 base = (i32x16)_mm512_cvtepi16_epi32(load<__m256i>(sums[c.at])) * -128;
    i32x16 acc[M];
    EACH (int m = 0; m < M; ++m) acc[m] = base;
    const BlocksOf<Blocks> blocks(cell & 15);
    EACH (int i = 0; i < Blocks; ++i) {
      const RowsAt<M> q(x.flipped + index * width + blocks.at[i] * kBlock, q_by);
      EACH (int j = 0; j < kBlock; j += 8, c.data += 8 * traits(F).bytes_a_column()) {
        bytes64 a, b;
        load_signed<F>(c.data, a, b);
        EACH (int m = 0; m < M; ++m) acc[m] = dot4(acc[m], splat_unsigned(q[m] + j), a);
        EACH (int m = 0; m < M; ++m) acc[m] = dot4(acc[m], splat_unsigned(q[m] + j + 4), b);
      }
    }
    const f32x16 scale = grouped ? half_to_float(c.scales) : splat(1.0f);
    if (grouped) c.scales += kPanel;
    EACH (int m = 0; m < M; ++m) {
      const float by = load<float>(scales[m]);
      total[m] = fma(to_float(acc[m]), grouped ? scale * by : splat(by), total[m]);
    }
  }
}

template <int M, Format F>
void panel_many(const Matrix& w, const Cells& cells, const CellSum* sums, const Act& x, float* out, int ldo) {
  CellCursor c{cells.cells, cells.scales, cells.data, cells.data};
  f32x16 total[M] = {};
  add_many<M, F, 4>(w, cells.counts[0], x, sums, c, total);
  add_many<M, F, 3>(w, cells.counts[1], x, sums, c, total);
  add_many<M, F, 2>(w, cells.counts[2], x, sums, c, total);
  add_many<M, F, 1>(w, cells.counts[3], x, sums, c, total);
  const f32x16 row = load<f32x16>(cells.rows);
  EACH (int m = 0; m < M; ++m) store(out + m * ldo, total[m] * row);
}

typedef void (*ManyKernel)(const Matrix&, const Cells&, const CellSum*, const Act&, float*, int);

template <Format F, int M = kTogether>
ManyKernel many_of(int rows) {
  if constexpr (M > 1)
    if (rows < M) return many_of<F, M - 1>(rows);
  return panel_many<M, F>;
}

// What follows the panels is prefetched between blocks of rows.
template <Format F>
void many_rows(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  alignas(64) CellSum sums[kSparsePanels][kManyCells];
  Cells cells[kSparsePanels];
  size_t bytes = 0;
  for (int i = 0; i < count; ++i) {
    cells[i] = cells_of(w, w.record(panel + i));
    sum_cells<F>(cells[i], sums[i]);
    bytes += w.panel_bytes(panel + i);
  }
  const uint8_t* next = w.record(panel) + bytes;
  const int terms = w.act_terms, at_once = kTogether / terms, blocks = (rows + at_once - 1) / at_once;
  for (int b = 0, m = 0; b < blocks; ++b) {
    const int some = (rows - m + blocks - b - 1) / (blocks - b);
    const ManyKernel kernel = many_of<F>(some * terms);
    for (size_t at = bytes * b / blocks / 64 * 64; at < bytes * (b + 1) / blocks; at += 64)
      prefetch_far(next + at);
    for (int i = 0; i < count; ++i)
      add_terms<kTogether>(terms, some, kPanel, out + static_cast<size_t>(m) * ldo + 16 * i, ldo,
                           [&](float* to, int ld) { kernel(w, cells[i], sums[i], row(x, m), to, ld); });
    m += some;
  }
}

// Panels times the rows if they are many, else nothing and false.
bool sparse_many(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (rows * w.act_terms < kManyFrom || w.kp / cell_columns(w) > kManyCells) return false;
  if (w.format == Format::q8) many_rows<Format::q8>(w, panel, count, x, rows, out, ldo);
  else if (w.format == Format::q4) many_rows<Format::q4>(w, panel, count, x, rows, out, ldo);
  else many_rows<Format::nl4>(w, panel, count, x, rows, out, ldo);
  return true;
}

}  // namespace
}  // namespace farthing
#endif
