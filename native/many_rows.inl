// Dense panels of integers times many rows with AVX-512: the integers and float sums of gemm.inl, one panel
// by up to twelve rows instead of two panels by four. Weights are unpacked once for all of them, and all sums
// stay in registers. Included by gemm.inl.
#if defined(__AVX512VNNI__)
namespace farthing {
namespace {

constexpr int kLongRows = 12, kLongFrom = 8;  // rows of a tile; rows that it pays for
constexpr int kShortest = 6;                  // tile: 13 rows are 7 and 6

// 1, 3, 5 … times the distance between rows. Row m is then at an address of one instruction, a pointer plus
// one of these times 1, 2, 4 or 8. (Compilers keep a pointer per row otherwise, some of them in vector
// registers.)
typedef size_t OddStrides[kLongRows / 2];

// acc += dot products with the four bytes of row m. An instruction that broadcasts them itself, because two
// threads on one core share what it can issue.
template <size_t Row, int Offset>
[[gnu::always_inline]] inline void add_row(i32x16& acc, bytes64 u, const int8_t* p, const OddStrides& odd) {
  constexpr size_t scale = Row & -Row;  // the power of two in Row
  typedef const int8_t all[];
  if constexpr (Row == 0)
    asm("vpdpbusd %c3(%2)%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "r"(p), "i"(Offset), "m"(*(all*)p));
  else
    asm("vpdpbusd %c3(%2,%4,%c5)%{1to16%}, %1, %0"
        : "+v"(acc)
        : "v"(u), "r"(p), "i"(Offset), "r"(odd[Row / scale / 2]), "i"(scale), "m"(*(all*)p));
}

template <int Offset, size_t... Row>
[[gnu::always_inline]] inline void add_rows(i32x16* acc, bytes64 u, const int8_t* p, const OddStrides& odd,
                                            std::index_sequence<Row...>) {
  (add_row<Row, Offset>(acc[Row], u, p, odd), ...);
}

template <int M, Format F>
void panel_of_rows(const Matrix& w, int panel, const Act& x, Ahead ahead, float* out, int ldo) {
  constexpr int step = traits(F).step(), bytes = step * traits(F).bytes_a_column();
  constexpr std::make_index_sequence<M> rows;
  const uint8_t* const record = w.record(panel);
  const uint8_t* data[1] = {record + w.head_bytes()};
  const int8_t* q = x.q;
  const size_t ld = x.ld, groups = x.groups;
  OddStrides odd;
  for (int i = 0; i < kLongRows / 2; ++i) odd[i] = (2 * i + 1) * ld;
  f32x16 total[M] = {};
  for (int g = 0, k0 = 0; k0 < w.kp; ++g, k0 += w.group) {
    const int columns = w.kp - k0 < w.group ? w.kp - k0 : w.group;
    fetch_ahead<M, 1>(data, ahead, g, traits(F).bytes_a_column() * w.group);
    i32x16 acc[M];
    EACH (int m = 0; m < M; ++m) acc[m] = starts_at_zero(F) ? i32x16{} : splati(x.comp[m * groups + g]);
    for (int k = 0; k < columns; k += step, data[0] += bytes, q += step)
      for_quads<F>([&]<int I>() __attribute__((always_inline)) {
        add_rows<4 * I>(acc, quad<F, I>(data[0]), q, odd, rows);
      });
    const GroupNumbers n = group_numbers<F, false>(w, record + 64, g);
    EACH (int m = 0; m < M; ++m)
      add_sum<F, false>(n, acc[m], x.comp[m * groups + g], x.scale[m * groups + g], total[m]);
  }
  const f32x16 row = load<f32x16>(record);
  EACH (int m = 0; m < M; ++m) store(out + m * ldo, total[m] * row);
}

template <Format F, int M = kLongRows>
PanelKernel rows_kernel(int rows) {
  if constexpr (M > kShortest)
    if (rows < M) return rows_kernel<F, M - 1>(rows);
  return panel_of_rows<M, F>;
}

template <size_t... I>
PanelKernel rows_kernel_of(const Matrix& w, int rows, std::index_sequence<I...>) {
  PanelKernel found = nullptr;
  const auto try_one = [&]<Format F>() {
    if constexpr (traits(F).quantized() && traits(F).planes == Planes::none)
      if (w.format == F) found = rows_kernel<F>(rows);
  };
  (try_one.template operator()<Format{I}>(), ...);
  return found;
}

// The panels times the rows if they are many and of such a format, else nothing and false.
bool tile_of_rows(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  const auto kernel = [&](int some) {
    return rows_kernel_of(w, some, std::make_index_sequence<std::size(kFormats)>());
  };
  if (rows < kLongFrom || w.zero || !kernel(rows)) return false;
  const int blocks = (rows + kLongRows - 1) / kLongRows, groups = w.groups();
  for (int i = 0; i < count; ++i)
    for (int b = 0, m = 0; b < blocks; ++b) {
      const int some = (rows - m + blocks - b - 1) / (blocks - b);
      const Ahead ahead{w.stride, groups * b / blocks, groups * (b + 1) / blocks};
      kernel(some)(w, panel + i, row(x, m), ahead, out + static_cast<size_t>(m) * ldo + 16 * i, ldo);
      m += some;
    }
  return true;
}

}  // namespace
}  // namespace farthing
#endif
