// Waiting for another thread or process that is about to be done.
#pragma once
#include <chrono>
#include <thread>

namespace farthing {

using Clock = std::chrono::steady_clock;
constexpr auto kImpatient = std::chrono::microseconds(100);  // most threads have a core each

// About 60 ns. A hypervisor that counts consecutive PAUSE instructions concludes that the core spins
// uselessly and stops it for 30 us or more; it does not count pauses that are further apart.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
  for (unsigned long i = 0, x = 3; i < 60; ++i) asm volatile("imul %0, %0" : "+r"(x));
#elif defined(__aarch64__)
  for (int i = 0; i < 8; ++i) asm volatile("yield");
#endif
}

// Waits until done(), for at most `most` (zero: no limit), and after `impatient` yields to other threads.
// Returns whether it is done. late: the time waited, if it was longer than a microsecond.
template <class F>
inline bool spin(F&& done, Clock::duration most, Clock::duration impatient = kImpatient,
                 Clock::duration* late = nullptr) {
  const Clock::time_point start = Clock::now();
  for (bool soon = true;; soon = false) {
    for (int i = 0; i < 16; ++i) {
      if (done()) {
        if (late && !soon) *late = Clock::now() - start;
        return true;
      }
      relax();
    }
    const Clock::duration waited = Clock::now() - start;
    if (late) *late = waited;
    if (most.count() && waited > most) return false;
    if (waited > impatient) std::this_thread::yield();
  }
}

}  // namespace farthing
