#include "threads/shared_sum.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#if defined(__unix__)
#include <unistd.h>
#endif

#include "threads/spin.h"

namespace farthing {
namespace {

constexpr int kLineWords = 8;
constexpr auto kSpin = std::chrono::milliseconds(2);
constexpr int kYields = 2000, kNapsBetweenChecks = 256;
constexpr auto kNap = std::chrono::microseconds(50);

}  // namespace

float* SharedSum::slot(int rank) const {
  return reinterpret_cast<float*>(slots + (2 * rank + (*step & 1)) * slot_bytes);
}

void SharedSum::check(int rank, int naps) const {
  if (failed->load(std::memory_order_relaxed)) throw PeerLost("another rank has failed");
#if defined(__unix__)
  if (parent && getppid() != parent) throw PeerLost("the parent process has ended");
#endif
  // Naps are counted, not the clock: a replica that was stopped and continued has not timed out.
  if (std::chrono::duration<double>(kNap).count() * 2 * naps <= timeout) return;
  std::ostringstream text;
  text << "rank " << rank << " of a group of " << size << " did not answer in " << timeout << " s";
  throw PeerLost(text.str());
}

void SharedSum::wait(int rank, uint64_t step) const {
  const Word& counter = counters[rank * kLineWords];
  const auto there = [&] { return counter.load(std::memory_order_acquire) >= step; };
  if (!crowded && spin(there, kSpin)) return;
  for (int i = 0; i < kYields && !there(); ++i) std::this_thread::yield();
  for (int naps = 1; !there(); ++naps) {
    std::this_thread::sleep_for(kNap);
    if (naps % kNapsBetweenChecks == 0) check(rank, naps);
  }
}

void SharedSum::add_some(Rows x, int rows, int columns, Rows residual) const {
  const uint64_t now = ++*step;
  for (int rank = 0; rank < size; ++rank) wait(rank, now - 1);  // until all have read the old contents
  float* own = slot(index);
  for (int r = 0; r < rows; ++r)
    std::memcpy(own + static_cast<int64_t>(r) * columns, x.row(r), sizeof(float) * columns);
  counters[index * kLineWords].store(now, std::memory_order_release);
  for (int rank = 0; rank < size; ++rank) wait(rank, now);
  for (int r = 0; r < rows; ++r) {
    const int64_t at = static_cast<int64_t>(r) * columns;
    const float *a = slot(0) + at, *b = slot(1) + at;
    float* to = x.row(r);
    for (int i = 0; i < columns; ++i) to[i] = a[i] + b[i];
    for (int rank = 2; rank < size; ++rank) {
      const float* c = slot(rank) + at;
      for (int i = 0; i < columns; ++i) to[i] += c[i];
    }
    if (!residual.at) continue;
    const float* from = residual.row(r);
    for (int i = 0; i < columns; ++i) to[i] = from[i] + to[i];
  }
}

void SharedSum::add(Rows x, int rows, int columns, Rows residual) const {
  const int most = static_cast<int>(slot_bytes / (sizeof(float) * columns));
  if (size < 2 || most < 1) throw std::invalid_argument("a sum needs two ranks, and slots that hold a row");
  for (int r = 0; r < rows; r += most)
    add_some({x.row(r), x.stride}, std::min(most, rows - r), columns,
             {residual.at ? residual.row(r) : nullptr, residual.stride});
}

}  // namespace farthing
