// Converts rows of the latent cache to the form that attention reads. Included by kernels_*.cpp.
namespace farthing {
namespace {

inline void put(float* to, f32x16 v) { store(to, v); }
inline void put(uint16_t* to, f32x16 v) {  // to nearest even
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  memcpy(to, &rounded, 32);
#else
  store(to, float_to_bf16(v));
#endif
}

template <class T, class F>
inline void expand(int n, int padded, T* out, F&& value) {  // value(i): 16 lanes from column i
  const int whole = n / 16 * 16;
  for (int i = 0; i < whole; i += 16) put(out + i, value(i));
  if (whole < n) {
    T tail[16];
    put(tail, value(whole));
    for (int i = whole; i < n; ++i) out[i] = tail[i - whole];
  }
  for (int i = n; i < padded; ++i) out[i] = T{};
}

template <class T>
inline void expand_part(CacheType type, const uint8_t* row, int at, int n, int padded, float scale, T* out) {
  uint8_t bytes[64 + 16];  // the last lanes of a ragged part must not be read past the row
  const int size = cell_bytes(type);
  const auto lanes = [&](int i) -> const uint8_t* {
    const uint8_t* p = row + static_cast<size_t>(at + i) * size;
    if (i + 16 <= n) return p;
    memcpy(bytes, p, static_cast<size_t>(n - i) * size);
    return bytes;
  };
  switch (type) {
    case CacheType::f32: return expand(n, padded, out, [&](int i) { return load<f32x16>(lanes(i)); });
    case CacheType::bf16:
      return expand(n, padded, out,
                    [&](int i) { return bf16_to_float(reinterpret_cast<const uint16_t*>(lanes(i))); });
    case CacheType::fp8:
      return expand(n, padded, out, [&](int i) { return fp8_to_float(lanes(i)) * (scale * 256.0f); });
    default:
      return expand(n, padded, out, [&](int i) {
        return to_float(widen(reinterpret_cast<const int8_t*>(lanes(i)))) * scale;
      });
  }
}

template <class T>
void load_key(CacheType type, const uint8_t* row, const float* scale, const KeyShape& s, T* out) {
  expand_part(type, row, 0, s.latent, s.latent_padded, scale ? scale[0] : 1.0f, out);
  expand_part(type, row, s.latent, s.rope, s.width - s.latent_padded, scale ? scale[1] : 1.0f,
              out + s.latent_padded);
}

// n columns of 8 bits to bfloat16, 32 at a time; floats(i, a, b): those from column i.
template <class F>
inline void round_columns(int n, float scale, uint16_t* out, F&& floats) {
  for (int i = 0; i < n; i += 32) {
    f32x16 a, b;
    floats(i, a, b);
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh(b * scale, a * scale);
    memcpy(out + i, &both, 64);
#else
    put(out + i, a * scale);
    put(out + i + 16, b * scale);
#endif
  }
}

void load_key16(CacheType type, const uint8_t* row, const float* scale, const KeyShape& s, uint16_t* out) {
  if (cell_bytes(type) > 1 || s.latent % 32 || s.rope % 32) return load_key(type, row, scale, s, out);
  for (int part = 0; part < 2; ++part) {
    const int n = part ? s.rope : s.latent;
    if (type == CacheType::fp8)
      round_columns(n, scale[part] * 256.0f, out,
                    [&](int i, f32x16& a, f32x16& b) { fp8_pair(row + i, a, b); });
    else
      round_columns(n, scale[part], out, [&](int i, f32x16& a, f32x16& b) {
        const auto* from = reinterpret_cast<const int8_t*>(row + i);
        a = to_float(widen(from)), b = to_float(widen(from + 16));
      });
    row += n, out += n;
  }
}

}  // namespace
}  // namespace farthing
