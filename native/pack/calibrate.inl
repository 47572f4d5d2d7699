// Rounding to a grid, for calibration (calibrate.h). Included by kernels_*.cpp.
namespace farthing {
namespace {

inline f32x16 look_up(const float* table, i32x16 index) {
#if defined(__AVX512F__)
  return _mm512_i32gather_ps((__m512i)index, table, 4);
#else
  int32_t at[16];
  float found[16];
  store(at, index);
  for (int i = 0; i < 16; ++i) found[i] = table[at[i]];
  return loadf(found);
#endif
}

// The nearest level to x.
inline f32x16 nearest(const Levels& levels, f32x16 x) {
  if (levels.codes) {
    const f32x16 at = min(max(x * 2.0f + kHalves, f32x16{}), splat(2 * kHalves - 1));
    return look_up(levels.codes, convert<i32x16>(at));
  }
  const f32x16 to_even = splat(0x1.8p23f);
  return min(max(x, splat(levels.low)), splat(levels.high)) + to_even - to_even;
}

float rounding_error(const Levels& levels, const float* w, const float* energy, float scale, int n) {
  f32x16 sum = {};
  const f32x16 s = splat(scale);
  for (int i = 0; i < n; i += 16) {
    const f32x16 x = loadf(w + i), missed = nearest(levels, x / s) * s - x;
    sum = fma(missed * missed, loadf(energy + i), sum);
  }
  return reduce_add(sum);
}

void sweep_block(const SweepBlock& b) {
  constexpr int kVectors = kSweepRows / 16;
  f32x16 squared[kVectors];
  for (int v = 0; v < kVectors; ++v) squared[v] = loadf(b.squared + 16 * v);
  for (int i = 0; i < b.columns; ++i) {
    float* left = b.left + i * kSweepRows;
    f32x16 error[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const f32x16 x = loadf(left + 16 * v), s = loadf(b.scales[i] + 16 * v);
      const f32x16 value = nearest(b.levels, x / s) * s, missed = x - value;
      error[v] = loadf(b.own[i] + 16 * v) - value;
      squared[v] = fma(missed * missed, splat(b.pivots[i]), squared[v]);
      squared[v] = fma(error[v] * error[v], splat(-b.damping), squared[v]);
      store(b.values[i] + 16 * v, value);
      store(b.errors + i * kSweepRows + 16 * v, error[v]);
    }
    for (int j = i + 1; j < b.columns; ++j) {
      float* later = b.left + j * kSweepRows;
      const f32x16 u = splat(b.lower[static_cast<size_t>(j) * b.stride + i]);
      for (int v = 0; v < kVectors; ++v) store(later + 16 * v, fma(u, error[v], loadf(later + 16 * v)));
    }
  }
  for (int v = 0; v < kVectors; ++v) store(b.squared + 16 * v, squared[v]);
}

}  // namespace
}  // namespace farthing
