// Softmax of rows. NaN in a row makes all of it NaN, as do +inf and nothing but -inf. Included by
// kernels_*.cpp.
namespace farthing {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kChains =
    4;  // of sums: rounding errors of long rows are a quarter, and no add waits for the last

template <class F>
inline void for_chains(int n, F&& f) {  // f(offset, chain) for whole vectors
  int i = 0;
  for (; i + 16 * kChains <= n; i += 16 * kChains)
    for (int j = 0; j < kChains; ++j) f(i + 16 * j, j);
  for (; i + 16 <= n; i += 16) f(i, 0);
}

inline float largest(const float* x, int n) {
  f32x16 best[kChains];
  for (f32x16& b : best) b = splat(-kInfinity);
  for_chains(n, [&](int i, int j) { best[j] = max(best[j], loadf(x + i)); });
  if (n % 16) best[0] = max(best[0], load_tail(x + n / 16 * 16, n % 16, -kInfinity));
  return reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// The exponentials are kept in `out`, or in `scratch` [n] if the result is written past the caches: then
// `out` is aligned to vectors. The row `next` is prefetched into L2, so that reading memory and arithmetic
// overlap.
void softmax(const float* x, const float* next, int n, float* scratch, float* out) {
  const float top = largest(x, n);
  const int whole = n / 16 * 16;
  float* kept = scratch ? scratch : out;
  f32x16 sums[kChains] = {}, tail = {};
  for_chains(n, [&](int i, int j) {
    prefetch_far(next + i);
    const f32x16 e = exp_below(loadf(x + i) - top);
    sums[j] += e;
    store(kept + i, e);
  });
  if (whole < n) sums[0] += tail = exp_below(load_tail(x + whole, n - whole, -kInfinity) - top);
  const float inverse = 1.0f / reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (scratch) {
    for_lanes(n, [&](int i) { store_past_caches(out + i, loadf(kept + i) * inverse); });
    stores_past_caches_done();
  } else {
    for_lanes(n, [&](int i) { store(out + i, loadf(out + i) * inverse); });
  }
  tail *= inverse;
  memcpy(out + whole, &tail, sizeof(float) * (n - whole));
}

}  // namespace
}  // namespace farthing
