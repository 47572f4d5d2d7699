// Which threads of a pool have no core of their own, because other processes take turns on it. A region waits
// for its last thread: with two threads on two busy cores most of its time, more than one of them would need
// alone.
#pragma once
#include <thread>
#include <vector>

#include "threads/spin.h"

namespace farthing {

class Starved {
 public:
  // The caller has waited so long at a barrier.
  void waited(Clock::duration time) { late_ += time; }

  // How many of the first `active` threads ran for less than kShare of the time since the caller began to
  // wait for others, if it waits for longer than doing their work would take; 0 until that is known. To be
  // asked between regions.
  int count(std::vector<std::thread>& workers, int active);

 private:
  Clock::duration late_{};
  Clock::time_point since_{};
  std::vector<Clock::duration> ran_;  // by then, of each worker
};

}  // namespace farthing
