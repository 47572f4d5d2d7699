// Products of bfloat16 with NEON's products of matrices (bfmmla): two rows by two columns, four numbers of
// each. Included by kernels_neon_bf16.cpp.
//
// bfloat16 weights are exact, and activations the sum of two bfloat16, as on AMX. Such a product rounds its
// sums in its own way, so one row takes it too: results do not depend on the number of rows.
namespace farthing {
namespace {

constexpr int kRowPairs = 2;  // whose sums by 16 columns fit in registers

// Sums of 2 * Pairs rows by 16 columns. x: numbers of rows, hi alone or hi and lo; the last of the `rows`
// stands in for missing ones. b: [depth / 2][columns][2].
template <int Pairs, int Terms>
[[gnu::always_inline]] inline void sum_matrices(const uint16_t* const (&x)[Terms], size_t ld, int rows,
                                                const uint16_t* b, int columns, int depth,
                                                f32x16 (&sums)[2 * Pairs]) {
  float32x4_t acc[Pairs * 8] = {};  // of two rows, each two columns
  size_t at[2 * Pairs];
  EACH (int m = 0; m < 2 * Pairs; ++m) at[m] = static_cast<size_t>(m < rows ? m : rows - 1) * ld;
  for (int k = 0; k < depth; k += 4, b += 4 * columns) {
    bfloat16x8_t w[8];
    EACH (int i = 0; i < 4; ++i) {
      const uint32x4_t first = vreinterpretq_u32_u16(vld1q_u16(b + 8 * i)),
                       second = vreinterpretq_u32_u16(vld1q_u16(b + 2 * columns + 8 * i));
      w[2 * i] = vreinterpretq_bf16_u32(vzip1q_u32(first, second));
      w[2 * i + 1] = vreinterpretq_bf16_u32(vzip2q_u32(first, second));
    }
    EACH (int t = 0; t < Terms; ++t)
      EACH (int p = 0; p < Pairs; ++p) {
        const bfloat16x8_t two = vreinterpretq_bf16_u16(
            vcombine_u16(vld1_u16(x[t] + at[2 * p] + k), vld1_u16(x[t] + at[2 * p + 1] + k)));
        EACH (int i = 0; i < 8; ++i) acc[8 * p + i] = vbfmmlaq_f32(acc[8 * p + i], two, w[i]);
      }
  }
  typedef decltype(f32x16::a.a) four;
  EACH (int m = 0; m < 2 * Pairs; ++m) {
    const auto of = [&](int i) __attribute__((always_inline)) {
      const float64x2_t a = vreinterpretq_f64_f32(acc[m / 2 * 8 + 2 * i]),
                        c = vreinterpretq_f64_f32(acc[m / 2 * 8 + 2 * i + 1]);
      return (four)(m % 2 ? vzip2q_f64(a, c) : vzip1q_f64(a, c));
    };
    sums[m] = {{of(0), of(1)}, {of(2), of(3)}};
  }
}

template <int Pairs>
void panel_matrices(const Matrix& w, int panel, const Act& x, int rows, float* out, int ldo) {
  const auto* data = reinterpret_cast<const uint16_t*>(w.record(panel) + w.head_bytes());
  f32x16 sums[2 * Pairs];
  sum_matrices<Pairs, 2>({x.hi, x.lo}, x.ld, rows, data, kPanel, w.kp, sums);
  EACH (int m = 0; m < 2 * Pairs; ++m)
    if (m < rows) store(out + m * ldo, sums[m]);
}

void bf16_tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (!w.format_traits().halves || !x.hi) return tile(w, panel, count, x, rows, out, ldo);
  for (int i = 0; i < count; ++i)
    for (int m = 0; m < rows; m += 2 * kRowPairs) {
      const auto kernel = rows - m > 2 ? panel_matrices<kRowPairs> : panel_matrices<1>;
      kernel(w, panel + i, row(x, m), rows - m, out + static_cast<size_t>(m) * ldo + kPanel * i, ldo);
    }
}

void product_matrices(const Product& p) {
  for (int column = 0; column < p.columns; column += 16)
    for (int row = 0; row < p.rows; row += 2 * kRowPairs) {
      f32x16 sums[2 * kRowPairs];
      sum_matrices<kRowPairs, 1>({static_cast<const uint16_t*>(p.a) + static_cast<size_t>(row) * p.lda},
                                 p.lda, p.rows, static_cast<const uint16_t*>(p.b) + 2 * column, p.columns,
                                 p.depth, sums);
      float* c = p.c + static_cast<size_t>(row) * p.ldc + column;
      EACH (int m = 0; m < 2 * kRowPairs; ++m)
        store(c + m * p.ldc, p.add ? loadf(c + m * p.ldc) + sums[m] : sums[m]);
    }
}

// Two rows of 16 floats to pairs.
inline u32x16 pair_up(f32x16 even, f32x16 odd) {
  return each_register<u32x16>(
      [](auto a, auto b) {
        const bfloat16x8_t both = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)a), (float32x4_t)b);
        const uint16x8_t v = vreinterpretq_u16_bf16(both);
        return vzip1q_u16(v, vextq_u16(v, v, 4));
      },
      even, odd);
}

void pack_pairs(const float* in, int depth, int columns, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int k = 0; k < depth; k += 2, in += 2 * columns, to += 2 * columns)
    for (int i = 0; i < columns; i += 16) store(to + 2 * i, pair_up(loadf(in + i), loadf(in + columns + i)));
}

void weigh_pairs(const Scores& s) {
  uint16_t* weights = static_cast<uint16_t*>(s.weights);
  for (int lane = 0; lane < kTileQueries; lane += 16) {
    const f32x16 reference = new_references(s, lane);
    f32x16 total = {};
    for (int key = 0; key < s.keys; key += 2) {
      const float* at = s.scores + key * kTileQueries + lane;
      const f32x16 even = exp(loadf(at) - reference), odd = exp(loadf(at + kTileQueries) - reference);
      total += even + odd;
      store(weights + key * kTileQueries + 2 * lane, pair_up(even, odd));
    }
    store(s.sum + lane, loadf(s.sum + lane) + total);
  }
}

}  // namespace
}  // namespace farthing
