// Gated DeltaNet: the convolution, and tokens through one head's state. Included by kernels_*.cpp.
namespace farthing {
namespace {

inline f32x16 sigmoid(f32x16 x) { return splat(1.0f) / (exp(-x) + 1.0f); }

// The first n lanes; the others are 0, or not written.
inline f32x16 load_some(const float* p, int n) {
  if (n >= 16) return loadf(p);
  f32x16 v = {};
  memcpy(&v, p, sizeof(float) * n);
  return v;
}
inline void store_some(float* p, f32x16 v, int n) { memcpy(p, &v, sizeof(float) * (n < 16 ? n : 16)); }

void convolve(const float* const* rows, const float* const* weights, int count, int n, float* out) {
  for (int i = 0; i < n; i += 16) {
    f32x16 sum = {};
    for (int r = 0; r < count; ++r)
      sum = fma(load_some(rows[r] + i, n - i), load_some(weights[r] + i, n - i), sum);
    store_some(out + i, sum * sigmoid(sum), n - i);
  }
}

void gate(float* y, const float* z, int n, bool silu) {
  for (int i = 0; i < n; i += 16) {
    const f32x16 g = load_some(z + i, n - i), s = sigmoid(g);
    store_some(y + i, load_some(y + i, n - i) * (silu ? g * s : s), n - i);
  }
}

// Columns [at, at + 16 C) of a state, or the `lanes` first of 16. S' = e S + k d with d = (v - e S k) beta;
// then S' q = e S q + (k q) d, so that one pass over the state updates it for a token and reads it for the
// next. Each column's sums are in order of its rows, whatever C and the number of steps.
//
// state: the first of these columns, rows `stride` apart.
template <int C, bool Whole>
void delta_columns(const DeltaHead& h, const float* kq, int at, int lanes, float* state, int stride) {
  const auto get = [&](const float* p) { return Whole ? loadf(p) : load_some(p, lanes); };
  const auto put = [&](float* p, f32x16 v) { Whole ? store(p, v) : store_some(p, v, lanes); };
  f32x16 sk[C] = {}, sq[C] = {};
  for (int i = 0; i < h.key_dim; ++i) {
    const float* s = state + static_cast<size_t>(i) * stride;
    const f32x16 k = splat(h.k[i]), q = splat(h.q[i]);
    for (int c = 0; c < C; ++c) {
      const f32x16 v = get(s + 16 * c);
      sk[c] = fma(k, v, sk[c]);
      sq[c] = fma(q, v, sq[c]);
    }
  }
  for (int t = 0; t < h.steps; ++t) {
    const f32x16 decay = splat(h.decay[t]);
    const size_t row = static_cast<size_t>(t) * h.value_dim + at;
    f32x16 d[C];
    for (int c = 0; c < C; ++c) {
      d[c] = (get(h.v + row + 16 * c) - decay * sk[c]) * h.beta[t];
      put(h.out + row + 16 * c, fma(splat(kq[t]), d[c], decay * sq[c]));
      sk[c] = sq[c] = f32x16{};
    }
    const bool more = t + 1 < h.steps;
    const float *k = h.k + static_cast<size_t>(t) * h.key_dim, *k1 = k + h.key_dim,
                *q1 = h.q + static_cast<size_t>(t + 1) * h.key_dim;
    float* s = state;
    for (int i = 0; i < h.key_dim; ++i, s += stride) {
      const f32x16 key = splat(k[i]);
      f32x16 v[C];
      for (int c = 0; c < C; ++c) {
        v[c] = fma(key, d[c], decay * get(s + 16 * c));
        put(s + 16 * c, v[c]);
      }
      if (!more) continue;
      const f32x16 next_k = splat(k1[i]), next_q = splat(q1[i]);
      for (int c = 0; c < C; ++c) {
        sk[c] = fma(next_k, v[c], sk[c]);
        sq[c] = fma(next_q, v[c], sq[c]);
      }
    }
  }
}

// Whole columns that several tokens pass, next to each other: rows a power of two apart would share few of
// the sets of L1.
template <int C>
void delta_packed(const DeltaHead& h, const float* kq, int at) {
  constexpr int kMostRows = 256, kWidth = 16 * C;
  if (h.steps == 1 || h.key_dim > kMostRows)
    return delta_columns<C, true>(h, kq, at, 16, h.state + at, h.value_dim);
  alignas(64) float block[kMostRows * kWidth];
  for (int i = 0; i < h.key_dim; ++i)
    memcpy(block + i * kWidth, h.state + static_cast<size_t>(i) * h.value_dim + at, sizeof(float) * kWidth);
  delta_columns<C, true>(h, kq, at, 16, block, kWidth);
  for (int i = 0; i < h.key_dim; ++i)
    memcpy(h.state + static_cast<size_t>(i) * h.value_dim + at, block + i * kWidth, sizeof(float) * kWidth);
}

void delta(const DeltaHead& h) {
#if defined(__AVX512F__)
  constexpr int kMany = 4, kOne = 8;  // vectors of a block of columns that stays in L1; of a single token
#else
  constexpr int kMany = 2, kOne = 2;
#endif
  float kq[kDeltaSteps];
  for (int t = 0; t < h.steps; ++t) {
    f32x16 sum = {};
    const float *k = h.k + static_cast<size_t>(t) * h.key_dim, *q = h.q + static_cast<size_t>(t) * h.key_dim;
    for (int i = 0; i < h.key_dim; i += 16)
      sum = fma(load_some(k + i, h.key_dim - i), load_some(q + i, h.key_dim - i), sum);
    kq[t] = reduce_add(sum);
  }
  int at = 0;
  if (h.steps == 1)
    for (; at + 16 * kOne <= h.value_dim; at += 16 * kOne) delta_packed<kOne>(h, kq, at);
  for (; at + 16 * kMany <= h.value_dim; at += 16 * kMany) delta_packed<kMany>(h, kq, at);
  for (; at + 16 <= h.value_dim; at += 16) delta_packed<1>(h, kq, at);
  if (at < h.value_dim) delta_columns<1, false>(h, kq, at, h.value_dim - at, h.state + at, h.value_dim);
}

}  // namespace
}  // namespace farthing
