// Online softmax attention over a block of latent keys, in float32. Included by kernels_*.cpp.
namespace farthing {
namespace {

// Query rows, keys and vectors of values whose sums registers hold.
#if defined(__AVX512F__)
constexpr int kQueryRows = 4, kQueryKeys = 4, kMixVectors = 4;
#elif defined(__AVX2__)
constexpr int kQueryRows = 3, kQueryKeys = 2, kMixVectors = 2;
#else
constexpr int kQueryRows = 2, kQueryKeys = 1, kMixVectors = 1;
#endif

// f.operator()<R>(first row) for every few query rows.
template <int R = kQueryRows, class F>
inline void for_query_rows(int rows, F&& f, int at = 0) {
  for (; at + R <= rows; at += R) f.template operator()<R>(at);
  if constexpr (R > 1)
    if (at < rows) for_query_rows<R - 1>(rows, f, at);
}

// R query rows against some keys, summed from `first` over the width.
template <int R>
inline void dots(const float* q, const float* k, int first, int width, float* scores, int lds, int keys) {
  f32x16 acc[R * kQueryKeys] = {};
  for (int i = first; i < width; i += 16) {
    f32x16 key[kQueryKeys];
    EACH (int s = 0; s < kQueryKeys; ++s)
      key[s] = loadf(k + static_cast<size_t>(s < keys ? s : 0) * width + i);
    EACH (int r = 0; r < R; ++r) {
      const f32x16 v = loadf(q + static_cast<size_t>(r) * width + i);
      EACH (int s = 0; s < kQueryKeys; ++s) acc[r * kQueryKeys + s] = fma(v, key[s], acc[r * kQueryKeys + s]);
    }
  }
  EACH (int r = 0; r < R; ++r)
    EACH (int s = 0; s < kQueryKeys; ++s)
      if (s < keys) scores[r * lds + s] = reduce_add(acc[r * kQueryKeys + s]);
}

// How far scores may exceed a row's reference before it moves: weights up to e^8 lose nothing in float32 or
// bfloat16, and most blocks then leave the running outputs as they are.
constexpr float kSlack = 8.0f;

// scores [rows][kKeyBlock] -> weights in place; rescales out and sum where the reference moved.
inline void online_softmax(const AttendBlock& b, float* scores) {
  for (int r = 0; r < b.rows; ++r) {
    float* s = scores + r * kKeyBlock;
    const int seen = b.visible[r] < 0 ? 0 : b.visible[r] < b.keys ? b.visible[r] : b.keys;
    const int hidden = b.hidden && b.hidden[r] > 0 ? b.hidden[r] : 0;
    for (int i = seen; i < kKeyBlock; ++i) s[i] = kLowest;
    if (seen <= hidden) {
      for (int i = 0; i < kKeyBlock; ++i) s[i] = 0.0f;
      continue;
    }
    for (int i = 0; i < hidden; ++i) s[i] = kLowest;
    f32x16 best = loadf(s);
    for (int i = 16; i < kKeyBlock; i += 16) best = max(best, loadf(s + i));
    const float top = reduce_max(best), before = b.max[r];
    if (top > before + kSlack) {
      const float shrink = exp(splat(before - top))[0];
      b.max[r] = top;
      b.sum[r] *= shrink;
      if (!b.fresh) {
        float* o = b.out + static_cast<size_t>(r) * b.latent;
        for_lanes(b.latent, [&](int i) { store(o + i, loadf(o + i) * shrink); });
      }
    }
    f32x16 total = {};
    for (int i = 0; i < kKeyBlock; i += 16) {
      const f32x16 e = exp_below(loadf(s + i) - b.max[r]);
      total += e;
      store(s + i, e);
    }
    b.sum[r] += reduce_add(total);
  }
}

// out[r][0, 16 C) += weights[r][s] * keys[s][0, 16 C); out is not read where it is fresh.
template <int R, int C>
inline void mix(const AttendBlock& b, const float* weights, const float* k, float* out) {
  const int latent = b.latent;
  f32x16 acc[R * C];
  EACH (int r = 0; r < R; ++r)
    EACH (int c = 0; c < C; ++c)
      acc[r * C + c] = b.fresh ? f32x16{} : loadf(out + static_cast<size_t>(r) * latent + 16 * c);
  for (int s = 0; s < b.keys; ++s, k += b.width) {
    f32x16 weight[R];
    EACH (int r = 0; r < R; ++r) weight[r] = splat(weights[r * kKeyBlock + s]);
    EACH (int c = 0; c < C; ++c) {
      const f32x16 v = loadf(k + 16 * c);
      EACH (int r = 0; r < R; ++r) acc[r * C + c] = fma(v, weight[r], acc[r * C + c]);
    }
  }
  EACH (int r = 0; r < R; ++r)
    EACH (int c = 0; c < C; ++c) store(out + static_cast<size_t>(r) * latent + 16 * c, acc[r * C + c]);
}

template <int R>
void attend_rows(const AttendBlock& b, int first, float* scores) {
  float* o = b.out + static_cast<size_t>(first) * b.latent;
  int c = 0;
  for (; c + 16 * kMixVectors <= b.latent; c += 16 * kMixVectors)
    mix<R, kMixVectors>(b, scores, b.k32 + c, o + c);
  for (; c < b.latent; c += 16) mix<R, 1>(b, scores, b.k32 + c, o + c);
}

void attend(const AttendBlock& b) {
  alignas(64) float scores[16 * kKeyBlock];
  for_query_rows(b.rows, [&]<int R>(int r) {
    const float* q = b.q + static_cast<size_t>(r) * b.width;
    for (int s = 0; s < b.keys; s += kQueryKeys) {
      const int keys = b.keys - s < kQueryKeys ? b.keys - s : kQueryKeys;
      dots<R>(q, b.k32 + static_cast<size_t>(s) * b.width, b.first, b.width, scores + r * kKeyBlock + s,
              kKeyBlock, keys);
    }
  });
  online_softmax(b, scores);
  for_query_rows(b.rows, [&]<int R>(int r) { attend_rows<R>(b, r, scores + r * kKeyBlock); });
}

}  // namespace
}  // namespace farthing
