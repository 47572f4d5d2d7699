// Converts rows of the latent cache to the form that attention reads. Included by kernels_*.cpp.
namespace farthing {
namespace {

template <class F>
inline void expand(int n, int padded, float* out, F&& value) {  // value(i): 16 lanes from column i
  const int whole = n / 16 * 16;
  for (int i = 0; i < whole; i += 16) store(out + i, value(i));
  if (whole < n) {
    float tail[16];
    store(tail, value(whole));
    for (int i = whole; i < n; ++i) out[i] = tail[i - whole];
  }
  for (int i = n; i < padded; ++i) out[i] = 0.0f;
}

inline void expand_part(CacheType type, const uint8_t* row, int at, int n, int padded, float scale,
                        float* out) {
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

void load_key(CacheType type, const uint8_t* row, const float* scale, const KeyShape& s, float* out) {
  expand_part(type, row, 0, s.latent, s.latent_padded, scale ? scale[0] : 1.0f, out);
  expand_part(type, row, s.latent, s.rope, s.width - s.latent_padded, scale ? scale[1] : 1.0f,
              out + s.latent_padded);
}

}  // namespace
}  // namespace farthing
