// Online softmax attention over latent keys in bfloat16 (vdpbf16ps), read where the cache has them. Keys are
// exact; queries and weights are rounded to bfloat16, sums are float32. Included by kernels_avx512_bf16.cpp.
namespace farthing {
namespace {

inline __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

// The sums of 16 vectors, in their order.
inline __m512 sum_each(const __m512* a) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512* v = a + 4 * i;
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
    four[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  const auto halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

// The next block's keys are prefetched into L2 at an even rate while this one is computed, because a KV cache
// larger than the processor's caches is read as a stream. L1 does not hold two blocks, and often not one:
// rows of 1 KB share four of its sets. Of every four keys' latents, the scores prefetch two and the weighted
// sum the other two; where scores do not read latents, the weighted sum prefetches all. Scores prefetch what
// follows the latents.

// Scores of 4 query rows against 4 keys; missing rows and keys repeat the first. Prefetches the latents of N
// keys of `next`, and the rest of N keys and the second ones after them.
template <int N>
inline void score_block(const AttendBlock& b, const uint16_t* q, int rows, const uint16_t* const* keys,
                        float* scores, const uint16_t* const* next) {
  __m512 acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
  const uint16_t* row[4];
  for (int r = 0; r < 4; ++r) row[r] = q + static_cast<size_t>(r < rows ? r : 0) * b.width;
  const auto step = [&](int k) __attribute__((always_inline)) {
    __m512i key[4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) key[s] = _mm512_loadu_si512(keys[s] + k);
    for (int n = 0; n < N; ++n) prefetch_far(next[n] + k);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512i v = _mm512_loadu_si512(row[r] + k);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) acc[4 * r + s] = dot_pairs(acc[4 * r + s], v, key[s]);
    }
  };
  int k = b.first;
  for (; k < b.latent; k += 32) step(k);
  for (; k < b.width; k += 32) {
    for (int n = 0; n < N; ++n) prefetch_far(next[n + 2] + k);
    step(k);
  }
  alignas(64) float sums[16];
  _mm512_store_ps(sums, sum_each(acc));
  for (int r = 0; r < rows; ++r) memcpy(scores + r * kKeyBlock, sums + 4 * r, 16);
}

// out[R][32] += weights[R][keys] * keys[keys][32], two keys at a time; out is not read where it is fresh.
// Prefetches `Ahead` of the two keys that are as far in the next block.
template <int R, int Ahead>
inline void mix_pairs(const uint16_t* weights, const uint16_t* const* keys, int at, int pairs, float* out,
                      int latent, bool fresh) {
  alignas(64) static constexpr uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  __m512 a[R], b[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    a[r] = fresh ? f32x16{} : loadf(out + r * latent);
    b[r] = fresh ? f32x16{} : loadf(out + r * latent + 16);
  }
  for (int p = 0; p < pairs; ++p) {
    if constexpr (Ahead == 1) prefetch_far(keys[kKeyBlock + 4 * (p / 2) + 2 + p % 2] + at);
    if constexpr (Ahead == 2)
      prefetch_far(keys[kKeyBlock + 2 * p] + at), prefetch_far(keys[kKeyBlock + 2 * p + 1] + at);
    const __m512i even = _mm512_loadu_si512(keys[2 * p] + at), odd = _mm512_loadu_si512(keys[2 * p + 1] + at);
    const __m512i x = _mm512_permutex2var_epi16(even, first, odd),
                  y = _mm512_permutex2var_epi16(even, second, odd);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i w = _mm512_set1_epi32(load<int32_t>(weights + r * kKeyBlock + 2 * p));
      a[r] = dot_pairs(a[r], w, x);
      b[r] = dot_pairs(b[r], w, y);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    store(out + r * latent, f32x16(a[r])), store(out + r * latent + 16, f32x16(b[r]));
}

template <int Ahead, int R = 8>
inline void mix_rows(int rows, const uint16_t* weights, const uint16_t* const* keys, int pairs, float* out,
                     int latent, bool fresh) {
  if constexpr (R > 1)
    if (rows < R) return mix_rows<Ahead, R - 1>(rows, weights, keys, pairs, out, latent, fresh);
  for (int at = 0; at < latent; at += 32)
    mix_pairs<R, Ahead>(weights, keys, at, pairs, out + at, latent, fresh);
}

inline void rows_to_bf16(const float* x, int n, uint16_t* out) {  // n % 32 == 0
  for (int i = 0; i < n; i += 32)
    _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(loadf(x + i + 16), loadf(x + i)));
}

void bf16_attend(const AttendBlock& b) {
  if (!b.rows16) return attend(b);
  alignas(64) float scores[16 * kKeyBlock];
  alignas(64) uint16_t weights[16 * kKeyBlock];
  const int keys = round_up(b.keys, 4);
  const uint16_t* const* next = b.rows16 + kKeyBlock;
  for (int s = 0; s < keys; s += 4)
    for (int r = 0; r < b.rows; r += 4) {
      const uint16_t* q = b.q16 + static_cast<size_t>(r) * b.width;
      const int some = b.rows - r < 4 ? b.rows - r : 4;
      float* to = scores + r * kKeyBlock + s;
      if (b.rows <= 4) score_block<2>(b, q, some, b.rows16 + s, to, next + s);
      else if (r < 8) score_block<1>(b, q, some, b.rows16 + s, to, next + s + r / 4);
      else score_block<0>(b, q, some, b.rows16 + s, to, next);
    }
  online_softmax(b, scores);
  rows_to_bf16(scores, b.rows * kKeyBlock, weights);
  const auto mix = b.first ? mix_rows<2> : mix_rows<1>;
  mix(b.rows < 8 ? b.rows : 8, weights, b.rows16, keys / 2, b.out, b.latent, b.fresh);
  if (b.rows > 8)
    mix_rows<0>(b.rows - 8, weights + 8 * kKeyBlock, b.rows16, keys / 2,
                b.out + static_cast<size_t>(8) * b.latent, b.latent, b.fresh);
}

}  // namespace
}  // namespace farthing
