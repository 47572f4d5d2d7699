// Scalar conversions between float32 and the 16-bit floats of packed matrices.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace farthing {

inline float bf16_value(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t bf16_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}

// A value of at most 65504 in magnitude as float16, rounded to nearest even.
inline uint16_t half_bits(float f) {
  const float a = std::fabs(f);
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (a < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(a * 0x1p24f)));
  uint32_t b;
  std::memcpy(&b, &a, 4);
  b += 0xfffu + (b >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((b - 0x38000000u) >> 13));
}

inline float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float a =
      std::ldexp(static_cast<float>(exponent ? mantissa | 1024 : mantissa), exponent ? exponent - 25 : -24);
  return h & 0x8000 ? -a : a;
}

}  // namespace farthing
