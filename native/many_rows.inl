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
  constexpr bool nibbles = traits(F).nibbles(), grouped = traits(F).grouped();
  constexpr int bytes = 8 * traits(F).bytes_a_column();  // of 8 columns
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
    EACH (int m = 0; m < M; ++m) acc[m] = splati(x.comp[m * groups + g]);
    for (int k = 0; k < columns; k += 8, data[0] += bytes, q += 8) {
      bytes64 a = load_bytes(data[0]), b;
      if constexpr (nibbles) {
        b = factors<F>(high_nibbles(a));
        a = factors<F>(low_nibbles(a));
      } else {
        b = load_bytes(data[0] + 64);
      }
      add_rows<0>(acc, a, q, odd, rows);
      add_rows<4>(acc, b, q, odd, rows);
    }
    const f32x16 scale =
        grouped ? half_to_float(reinterpret_cast<const uint16_t*>(record + 64) + g * 16) : splat(1.0f);
    EACH (int m = 0; m < M; ++m) {
      const float of_row = x.scale[m * groups + g];
      total[m] = fma(to_float(acc[m]), grouped ? scale * of_row : splat(of_row), total[m]);
    }
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

// The panels times the rows if they are many and of such a format, else nothing and false.
bool tile_of_rows(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  PanelKernel (*kernel)(int) = w.format == Format::q8    ? rows_kernel<Format::q8>
                               : w.format == Format::q4  ? rows_kernel<Format::q4>
                               : w.format == Format::nl4 ? rows_kernel<Format::nl4>
                                                         : nullptr;
  if (rows < kLongFrom || w.zero || !kernel) return false;
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
