// Index scores: heads in the lanes, a key's numbers broadcast, so that the sum over heads stays in registers.
// Included by kernels_*.cpp.
namespace farthing {
namespace {

#if defined(__AVX512F__)
constexpr int kIndexKeys = 6, kIndexHeads = 4;  // keys, and vectors of 16 heads, of a tile
#else
constexpr int kIndexKeys = 2, kIndexHeads = 2;
#endif

// total[k] += w ReLU(q . key k) for 16 G heads from `head`.
template <int K, int G>
inline void index_tile(const IndexBlock& b, int key, int head, f32x16* total) {
  f32x16 acc[K][G] = {};
  const float *q = b.q32 + head, *k = b.k32 + static_cast<size_t>(key) * b.dim;
  for (int i = 0; i < b.dim; ++i, q += b.heads) {
    f32x16 v[G];
    for (int g = 0; g < G; ++g) v[g] = loadf(q + 16 * g);
    for (int n = 0; n < K; ++n) {
      const f32x16 x = splat(k[static_cast<size_t>(n) * b.dim + i]);
      for (int g = 0; g < G; ++g) acc[n][g] = fma(v[g], x, acc[n][g]);
    }
  }
  for (int n = 0; n < K; ++n)
    for (int g = 0; g < G; ++g)
      total[n] = fma(max(acc[n][g], f32x16{}), loadf(b.w + head + 16 * g), total[n]);
}

template <int K>
inline void index_keys(const IndexBlock& b, int key) {
  f32x16 total[K] = {};
  int head = 0;
  for (; head + 16 * kIndexHeads <= b.heads; head += 16 * kIndexHeads)
    index_tile<K, kIndexHeads>(b, key, head, total);
  for (; head < b.heads; head += 16) index_tile<K, 1>(b, key, head, total);
  for (int n = 0; n < K; ++n) b.out[key + n] = reduce_add(total[n]);
}

void index_scores(const IndexBlock& b) {
  int key = 0;
  for (; key + kIndexKeys <= b.keys; key += kIndexKeys) index_keys<kIndexKeys>(b, key);
  for (; key < b.keys; ++key) index_keys<1>(b, key);
}

}  // namespace
}  // namespace farthing
