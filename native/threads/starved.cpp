#include "threads/starved.h"

#include <pthread.h>
#include <time.h>

namespace farthing {
namespace {

constexpr auto kWindow = std::chrono::milliseconds(50);  // several turns of the scheduler
constexpr double kShare = 0.75;

// Processor time of a thread; where the system does not say, as if it always ran.
Clock::duration ran([[maybe_unused]] std::thread& thread) {
#if defined(__linux__)
  clockid_t clock;
  timespec time;
  if (pthread_getcpuclockid(thread.native_handle(), &clock) == 0 && clock_gettime(clock, &time) == 0)
    return std::chrono::duration_cast<Clock::duration>(std::chrono::seconds(time.tv_sec) +
                                                       std::chrono::nanoseconds(time.tv_nsec));
#endif
  return Clock::now().time_since_epoch();
}

}  // namespace

int Starved::count(std::vector<std::thread>& workers, int active) {
  if (late_ == Clock::duration::zero()) return 0;
  const Clock::time_point now = Clock::now();
  if (ran_.empty()) {
    since_ = now, late_ = {};
    for (std::thread& worker : workers) ran_.push_back(ran(worker));
    late_ = Clock::duration(1);  // to be looked at again
    return 0;
  }
  const Clock::duration window = now - since_;
  if (window < kWindow) return 0;
  int starved = 0;
  for (int i = 0; i + 1 < active; ++i) starved += ran(workers[i]) - ran_[i] < kShare * window;
  // The others would take active / (active - starved) times as long for the work between the waits.
  const bool longer = late_ * active > window * starved;
  late_ = {};
  ran_.clear();
  return longer ? starved : 0;
}

}  // namespace farthing
