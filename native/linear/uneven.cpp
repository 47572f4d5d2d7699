// Rows of a head in planes whose low nibbles are not spread evenly.
//
// A row of values of all sizes has low nibbles that depend neither on each other nor on the row's direction.
// In a row of one large weight and many that round to -1, 0 and 1, they are all 15, 0 and 1: their sum with
// activations whose mean is not zero is far from that of evenly spread ones.
#include <cmath>

#include "linear/head.h"
#include "threads/threads.h"

namespace farthing {
namespace {

constexpr int kLine = 64;         // bytes of eight columns of a panel's plane
constexpr float kSmall = 8.0f;    // least root mean square of a row's integers
constexpr float kSkew = 0.5f;     // largest distance of the mean of low nibbles from 7.5 …
constexpr float kChance = 14.0f;  // … apart from three standard deviations of chance, times 1 / sqrt(K)

// Bit i: row i of the panel is uneven.
uint16_t uneven_lanes(const Matrix& w, const uint8_t* high, const uint8_t* low, size_t bytes) {
  int64_t nibbles[kPanel] = {}, squares[kPanel] = {};
  for (size_t at = 0; at < bytes; at += kLine) {
    int32_t sum[kLine], square[kLine];
    for (int i = 0; i < kLine; ++i) {
      const int h = high[at + i], l = low[at + i];
      const int a = ((h & 15) << 4 | (l & 15)) - 128, b = ((h & 0xf0) | l >> 4) - 128;
      sum[i] = (l & 15) + (l >> 4);
      square[i] = a * a + b * b;
    }
    for (int i = 0; i < kLine; ++i) nibbles[i / 4] += sum[i], squares[i / 4] += square[i];
  }
  uint16_t bits = 0;
  const float k = static_cast<float>(w.k);  // the padding holds zeros, whose low nibbles are zeros
  for (int lane = 0; lane < kPanel; ++lane) {
    const float skew = std::fabs(static_cast<float>(nibbles[lane]) - 7.5f * k);
    const bool even = static_cast<float>(squares[lane]) >= kSmall * kSmall * k &&
                      skew <= kSkew * k + kChance * std::sqrt(k);
    bits |= static_cast<uint16_t>(!even) << lane;
  }
  return bits;
}

}  // namespace

std::vector<uint16_t> uneven_rows(Pool& pool, const Matrix& w) {
  std::vector<uint16_t> found(w.panels);
  pool.run([&](Team& team) {
    team.for_units(kOnlyLoop, 1, w.panels, [&](int, int panel) {
      const uint8_t* high = w.record(panel) + w.head_bytes();
      found[panel] = uneven_lanes(w, high, w.low_plane(panel), w.plane_bytes());
    });
  });
  return found;
}

}  // namespace farthing
