// Index scores of bfloat16 queries and keys (vdpbf16ps), two numbers of a key broadcast at a time.
// Included by kernels_avx512_bf16.cpp and kernels_amx.cpp.
namespace farthing {
namespace {

template <int K, int G>
inline void bf16_index_tile(const IndexBlock& b, int key, int head, __m512* total) {
  __m512 acc[K][G];
#pragma GCC unroll 8
  for (int n = 0; n < K; ++n)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) acc[n][g] = _mm512_setzero_ps();
  const uint16_t *q = b.q16 + 2 * head, *k = b.k16 + static_cast<size_t>(key) * b.dim;
  for (int i = 0; i < b.dim; i += 2, q += 2 * b.heads) {
    __m512i v[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) v[g] = _mm512_loadu_si512(q + 32 * g);
#pragma GCC unroll 8
    for (int n = 0; n < K; ++n) {
      const __m512i x = _mm512_set1_epi32(load<int32_t>(k + static_cast<size_t>(n) * b.dim + i));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[n][g] = _mm512_dpbf16_ps(acc[n][g], (__m512bh)v[g], (__m512bh)x);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < K; ++n)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
      total[n] = _mm512_fmadd_ps(_mm512_max_ps(acc[n][g], _mm512_setzero_ps()),
                                 _mm512_loadu_ps(b.w + head + 16 * g), total[n]);
}

template <int K>
inline void bf16_index_keys(const IndexBlock& b, int key) {
  __m512 total[K];
  for (int n = 0; n < K; ++n) total[n] = _mm512_setzero_ps();
  int head = 0;
  for (; head + 64 <= b.heads; head += 64) bf16_index_tile<K, 4>(b, key, head, total);
  for (; head < b.heads; head += 16) bf16_index_tile<K, 1>(b, key, head, total);
  for (int n = 0; n < K; ++n) b.out[key + n] = _mm512_reduce_add_ps(total[n]);
}

void bf16_index_scores(const IndexBlock& b) {
  if (!b.q16) return index_scores(b);
  int key = 0;
  for (; key + 6 <= b.keys; key += 6) bf16_index_keys<6>(b, key);
  for (; key < b.keys; ++key) bf16_index_keys<1>(b, key);
}

}  // namespace
}  // namespace farthing
