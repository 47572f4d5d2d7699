// Rotation, and rows written to a paged cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/kernels.h"

namespace farthing {

// out [r] = x [r] * scale rotated by cos, sin [r / 2], in interleaved pairs or by halves. out may be x.
inline void rotate_row(const float* x, int r, const float* cos, const float* sin, bool interleaved,
                       float scale, float* out) {
  const int half = r / 2;
  for (int i = 0; i < half; ++i) {
    const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
    const float xa = x[a] * scale, xb = x[b] * scale;
    out[a] = xa * cos[i] - xb * sin[i];
    out[b] = xb * cos[i] + xa * sin[i];
  }
}

inline uint8_t e4m3(float f) {  // to nearest even; |f| <= 448
  const uint8_t sign = std::signbit(f) ? 0x80 : 0;
  const float a = std::min(std::fabs(f), 448.0f);
  if (a < 0x1p-6f) return static_cast<uint8_t>(sign | static_cast<int>(std::nearbyint(a * 512.0f)));
  uint32_t b;
  std::memcpy(&b, &a, 4);
  b += 0x7ffffu + (b >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((b >> 20) - (120u << 3)));
}

// The largest magnitude of x [n], NaN if a number is not finite. std::max would drop NaN; bits of magnitudes
// have the order of their numbers, with NaN above all.
inline float top_of(const float* x, int n) {
  uint32_t most = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    most = std::max(most, bits & 0x7fffffffu);
  }
  float top;
  std::memcpy(&top, &most, 4);
  return top + top * 0.0f;
}

// x [n] to elements [first, first + n) of a cache of that type, and its scale where the cache has 8 bits:
// `fixed` if it is above 0 and the cache FP8, else that of the row; NaN if a number of x is not finite.
inline void write_row(const Kernels& kernels, CacheType type, uint8_t* data, size_t first, const float* x,
                      int n, float* scale, float fixed = 0.0f) {
  if (type == CacheType::f32)
    return static_cast<void>(std::memcpy(reinterpret_cast<float*>(data) + first, x, sizeof(float) * n));
  if (type == CacheType::bf16) return kernels.round_bf16(x, n, reinterpret_cast<uint16_t*>(data) + first);
  const float top = type == CacheType::fp8 ? 448.0f : 127.0f;
  const float amax = top_of(x, n);
  *scale = fixed > 0.0f && type == CacheType::fp8 ? fixed : std::max(amax / top, 1e-20f);
  if (std::isnan(amax)) {  // attention to the row is NaN whatever its bytes are
    *scale = amax;
    return static_cast<void>(std::memset(data + first, 0, static_cast<size_t>(n)));
  }
  for (int i = 0; i < n; ++i) {
    const float v = x[i] / *scale;
    data[first + i] =
        type == CacheType::fp8
            ? e4m3(v)
            : static_cast<uint8_t>(static_cast<int8_t>(std::clamp(std::nearbyint(v), -127.0f, 127.0f)));
  }
}

}  // namespace farthing
