// Quantized panels times many rows: a group's weights are unpacked once for a block of rows, which then cost
// nothing but loads and products. The integers of a group, and so the results, are those of few rows.
// many_ymm.inl and many_neon.inl have what differs. Included by gemm.inl.
#if defined(MANY_ROWS)
namespace farthing {
namespace {

constexpr int kBlockRows = 64;   // rows that share a group's bytes
constexpr int kManyPanels = 2;   // panels that share what is made of the rows
constexpr int kMostGroup = 128;  // columns of a group, at most

}  // namespace
}  // namespace farthing

#if defined(__AVX2__)
#include "linear/many_ymm.inl"
#else
#include "linear/many_neon.inl"
#endif

namespace farthing {
namespace {

typedef float PanelSums[kBlockRows][kPanel];

// Rows times a group of a panel into its sums, in tiles of M. x: the rows; bytes: what sum_group reads of
// them, at the group.
template <int M, Format F, bool Zero>
void add_group(const uint8_t* w, const int16_t* start, const GroupNumbers& n, int columns, const Act& x,
               int g, const uint8_t* bytes, size_t ld, int tiles, const uint8_t* next,
               float (*totals)[kPanel]) {
  const float* scale = x.scale + g;
  const int32_t* comp = x.comp + g;
  for (int t = 0; t < tiles; ++t, bytes += M * ld, next = w) {
    i32x16 sums[M];
    EACH (int m = 0; m < M; ++m)
      sums[m] = kStartsAtComp && !starts_at_zero(F) ? splati(comp[m * x.groups]) : i32x16{};
    sum_group<M, F>(w, start, columns, bytes, ld, next, sums);
    EACH (int m = 0; m < M; ++m, ++totals, scale += x.groups, comp += x.groups) {
      f32x16 total = loadf(*totals);
      add_sum<F, Zero>(n, sums[m], *comp, *scale, total);
      store(*totals, total);
    }
  }
}

typedef void (*GroupKernel)(const uint8_t*, const int16_t*, const GroupNumbers&, int, const Act&, int,
                            const uint8_t*, size_t, int, const uint8_t*, float (*)[kPanel]);

template <Format F, bool Zero, int M = kTogether>
GroupKernel group_kernel(int rows) {
  if constexpr (M > 1)
    if (rows < M) return group_kernel<F, Zero, M - 1>(rows);
  return add_group<M, F, Zero>;
}

// Rows in tiles of about the same size, each of whole products but for the last one: some that have one
// product more, the others, and the last one if it has fewer rows.
struct Tiles {
  int rows[3], count[3];
  explicit Tiles(int all) : rows{}, count{} {
    const int steps = (all + kRowStep - 1) / kRowStep, tiles = (steps * kRowStep + kTogether - 1) / kTogether;
    const int least = steps / tiles, more = steps % tiles, missing = steps * kRowStep - all;
    rows[0] = (least + 1) * kRowStep, count[0] = more;
    rows[1] = least * kRowStep, count[1] = tiles - more - (missing ? 1 : 0);
    rows[2] = least * kRowStep - missing, count[2] = missing ? 1 : 0;
  }
};

// At most kBlockRows rows times at most kManyPanels panels.
template <Format F, bool Zero>
void block_rows(const Matrix& w, int panel, int count, const Act& x, int rows, size_t ahead, float* out,
                int ldo) {
  constexpr bool made = makes_rows(F);
  Unpacked unpacked;
  alignas(64) PanelSums totals[kManyPanels] = {};
  alignas(64) uint8_t made_rows[made ? kBlockRows * kMadeBytes : 64];
  const Tiles tiles(rows);
  GroupKernel kernels[3];
  for (int t = 0; t < 3; ++t) kernels[t] = group_kernel<F, Zero>(tiles.rows[t]);
  for (int g = 0, k = 0; k < w.kp; ++g, k += w.group) {
    const int columns = k + w.group < w.kp ? w.group : w.kp - k;
    if constexpr (made) make_rows(x, rows, k, columns, made_rows);
    const uint8_t* from = made ? made_rows : rows_at<F>(x, k);
    const size_t ld = made ? kMadeBytes : x.ld;
    for (int i = 0; i < count; ++i) {
      const uint8_t* record = w.record(panel + i);
      const uint8_t* data = record + w.head_bytes() + static_cast<size_t>(k) * stream_bytes(F);
      const uint8_t* of_w = unpack_group<F>(data, columns, unpacked);
      const uint8_t* next = ahead ? data + ahead : of_w;
      const GroupNumbers n = group_numbers<F, Zero>(w, record + 64, g);
      for (int t = 0, m = 0; t < 3; m += tiles.rows[t] * tiles.count[t], ++t) {
        if (!tiles.count[t]) continue;
        kernels[t](of_w, unpacked.start, n, columns, row(x, m), g, from + m * ld, ld, tiles.count[t], next,
                   totals[i] + m);
        next = of_w;
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    const f32x16 scale = load<f32x16>(w.record(panel + i));
    for (int m = 0; m < rows; ++m)
      store(out + static_cast<size_t>(m) * ldo + 16 * i, loadf(totals[i][m]) * scale);
  }
}

typedef void (*BlockKernel)(const Matrix&, int, int, const Act&, int, size_t, float*, int);

template <size_t... I>
BlockKernel block_kernel(const Matrix& w, std::index_sequence<I...>) {
  BlockKernel found = nullptr;
  const auto look = [&]<Format F>() {
    if constexpr (traits(F).quantized() && traits(F).planes == Planes::none) {
      if (w.format != F) return;
      found = block_rows<F, false>;
      if constexpr (traits(F).zeros())
        if (w.zero) found = block_rows<F, true>;
    }
  };
  (look.template operator()<Format{I}>(), ...);
  return found;
}

// Panels times the rows if this is the faster way, else nothing and false.
bool many_rows(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (rows * w.act_terms <= kRowsAtOnce || !w.quantized() || w.group > kMostGroup || !has_rows(x))
    return false;
  const BlockKernel kernel = block_kernel(w, std::make_index_sequence<std::size(kFormats)>());
  if (!kernel) return false;
  const int terms = w.act_terms, at_once = kBlockRows / terms, blocks = (rows + at_once - 1) / at_once;
  for (int i = 0; i < count; i += kManyPanels) {
    const int together = count - i < kManyPanels ? count - i : kManyPanels;
    for (int b = 0, m = 0; b < blocks; ++b) {
      const int some = (rows - m + blocks - b - 1) / (blocks - b);
      Act block = row(x, m);
      block.terms = 1;  // each is a row
      add_terms<kBlockRows * kManyPanels>(
          terms, some, kPanel * together, out + static_cast<size_t>(m) * ldo + kPanel * i, ldo,
          [&](float* to, int ld) {
            kernel(w, panel + i, together, block, some * terms, b ? 0 : w.stride * together, to, ld);
          });
      m += some;
    }
  }
  return true;
}

}  // namespace
}  // namespace farthing
#endif
