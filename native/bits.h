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

// A value in [-1, 1] as float16, rounded to nearest even.
inline uint16_t half_bits(float f) {
  const float a = std::fabs(f);
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (a < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(a * 0x1p24f)));
  uint32_t b;
  std::memcpy(&b, &a, 4);
  b += 0xfffu + (b >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((b - 0x38000000u) >> 13));
}

}  // namespace farthing
