// One pool of threads: the caller works as thread 0, the others spin for a while and then sleep.
//
// Each thread has a contiguous part of the units and takes it from the front, so that what it reads is one
// stream; one that is done takes from the back of another's part, so that a thread that loses its core does
// not delay the others. Every unit is computed whole by one thread and nothing is summed across threads, so
// that the number of threads never changes a result.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace farthing {

struct Share {
  int begin, end;
};

class Pool;

class Team {
 public:
  Team(Pool& pool, int id) : pool_(pool), id_(id) {}
  int id() const { return id_; }
  int size() const;
  void barrier();

  // f(outer, inner) for every pair, each exactly once over the team. `phase` counts the loops of a region
  // from 0. A NUMA node computes its own share of the inner range, whose weights are in its memory.
  template <class F>
  void for_units(int phase, int outer, int inner, F&& f);

 private:
  Pool& pool_;
  int id_;
};

class Pool {
 public:
  static constexpr int kPhases = 8;

  // topology: "" reads the machine's; else CPU lists a node, such as "0-3;4-7". pin: bind threads to the
  // CPUs of their node, as on every machine that has several.
  Pool(int threads, const std::string& topology, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;

  int size() const { return size_; }
  int nodes() const { return static_cast<int>(node_threads_.size()); }
  int node_of(int thread) const { return node_of_[thread]; }
  bool real_nodes() const { return real_; }
  Share share(int node, int units) const;  // the node's part of 0 … units

  template <class F>
  void run(F&& f) {
    struct Job {
      static void call(void* data, Team& team) { (*static_cast<std::remove_reference_t<F>*>(data))(team); }
    };
    const std::lock_guard<std::mutex> one_region_at_a_time(mutex_);
    start(&Job::call, &f);
  }

 private:
  friend class Team;
  struct alignas(64) Counter {
    std::atomic<uint64_t> taken{
        0};  // units of a thread's part: low half from the front, high half from the back
  };
  struct Taken {
    int begin = 0, end = 0;
    int other = 0;  // parts, from the thread's own on, that are used up
  };
  // Threads arrive in groups, so that a counter is shared by few cores, and almost always by one node's.
  static constexpr int kGroup = 16;
  struct alignas(64) Group {
    std::atomic<int> arrived{0};
    int threads = 0;
  };
  void arrive(int id);  // the last one changes sense_
  void start(void (*call)(void*, Team&), void* data);
  void loop(int id);
  void wait_epoch(uint32_t seen);
  bool take(int phase, int id, int units, Taken& t);

  std::mutex mutex_;
  int size_ = 1;
  bool real_ = false, pin_ = false;
  std::vector<std::vector<int>> cpus_;  // of each node
  std::vector<int> node_threads_;       // threads of each node
  std::vector<int> node_of_;
  std::vector<std::thread> workers_;
  std::vector<int> first_thread_;  // of each node
  std::vector<Counter> counters_;  // [phase][thread]
  std::vector<Group> groups_;      // [(thread of its node) / kGroup, node by node]
  std::vector<int> group_of_;
  void (*call_)(void*, Team&) = nullptr;
  void* data_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};  // groups
  alignas(64) std::atomic<uint32_t> sense_{0};
  std::atomic<bool> stop_{false};
};

inline int Team::size() const { return pool_.size(); }

template <class F>
void Team::for_units(int phase, int outer, int inner, F&& f) {
  const int node = pool_.node_of(id_);
  const Share s = pool_.share(node, inner);
  const int width = s.end - s.begin;
  if (width <= 0) return;
  Pool::Taken t;
  while (pool_.take(phase, id_, outer * width, t))
    for (int u = t.begin; u < t.end; ++u) f(u / width, s.begin + u % width);
}

}  // namespace farthing
