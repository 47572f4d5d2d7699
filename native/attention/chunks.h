// Fixed chunks of a sequence's keys.
//
// Attention sums over a sequence chunk by chunk: softmax within a chunk is online, the chunks' sums are then
// folded from left to right. Chunks depend on the position of a key and on nothing else, so the order of
// every sum is the same whether a query comes alone or in a prompt, and however many threads share its keys.
// Chunks are short where a sequence is short, so that one sequence alone still has work for several threads.
#pragma once
#include <algorithm>

namespace farthing {

struct Chunks {
  static constexpr int kShort = 128, kMiddle = 512, kLong = 1024;  // keys of a chunk …
  static constexpr int kShortUntil = 256, kMiddleUntil = 4352;     // … up to these positions, then kLong
  static_assert(kShortUntil % kShort == 0 && (kMiddleUntil - kShortUntil) % kMiddle == 0, "no chunk crosses");

  // The chunk that holds a key.
  static constexpr int of(int key) {
    if (key < kShortUntil) return key / kShort;
    if (key < kMiddleUntil) return kFirstMiddle + (key - kShortUntil) / kMiddle;
    return kFirstLong + (key - kMiddleUntil) / kLong;
  }
  // Its first key.
  static constexpr int begin(int chunk) {
    if (chunk < kFirstMiddle) return chunk * kShort;
    if (chunk < kFirstLong) return kShortUntil + (chunk - kFirstMiddle) * kMiddle;
    return kMiddleUntil + (chunk - kFirstLong) * kLong;
  }
  static constexpr int count(int keys) { return of(keys - 1) + 1; }

 private:
  static constexpr int kFirstMiddle = kShortUntil / kShort;
  static constexpr int kFirstLong = kFirstMiddle + (kMiddleUntil - kShortUntil) / kMiddle;
};

}  // namespace farthing
