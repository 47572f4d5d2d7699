// Row-wise arithmetic: norm, activations' quantization, SiLU. Included by kernels_*.cpp.
namespace farthing {
namespace {

template <class F>
inline void for_lanes(int n, F&& f) {  // f(offset) for whole vectors; the caller handles the rest
  for (int i = 0; i + 16 <= n; i += 16) f(i);
}

void rms_norm(const float* x, const float* weight, float eps, int k, float* out) {
  f32x16 squares = {};
  for_lanes(k, [&](int i) { squares = fma(loadf(x + i), loadf(x + i), squares); });
  float sum = reduce_add(squares);
  const int whole = k / 16 * 16;
  for (int i = whole; i < k; ++i) sum += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(k) + eps);
  for_lanes(k, [&](int i) { store(out + i, loadf(x + i) * inverse * loadf(weight + i)); });
  for (int i = whole; i < k; ++i) out[i] = x[i] * inverse * weight[i];
}

void split(const float* x, int k, uint16_t* hi, uint16_t* lo) {  // k a multiple of 16
  for_lanes(k, [&](int i) {
    const f32x16 v = loadf(x + i);
    const u16x16 h = float_to_bf16(v);
    store(hi + i, h);
    store(lo + i, float_to_bf16(v - bf16_to_float(reinterpret_cast<const uint16_t*>(&h))));
  });
}

#if defined(__AVX512BF16__)
// Pairs of columns as hi, then lo; zeros from k to `to`. Rounded by the processor, which keeps NaN.
void split_pairs(const float* x, int k, int to, uint32_t* out) {
  alignas(64) constexpr static int turns[] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  for (int i = 0; i < to; i += 16) {
    f32x16 v = {};
    if (i + 16 <= k) v = loadf(x + i);
    else if (i < k) memcpy(&v, x + i, sizeof(float) * (k - i));
    const __m256i hi = (__m256i)_mm512_cvtneps_pbh(v);
    const __m256i lo = (__m256i)_mm512_cvtneps_pbh(v - bf16_to_float(reinterpret_cast<const uint16_t*>(&hi)));
    store(out + i, _mm512_permutexvar_epi32(_mm512_load_si512(turns),
                                            _mm512_inserti64x4(_mm512_castsi256_si512(hi), lo, 1)));
  }
}
#endif

void round_to_bf16(const float* x, int k, uint16_t* out) {
  for_lanes(k, [&](int i) { store(out + i, float_to_bf16(loadf(x + i))); });
  for (int i = k / 16 * 16; i < k; ++i) {
    const u16x16 v = float_to_bf16(splat(x[i]));
    memcpy(out + i, &v, 2);
  }
}

// Returns the scale. clip * largest |x| to `top`, larger values are clamped; NaN and infinity, which no
// integer holds, make it NaN. k is padded to whole vectors with zeros by the caller.
inline float quantize_group(const float* x, int k, int8_t* q, float top_level, float clip) {
  f32x16 top = {}, odd = {};
  for_lanes(k, [&](int i) {
    top = max(top, abs(loadf(x + i)));
    odd = fma(loadf(x + i), splat(0.0f), odd);  // NaN unless x is finite; max would lose it
  });
  const float amax = reduce_max(top) * clip;
  const float scale = amax / top_level + reduce_add(odd);
  const float inverse = amax > 1e-30f ? top_level / amax : 0.0f;
  const f32x16 magic = splat(12582912.0f);  // rounds to nearest even in the low bits
  if (clip < 1.0f) {
    for_lanes(k, [&](int i) {
      const f32x16 v = min(max(loadf(x + i) * inverse, splat(-top_level)), splat(top_level));
      const f32x16 r = v + magic;
      store(q + i, narrow(as<i32x16>(r) - 0x4b400000));
    });
    return scale;
  }
  for_lanes(k, [&](int i) {
    const f32x16 r = fma(loadf(x + i), splat(inverse), magic);
    store(q + i, narrow(as<i32x16>(r) - 0x4b400000));
  });
  return scale;
}

// Quantizes to [-128, 127] with one calibrated scale, and returns it or NaN, as quantize_group. Divides, as
// the tools that wrote the scale do: multiplying by the inverse would round some ties to another integer.
inline float quantize_static(const float* x, int k, int8_t* q, float scale) {
  const f32x16 magic = splat(12582912.0f);
  f32x16 odd = {};
  for_lanes(k, [&](int i) {
    const f32x16 v = min(max(loadf(x + i) / splat(scale), splat(-128.0f)), splat(127.0f));
    const f32x16 r = v + magic;
    store(q + i, narrow(as<i32x16>(r) - 0x4b400000));
    odd = fma(loadf(x + i), splat(0.0f), odd);
  });
  return scale + reduce_add(odd);
}

inline float quantize_input(const Matrix& w, const float* x, int k, int8_t* q) {  // returns the scale
  return w.act_scale > 0.0f ? quantize_static(x, k, q, w.act_scale)
                            : quantize_group(x, k, q, w.act_top, w.act_clip);
}

inline int sum_bytes(const int8_t* q, int k) {
  i32x16 s = {};
  int i = 0;
#if defined(__AVX512VNNI__)
  for (; i + 64 <= k; i += 64) s = dot4(s, _mm512_set1_epi8(1), _mm512_loadu_si512(q + i));
#endif
  for (; i + 16 <= k; i += 16) s += widen(q + i);
  return reduce_add(s);
}

inline void flip(const int8_t* q, int k, uint8_t* out) {  // q + 128
  for_lanes(k, [&](int i) { store(out + i, (u8x16)load<i8x16>(q + i) ^ 128); });
}

// -offset * sums of 16 columns each of a cell, `columns` of which are inputs.
inline void sum_cell(const int8_t* q, int columns, int offset, CellInput& cell) {
#if defined(__AVX512VNNI__)
  if (columns == kCellBlocks * kBlock) {
    __m512i s = (__m512i)dot4(i32x16{}, _mm512_set1_epi8(1), _mm512_loadu_si512(q));
    s = _mm512_add_epi32(s, _mm512_shuffle_epi32(s, _MM_PERM_BADC));
    s = _mm512_mullo_epi32(_mm512_add_epi32(s, _mm512_shuffle_epi32(s, _MM_PERM_CDAB)),
                           _mm512_set1_epi32(offset));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(cell.comp),
                     _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, s)));
    cell.comp_all = cell.comp[0] + cell.comp[1] + cell.comp[2] + cell.comp[3];
    return;
  }
