// One pool of threads: the caller works as thread 0, the others spin for a while and then sleep.
//
// Each thread has a contiguous part of the units and takes it from the front, so that what it reads is one
// stream; one that is done takes from the back of another's part, so that a thread that loses its core does
// not delay the others. Every unit is computed whole by one thread and nothing is summed across threads, so
// that the number of threads never changes a result. A thread that waits too long sleeps until it is woken,
// so that one without a core gets one. While other processes take the cores, fewer threads take part: the
// last ones rest.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "threads/spin.h"
#include "threads/starved.h"

namespace farthing {

struct Share {
  int begin, end;
};

class Pool;

// The phase of a region with one loop.
constexpr int kOnlyLoop = 0;

class Team {
 public:
  Team(Pool& pool, int id, uint32_t region)
      : pool_(pool), id_(id), set_(static_cast<int>(region % 2)), region_(region) {}
  int id() const { return id_; }
  int size() const;
  // Every thread meets the others at the same barriers of a region. Throws if one of them cannot.
  void barrier();

  // f(outer, inner) for every pair, each exactly once over the team. `phase` counts the loops of a region,
  // whose names are an enum of each op, or kOnlyLoop. A NUMA node computes its own share of the inner range,
  // whose weights are in its memory.
  template <class F>
  void for_units(int phase, int outer, int inner, F&& f);

 private:
  friend class Pool;
  Pool& pool_;
  int id_, set_;                    // the region's counters
  uint32_t region_, barriers_ = 0;  // barriers so far
};

// A memory node: its number, and its cores as the hardware threads of each.
struct Node {
  int number = 0;
  std::vector<std::vector<int>> cores;
};

class Pool {
 public:
  static constexpr int kPhases = 8;

  // topology: cores a node, such as "0-3;4-7" or "0:0+4,1+5;1:2+6,3+7" with nodes' numbers and cores of two
  // hardware threads; "" is one node. pin: bind threads to the CPUs of their node, and each to a core of its
  // own if they are as many; memory is bound to nodes too.
  Pool(int threads, const std::string& topology, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;

  // Gives the calling thread back the CPUs that it had before its first region; the next one binds it again.
  void free_caller() const;

  int size() const { return size_; }
  int active() const { return active_; }  // threads that take part
  // Lets so many threads take part in the next regions, once those that rest can be woken; for tests. Threads
  // of several nodes never rest.
  void set_active(int threads);
  int nodes() const { return static_cast<int>(nodes_.size()); }
  int node_of(int thread) const { return node_of_[thread]; }
  bool pinned() const { return pin_; }
  bool yields_at_once() const { return impatient_ == Clock::duration::zero(); }
  std::vector<int> numbers() const {  // by which the system knows the nodes
    std::vector<int> found;
    for (const Node& node : nodes_) found.push_back(node.number);
    return found;
  }
  // Regions and barriers so far, the end of each region being one.
  std::pair<uint32_t, uint32_t> meetings() const { return {starts_[0].opened, barriers_[0].opened}; }
  Share share(int node, int units) const;  // the node's part of 0 … units

  // f(team) by every thread. If some throw, the others leave at their next barrier, and the first exception
  // is thrown here once all have left.
  template <class F>
  void run(F&& f) {
    struct Job {
      static void call(void* data, Team& team) { (*static_cast<std::remove_reference_t<F>*>(data))(team); }
    };
    if (forks_before_ != forks_) throw_forked();
    const std::lock_guard<std::mutex> one_region_at_a_time(mutex_);
    start(&Job::call, &f);
  }

 private:
  friend class Team;
  // Units taken of a thread's part in each phase: low half from the front, high half from the back.
  struct alignas(64) Counters {
    std::atomic<uint64_t> taken[kPhases] = {};
  };
  // How far a thread is, for those that cannot go on: the barriers that it has come to in a region, or kDone
  // or kFailed. Each writes its own, and nothing reads it while all goes well.
  struct alignas(64) Progress {
    static constexpr uint32_t kDone = ~0u, kFailed = ~0u - 1;
    std::atomic<uint64_t> at{0};
    void set(uint32_t region, uint32_t to) {
      at.store(static_cast<uint64_t>(region) << 32 | to, std::memory_order_release);
    }
  };
  struct Left {};  // thrown by a barrier at which threads leave a region
  struct Taken {
    int begin = 0, end = 0;
    int other = 0;  // parts, from the thread's own on, that are used up
  };
  // Threads arrive in groups, groups at their node, and nodes at one counter, so that few cores share a
  // counter and only the last of a node touches what other nodes do. It opens the gates of all nodes.
  static constexpr int kGroup = 8;
  struct alignas(64) Arrivals {
    std::atomic<int> arrived{0};
    int expected = 0;
    bool last();  // whether this is the last arrival; the next one is the first again
  };
  struct alignas(64) Gate {
    std::atomic<uint32_t> opened{0};
    void open();
    void wait(uint32_t seen, Clock::duration most, Clock::duration impatient,
              Clock::duration* late = nullptr) const;
  };
  [[noreturn]] static void throw_forked();
  void arrive(int id);
  void meet(int id);
  void fail(const Team& team);
  bool at_barrier(const Team& team) const;
  void start(void (*call)(void*, Team&), void* data);
  void work(int id, uint32_t region);
  void loop(int id);
  uint32_t rest();
  void adapt();
  void end();
  bool take(int phase, int id, int set, int units, Taken& t);

  static std::atomic<int> forks_;  // that made this process
  const int forks_before_ = forks_;
  std::mutex mutex_;
  int size_ = 1;
  bool pin_ = false;
  Clock::duration impatient_ = kImpatient;  // zero if threads share CPUs
  std::vector<Node> nodes_;
  std::vector<int> node_threads_;  // threads of each node
  std::vector<int> node_of_;
  std::vector<std::thread> workers_;
  std::vector<int> first_thread_;      // of each node
  std::vector<Counters> counters_[2];  // [thread], of even and odd regions: a thread clears its other one
  std::vector<Arrivals> groups_;       // [(thread of its node) / kGroup, node by node]
  std::vector<int> group_of_;
  std::vector<Arrivals> node_groups_;  // of each node
  Arrivals all_nodes_;
  std::vector<Gate> starts_, barriers_;  // of each node
  // Threads from active_ on rest. It grows only when all of them sleep, so that each knows in which region it
  // is wanted: the one after resume_.
  std::atomic<int> active_{1}, resting_{0};
  Gate resume_gate_;
  uint32_t resume_ = 0;
  Starved starved_;
  Clock::time_point rest_until_{};
  Clock::duration rest_{};
  void (*call_)(void*, Team&) = nullptr;
  void* data_ = nullptr;
  std::vector<Progress> progress_;     // [thread]
  std::atomic<uint32_t> leave_at_{0};  // the barrier of this region at which threads leave it; 0: none
  std::mutex failing_;
  std::exception_ptr failure_;  // the first of a region
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
  while (pool_.take(phase, id_, set_, outer * width, t))
    for (int u = t.begin; u < t.end; ++u) f(u / width, s.begin + u % width);
}

}  // namespace farthing
