// The largest k of n by radix: no score that is not chosen is ever sorted.
#include <cstring>

#include "attention/indexer.h"

namespace farthing {
namespace {

constexpr int kBits = 11, kBins = 1 << kBits;

// Floats as integers of the same order; -0 as 0, NaN and minus infinity as 0, which means none.
inline uint32_t ordered(float x) {
  if (!(x > -__builtin_inff())) return 0;
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The bin from which on `room` of the largest are found; `room` becomes how many of that bin.
int find_bin(const int* counts, int& room) {
  int bin = kBins - 1;
  for (; bin > 0 && counts[bin] < room; --bin) room -= counts[bin];
  return bin;
}

}  // namespace

void top_positions(const float* scores, int n, int k, uint32_t* keys, uint32_t* near, int32_t* out) {
  int counts[kBins] = {};
  for (int i = 0; i < n; ++i) {
    keys[i] = ordered(scores[i]);
    ++counts[keys[i] >> (32 - kBits)];
  }
  // Three digits of the k-th largest, most significant first; after each only its bin is looked at again.
  int room = k, found = 0;
  uint32_t least = 1;  // where fewer than k are there, all of them are taken
  if (n > k) {
    const uint32_t first = static_cast<uint32_t>(find_bin(counts, room));
    for (int i = 0; i < n; ++i) {
      near[found] = keys[i];
      found += keys[i] >> (32 - kBits) == first;
    }
    std::memset(counts, 0, sizeof counts);
    for (int i = 0; i < found; ++i) ++counts[near[i] >> 10 & (kBins - 1)];
    const uint32_t second = static_cast<uint32_t>(find_bin(counts, room));
    std::memset(counts, 0, sizeof counts);
    for (int i = 0; i < found; ++i)
      if ((near[i] >> 10 & (kBins - 1)) == second) ++counts[near[i] & 1023];
    const uint32_t third = static_cast<uint32_t>(find_bin(counts, room));
    least = first << 21 | second << 10 | third;
  }
  int at = 0;
  if (least == 0) least = 1, room = n;  // the k-th largest is no score at all
  for (int i = 0; i < n && at < k; ++i) {
    const bool equal = keys[i] == least && n > k;
    const bool take = keys[i] > least || (equal ? room-- > 0 : n <= k && keys[i] >= least);
    out[at] = i;
    at += take;
  }
  for (; at < k; ++at) out[at] = -1;
}

}  // namespace farthing