#endif
  cell.comp_all = 0;
  for (int b = 0; b < kCellBlocks; ++b) {
    cell.comp[b] = b * kBlock < columns ? offset * sum_bytes(q + b * kBlock, kBlock) : 0;
    cell.comp_all += cell.comp[b];
  }
}

// Zeros after the last column, as far as the kernels read.
template <class T>
inline void pad(T* row, int from, int to) {
  for (int i = from; i < to; ++i) row[i] = 0;
}

// What q leaves of x, in units of scale / kLeftLevels, whose integers are kept; returns that unit. Nothing
// where q is zero because the largest input is not above quantize_group's bound, 127 times a scale.
inline float quantize_left(const float* x, int k, const int8_t* q, float scale, int8_t* left) {
  const float inverse = scale > 8e-33f ? kLeftLevels / scale : 0.0f;
  const f32x16 magic = splat(12582912.0f);
  for_lanes(k, [&](int i) {
    const f32x16 v = fma(to_float(widen(q + i)), splat(-scale), loadf(x + i));
    const f32x16 r = fma(v, splat(inverse), magic);
    store(left + i, narrow(as<i32x16>(r) - 0x4b400000));
  });
  return scale / kLeftLevels;
}

// What kernels read next to the integers of n columns from `at`, which share a scale. row: of integers.
void describe_group(const Matrix& w, const Act& x, size_t row, int at, int n, float scale) {
  const int offset = w.format_traits().offset();
  const int8_t* q = x.q + row * x.ld + at;
  x.scale[row * x.groups + at / w.group] = scale;
  x.comp[row * x.groups + at / w.group] = w.format_traits().compensation() * sum_bytes(q, n);
  if (x.flipped) flip(q, n, x.flipped + row * x.ld + at);
  if (!x.cells) return;
  const int width = cell_columns(w);
  CellInput* cell = x.cells + row * x.cell_count + at / width;
  for (int c = 0; c < n; c += width, ++cell) {
    sum_cell(q + c, n - c < width ? n - c : width, offset, *cell);
    cell->scale = scale;
  }
}

void quantize(const Matrix& w, const Act& x, int row, int at, const float* values, int k) {
  const size_t first = static_cast<size_t>(row) * x.terms;
  for (int done = 0; done < k; done += w.group) {
    const int n = k - done < w.group ? k - done : w.group, padded = round_up(n, 16);
    float tail[kActGroup * 4];
    const float* from = values + done;
    if (padded != n) {
      for (int i = 0; i < padded; ++i) tail[i] = i < n ? from[i] : 0.0f;
      from = tail;
    }
    int8_t* q = x.q + first * x.ld + at + done;
    const float scale = quantize_input(w, from, padded, q);
    describe_group(w, x, first, at + done, padded, scale);
    if (x.terms == 1) continue;
    const float unit = w.rounds_inputs() ? 0.0f : quantize_left(from, padded, q, scale, q + x.ld);
    if (w.rounds_inputs()) pad(q + x.ld, 0, padded);
    describe_group(w, x, first + 1, at + done, padded, unit);
  }
}

