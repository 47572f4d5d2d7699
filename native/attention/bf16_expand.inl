// Inner loops of expanded attention on pairs of bfloat16 (vdpbf16ps). Included by kernels_avx512_bf16.cpp and
// kernels_amx.cpp.
namespace farthing {
namespace {

template <int M, int V>
inline void product_pairs_tile(const Product& p, int row, int column) {
  __m512 acc[M][V];
  float* c = p.c + static_cast<size_t>(row) * p.ldc + column;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      acc[m][v] = p.add ? _mm512_loadu_ps(c + m * p.ldc + 16 * v) : _mm512_setzero_ps();
  const uint16_t *a = static_cast<const uint16_t*>(p.a) + static_cast<size_t>(row) * p.lda,
                 *b = static_cast<const uint16_t*>(p.b) + 2 * column;
  for (int k = 0; k < p.depth; k += 2, b += 2 * p.columns) {
    __m512i x[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_si512(b + 32 * v);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512i s = _mm512_set1_epi32(load<int32_t>(a + static_cast<size_t>(m) * p.lda + k));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], (__m512bh)s, (__m512bh)x[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + m * p.ldc + 16 * v, acc[m][v]);
}

void product_pairs(const Product& p) {
  for_columns<3>(p.columns, [&]<int V>(int column) {
    for (int row = 0; row < p.rows; row += 8) product_pairs_tile<8, V>(p, row, column);
  });
}

// Two rows of 16 floats to pairs.
inline __m512i pair_up(__m512 even, __m512 odd) {
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

void pack_pairs(const float* in, int depth, int columns, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int k = 0; k < depth; k += 2, in += 2 * columns, to += 2 * columns)
    for (int i = 0; i < columns; i += 16)
      _mm512_storeu_si512(to + 2 * i, pair_up(_mm512_loadu_ps(in + i), _mm512_loadu_ps(in + columns + i)));
}

// 2^x for x up to a few thousands, relative error 4e-6: weights are rounded to bfloat16.
inline __m512 exp2_short(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 1);  // x - floor(x)
  __m512 p = _mm512_set1_ps(1.3534167e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.2011464e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4144275e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9300383e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(p, x);
}

void weigh_pairs(const Scores& s) {
  const __m512 log2e = _mm512_set1_ps(1.44269504f);
  uint16_t* weights = static_cast<uint16_t*>(s.weights);
  for (int lane = 0; lane < kTileQueries; lane += 16) {
    const __m512 reference = new_references(s, lane);
    const __m512 offset = _mm512_mul_ps(reference, log2e);
    __m512 total = _mm512_setzero_ps();
    const float* at = s.scores + lane;
    uint16_t* to = weights + 2 * lane;
    for (int key = 0; key < s.keys; key += 2, at += 2 * kTileQueries, to += 2 * kTileQueries) {
      const __m512 even = exp2_short(_mm512_fmsub_ps(_mm512_loadu_ps(at), log2e, offset)),
                   odd = exp2_short(_mm512_fmsub_ps(_mm512_loadu_ps(at + kTileQueries), log2e, offset));
      total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
      _mm512_storeu_si512(to, pair_up(even, odd));
    }
    _mm512_storeu_ps(s.sum + lane, _mm512_add_ps(_mm512_loadu_ps(s.sum + lane), total));
  }
}

constexpr Wide wide_pairs = {product_pairs, pack_pairs, weigh_pairs};

}  // namespace
}  // namespace farthing
