// What the two readers of the output head share.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "pack/matrix.h"

namespace farthing {

class Pool;

constexpr int kChunk = 32;  // panels whose logits are reduced together: fixed, so that sums have one order
constexpr int kColumns = kChunk * kPanel;

struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int64_t id = std::numeric_limits<int64_t>::max();
  bool operator>(const Best& o) const { return value > o.value || (value == o.value && id < o.id); }
};

// Per panel of a head in planes, a bit for each row whose low nibbles are not spread evenly (uneven.cpp).
std::vector<uint16_t> uneven_rows(Pool& pool, const Matrix& w);

inline bool all_finite(const float* x, int n) {
  constexpr uint32_t exponent = 0x7f800000u;
  uint32_t bad = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bad |= (bits & exponent) == exponent;
  }
  return !bad;
}

}  // namespace farthing