void store_act(const Matrix& w, const Act& x, int row, int at, const float* values, int k) {
  const bool last = at + k >= w.k;
  const int to = round_up(w.k, 64);
  if (w.quantized()) {
    quantize(w, x, row, at, values, k);
    for (int t = 0; last && t < x.terms; ++t) {
      const size_t start = (static_cast<size_t>(row) * x.terms + t) * x.ld;
      pad(x.q + start, round_up(w.k, 16), to);
      if (x.flipped) pad(x.flipped + start, round_up(w.k, 16), to);
    }
    return;
  }
  const size_t start = static_cast<size_t>(row) * x.ld;
#if defined(__AVX512BF16__)
  if (x.pairs && w.format == Format::fp8)
    return split_pairs(values, k, last ? to - at : k, x.pairs + start + at);
#endif
  float* out = x.f32 + start;
  if (out + at != values) memcpy(out + at, values, sizeof(float) * k);
  if (last) pad(out, w.k, to);
  if (x.hi) split(out + at, last ? to - at : k, x.hi + start + at, x.lo + start + at);
}

void silu_mul(const float* gate_up, int rows, int ld, float* out, int ldo) {
  for (int m = 0; m < rows; ++m, gate_up += ld, out += ldo) {
    const f32x16 gate = loadf(gate_up), up = loadf(gate_up + 16);
    store(out, gate / (exp(-gate) + 1.0f) * up);
  }
}

void gate_mul(const Gate& gate, const float* gate_up, const float* bias, int rows, int ld, float* out,
              int ldo) {
  if (!bias && gate.silu()) return silu_mul(gate_up, rows, ld, out, ldo);
  const f32x16 of_gate = bias ? loadf(bias) : f32x16{}, of_up = bias ? loadf(bias + 16) : f32x16{};
  const f32x16 most = splat(gate.limit), least = splat(-gate.limit);
  for (int m = 0; m < rows; ++m, gate_up += ld, out += ldo) {
    f32x16 g = loadf(gate_up) + of_gate, up = loadf(gate_up + 16) + of_up;
    g = select(g > most, most, g);  // NaN stays NaN
    up = select(up > most, most, select(up < least, least, up));
    const f32x16 z = g * gate.alpha * (g * g * gate.cubic + 1.0f);
    store(out, g / (exp(-z) + 1.0f) * (up + gate.shift));
  }
}

void axpy(float* y, const float* x, float a, int n) {
  for_lanes(n, [&](int i) { store(y + i, fma(loadf(x + i), splat(a), loadf(y + i))); });
  for (int i = n / 16 * 16; i < n; ++i) y[i] += a * x[i];
}

void add(float* y, const float* x, int n) {
  for_lanes(n, [&](int i) { store(y + i, loadf(y + i) + loadf(x + i)); });
  for (int i = n / 16 * 16; i < n; ++i) y[i] += x[i];
}

void blend(float* y, float a, const float* x, float b, int n) {
  for_lanes(n, [&](int i) { store(y + i, fma(loadf(x + i), splat(b), loadf(y + i) * a)); });
  for (int i = n / 16 * 16; i < n; ++i) y[i] = y[i] * a + x[i] * b;
}

inline f32x16 load_tail(const float* x, int n, float fill) {
  f32x16 v = splat(fill);
  memcpy(&v, x, sizeof(float) * n);
  return v;
}

constexpr float kLowest = -3.0e38f;

void exp_sum(const float* x, int n, float* top, float* sum) {
  f32x16 best = splat(kLowest);
  for_lanes(n, [&](int i) { best = max(best, loadf(x + i)); });
  const int whole = n / 16 * 16;
  if (whole < n) best = max(best, load_tail(x + whole, n - whole, kLowest));
  *top = reduce_max(best);
  f32x16 total = {};
  for_lanes(n, [&](int i) { total += exp(loadf(x + i) - *top); });
  if (whole < n) total += exp(load_tail(x + whole, n - whole, kLowest) - *top);
  *sum = reduce_add(total);
}

void bounds(const float* x, const float* width, float margin, int count, float* tops, Peak* peak) {
  for (int i = 0; i < count; ++i, x += 16, width += 16) {
    const f32x16 v = loadf(x);
    tops[i] = reduce_max(fma(loadf(width), splat(margin), v));
    const float top = reduce_max(v);
    if (top > peak->value) *peak = {top, i};
  }
}

}  // namespace
}  // namespace farthing
