// Online softmax attention over a block of latent keys, in float32. Included by kernels_*.cpp.
namespace farthing {
namespace {

// 4 query rows against 4 keys, summed from `first` over the width.
template <int R>
inline void dots(const float* q, const float* k, int first, int width, float* scores, int lds, int keys) {
  f32x16 acc[R][4] = {};
  for (int i = first; i < width; i += 16) {
    f32x16 key[4];
    for (int s = 0; s < 4; ++s) key[s] = loadf(k + static_cast<size_t>(s < keys ? s : 0) * width + i);
    for (int r = 0; r < R; ++r) {
      const f32x16 v = loadf(q + static_cast<size_t>(r) * width + i);
      for (int s = 0; s < 4; ++s) acc[r][s] = fma(v, key[s], acc[r][s]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < keys; ++s) scores[r * lds + s] = reduce_add(acc[r][s]);
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
  f32x16 acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      acc[r][c] = b.fresh ? f32x16{} : loadf(out + static_cast<size_t>(r) * latent + 16 * c);
  for (int s = 0; s < b.keys; ++s, k += b.width)
    for (int c = 0; c < C; ++c) {
      const f32x16 v = loadf(k + 16 * c);
      for (int r = 0; r < R; ++r) acc[r][c] = fma(v, splat(weights[r * kKeyBlock + s]), acc[r][c]);
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + static_cast<size_t>(r) * latent + 16 * c, acc[r][c]);
}

template <int R>
void attend_rows(const AttendBlock& b, int first, float* scores) {
  float* o = b.out + static_cast<size_t>(first) * b.latent;
  int c = 0;
  for (; c + 64 <= b.latent; c += 64) mix<R, 4>(b, scores, b.k32 + c, o + c);
  for (; c < b.latent; c += 16) mix<R, 1>(b, scores, b.k32 + c, o + c);
}

void attend(const AttendBlock& b) {
  alignas(64) float scores[16 * kKeyBlock];
  for (int r = 0; r < b.rows; r += 4)
    for (int s = 0; s < b.keys; s += 4) {
      const int keys = b.keys - s < 4 ? b.keys - s : 4;
      const float *q = b.q + static_cast<size_t>(r) * b.width, *k = b.k32 + static_cast<size_t>(s) * b.width;
      float* at = scores + r * kKeyBlock + s;
      switch (b.rows - r) {
        case 1: dots<1>(q, k, b.first, b.width, at, kKeyBlock, keys); break;
        case 2: dots<2>(q, k, b.first, b.width, at, kKeyBlock, keys); break;
        case 3: dots<3>(q, k, b.first, b.width, at, kKeyBlock, keys); break;
        default: dots<4>(q, k, b.first, b.width, at, kKeyBlock, keys);
      }
    }
  online_softmax(b, scores);
  for (int r = 0; r < b.rows; r += 4) {
    float* at = scores + r * kKeyBlock;
    switch (b.rows - r) {
      case 1: attend_rows<1>(b, r, at); break;
      case 2: attend_rows<2>(b, r, at); break;
      case 3: attend_rows<3>(b, r, at); break;
      default: attend_rows<4>(b, r, at);
    }
  }
}

}  // namespace
}  // namespace farthing
